"""What a run computes: the model's shapes, the state and the training step of an experiment.

Nothing here opens data or allocates: training makes its arrays by this, and a plan compiles it for
chips that are not there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from effattn.batch import Batch, TokenInfo
from effattn.checks import check_multiple
from effattn.experiment import Experiment
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.parallel.mesh import batch_sharding, batch_ways
from effattn.train.loss import tile_length
from effattn.train.optimizer import learning_rate_factors, make_optimizer
from effattn.train.schedule import make_schedule
from effattn.train.state import AbstractModel, TrainState, abstract_model, build_state, shardings_of
from effattn.train.step import make_train_step


class Program(NamedTuple):
    """model: its shapes. order: of the tokens in a row, None: their own. init: key -> TrainState.
    abstract: the state's shapes and shardings. whole: parameters that the mesh could not split.
    rows: the sharding of a batch. step: (state, batch) -> (state, metrics), jitted.
    """

    model: AbstractModel
    order: np.ndarray | None
    init: Callable[[jax.Array], TrainState]
    abstract: TrainState
    whole: int
    rows: NamedSharding
    step: Any


def make_program(experiment: Experiment, vocab_size: int, mesh: Mesh) -> Program:
    """Raises ValueError, in a sentence that names the field, for what does not fit together."""
    config, data = experiment.train, experiment.data
    check_multiple(
        "data.batch_size",
        data.batch_size,
        "mesh.data x mesh.fsdp x train.accumulation",
        batch_ways(mesh) * config.accumulation,
    )
    check_multiple("data.seq_len", data.seq_len, "mesh.sequence", experiment.mesh.sequence)
    model = abstract_model(experiment, vocab_size)
    order = token_order(experiment, nnx.merge(model.graphdef, model.params))
    schedule = make_schedule(
        experiment.optimizer,
        steps=config.steps,
        batch_size=data.batch_size,
        seq_len=data.seq_len,
    )
    factors = learning_rate_factors(experiment.model, model.axes)
    frozen = getattr(experiment.model, "frozen", ())
    optimizer = make_optimizer(experiment.optimizer, model.axes, schedule, factors, frozen)
    init, abstract, whole = build_state(model, optimizer, mesh)
    rows = batch_sharding(mesh)
    tile = config.loss_tile or tile_length(
        batch=data.batch_size // config.accumulation,
        seq_len=data.seq_len,
        vocab_size=vocab_size,
        shards=batch_ways(mesh),
    )
    step = make_train_step(
        model.graphdef,
        optimizer,
        schedule,
        shardings=shardings_of(abstract),
        rows=rows,
        accumulation=config.accumulation,
        z_loss=config.z_loss,
        tile=tile,
    )
    return Program(model, order, init, abstract, whole, rows, step)


def abstract_batch(experiment: Experiment, rows: NamedSharding) -> Batch:
    """The shapes of one batch of tokens, laid out as `rows` says."""
    shape = experiment.data.batch_size, experiment.data.seq_len

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    info = TokenInfo(array(jnp.int32), array(jnp.int32), array(jnp.bool_))
    return Batch(array(jnp.int32), array(jnp.int32), array(jnp.float32), info)


def token_order(experiment: Experiment, model: Any) -> np.ndarray | None:
    """The order in which the loader hands out a row's tokens; None: their own.

    Raises ValueError where the model cannot read them in another.
    """
    strategy = experiment.sequence.build(experiment.mesh.sequence)
    order = strategy.order(experiment.data.seq_len)
    if order is None:
        return None
    blocks = [node for _, node in nnx.iter_graph(model) if isinstance(node, Block)]
    bound = {type(b.mixer).__name__ for b in blocks if not getattr(b.mixer, "order_free", False)}
    if not blocks or not isinstance(getattr(model, "stack", None), Stack):
        bound.add(type(model).__name__)
    if bound:
        raise ValueError(
            f"sequence.zigzag: got True, but {', '.join(sorted(bound))} reads a row's tokens in "
            "order; expected False, the contiguous ring"
        )
    return order
