"""The train state: plain arrays, born sharded, never whole on one host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from effattn.experiment import Experiment
from effattn.nn.memory import lay_out
from effattn.nn.param import parameter_axes
from effattn.parallel.mesh import named, parameter_specs, replicated
from effattn.train.optimizer import state_shardings


@struct.dataclass
class TrainState:
    """step: int32, finished updates. params: pure dict. extra: the model's untrained state.

    key: typed PRNG key of the run; update n draws from fold_in(key, n).
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any
    key: jax.Array


class AbstractModel(NamedTuple):
    """A model before it has arrays.

    params: pure dict of ShapeDtypeStructs. axes: the same dict of axis-name tuples.
    make: rngs -> the module with arrays; trace it under jit.
    """

    graphdef: nnx.GraphDef
    params: Any
    axes: Any
    make: Callable[[nnx.Rngs], nnx.Module]

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def abstract_model(experiment: Experiment, vocab_size: int) -> AbstractModel:
    """Shapes and names of the experiment's model; allocates nothing."""
    sequence = experiment.sequence.build(experiment.mesh.sequence)
    dtype = jnp.dtype(experiment.train.compute_dtype)

    def make(rngs: nnx.Rngs) -> nnx.Module:
        with nnx.use_eager_sharding(False):
            model = experiment.model.build(
                vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs
            )
            lay_out(model, experiment.memory)
            return model

    # jax.eval_shape, because that of nnx looks the logical names up in an ambient mesh.
    graphdef, state = jax.eval_shape(lambda: nnx.split(make(nnx.Rngs(0))))
    return AbstractModel(graphdef, nnx.to_pure_dict(state), parameter_axes(state), make)


def abstract_params(model: AbstractModel, mesh: Mesh) -> tuple[Any, int]:
    """(ShapeDtypeStructs with shardings, number of leaves the mesh could not split)."""
    specs, whole = parameter_specs(model.params, model.axes, mesh)
    return _placed(model.params, named(mesh, specs)), whole


def build_state(
    model: AbstractModel, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Callable[[jax.Array], TrainState], TrainState, int]:
    """(key -> a new state, the state's shapes with shardings, leaves the mesh could not split).

    The first is jitted with output shardings: every device makes its own part. The second is also
    what a checkpoint is restored into. Call the first inside `jax.set_mesh(mesh)`.
    """

    def init(key: jax.Array) -> TrainState:
        params_key, run_key = jax.random.split(key)
        module = model.make(nnx.Rngs(params=params_key))
        params = nnx.to_pure_dict(nnx.state(module))
        # A model with untrained state says how it starts.
        extra = module.init_extra() if hasattr(module, "init_extra") else None
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, params, optimizer.init(params), extra, run_key)

    shapes = jax.eval_shape(init, jax.random.key(0))
    specs, whole = parameter_specs(model.params, model.axes, mesh)
    everywhere: Any = replicated(mesh)  # a sharding stands where TrainState has an array
    params = named(mesh, specs)
    shardings = TrainState(
        step=everywhere,
        params=params,
        opt_state=state_shardings(shapes.opt_state, shapes.params, params, everywhere),
        extra=jax.tree.map(lambda _: everywhere, shapes.extra),
        key=everywhere,
    )
    # Random numbers run as fast at level 1 on a CPU and compile in a quarter of the time (12 s to
    # 2.5 s for two layers; jax 0.12.0.1).
    cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 1} if cpu else None
    jitted = jax.jit(init, out_shardings=shardings, compiler_options=options)
    return jitted, _placed(shapes, shardings), whole


def shardings_of(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings
    )


def check_finite(params: Any, where: str) -> None:
    """Raises ValueError that names the first parameter with a nan or an infinity."""
    finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(params)
    for path, ok in jax.tree_util.tree_flatten_with_path(jax.device_get(finite))[0]:
        if not ok:
            raise ValueError(f"{where}: parameter {dotted(path)} holds nan or infinity")


def dotted(path: Any) -> str:
    """A pytree path as `blocks.0.mixer.query.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
