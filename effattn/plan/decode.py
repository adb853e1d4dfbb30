"""One decoding step of a model as a program: its parameters, a full state, one token a row."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from effattn.batch import TokenInfo
from effattn.experiment import Experiment
from effattn.parallel.mesh import BATCH_AXES, TENSOR_AXIS, batch_ways
from effattn.train.state import abstract_model, abstract_params


def decode_step(
    experiment: Experiment, vocab_size: int, mesh: Mesh, context: int
) -> tuple[Any, tuple[Any, ...], dict[str, Any], int]:
    """(step, its arguments' shapes, the same by part, number of parameters).

    context: tokens that the state has room for. Parameters and state are in the compute dtype.
    Rows of the state lie over the batch axes, and its heads or channels over "tensor".
    """
    batch, dtype = experiment.data.batch_size, jnp.dtype(experiment.train.compute_dtype)
    if batch % batch_ways(mesh):
        raise ValueError(
            f"data.batch_size: got {batch}, expected a multiple of mesh.data x mesh.fsdp="
            f"{batch_ways(mesh)}"
        )
    model = abstract_model(experiment, vocab_size)
    if not hasattr(nnx.merge(model.graphdef, model.params), "init_state"):
        raise ValueError(f"--decode: {type(experiment.model).__name__} does not decode")
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
        abstract_params(model, mesh)[0],
    )

    def state_of(rows: int, length: int) -> Any:
        def init(params: Any) -> Any:
            return nnx.merge(model.graphdef, params).init_state(rows, length, dtype)

        return jax.eval_shape(init, model.params)

    # Which axis of a leaf holds the rows, and which the tokens, shows where other sizes are asked.
    other_rows, other_length = state_of(2 * batch, context), state_of(batch, 2 * context)

    def place(leaf: Any, more_rows: Any, longer: Any) -> Any:
        parts: list[Any] = []
        for size, a, b in zip(leaf.shape, more_rows.shape, longer.shape, strict=True):
            free = size == a == b and TENSOR_AXIS not in parts and BATCH_AXES in parts
            if size != a:
                parts.append(BATCH_AXES)
            elif free and TENSOR_AXIS in mesh.shape and size % mesh.shape[TENSOR_AXIS] == 0:
                parts.append(TENSOR_AXIS)
            else:
                parts.append(None)
        sharding = NamedSharding(mesh, P(*parts))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(place, state_of(batch, context), other_rows, other_length)

    def array(kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch,), kind, sharding=NamedSharding(mesh, P(BATCH_AXES)))

    info = TokenInfo(array(jnp.int32), array(jnp.int32), array(jnp.bool_))
    token = array(jnp.int32)

    def step(params: Any, state: Any, token: jax.Array, info: TokenInfo) -> Any:
        logits, state = nnx.merge(model.graphdef, params).step(token, info, state)
        return jnp.argmax(logits, axis=-1), state

    where = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, donate_argnums=1, out_shardings=(token.sharding, where))
    parts = {"parameters": params, "optimizer": state, "batch": (token, info)}
    return jitted, (params, state, token, info), parts, model.num_parameters
