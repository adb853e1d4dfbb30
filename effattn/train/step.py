"""The jitted training step.

`nnx.merge(graphdef, params)` makes the model out of plain arrays inside the step, which costs
nothing at run time. What measures and does not learn is in `effattn.evaluate`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from effattn.batch import Batch
from effattn.parallel.mesh import constrain_tokens
from effattn.train.loss import TokenLoss, cross_entropy
from effattn.train.schedule import Schedule
from effattn.train.state import TrainState


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    shardings: TrainState | None = None,
    rows: NamedSharding | None = None,
    accumulation: int = 1,
    z_loss: float = 0.0,
    tile: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """(state, batch) -> (state, metrics), jitted; the state given is consumed.

    shardings: of the state, pinned, or XLA may choose others for what comes out and the second step
    compiles anew. rows: of the batch; a numpy batch is then placed by the call itself, ten times
    quicker than by `jax.device_put` (0.04 ms for 0.5 ms). tile: see `loss.cross_entropy`.
    With `accumulation` = n the batch is n microbatches; sums of losses, weights and gradients are
    added and divided once, so the step is that of the whole batch.
    metrics: scalars. loss (nats per token, without the extra terms), grad_norm (before clipping),
    learning_rate, z_loss and the model's losses and metrics under their names. Where the model
    reports a `capacity_error` above 0, the state that comes back is the one that was given.
    """

    def objective(
        params: Any, extra: Any, batch: Batch, key: jax.Array, exchange: dict[str, jax.Array]
    ) -> tuple[jax.Array, tuple[TokenLoss, dict[str, Any], dict[str, jax.Array], Any]]:
        model = nnx.merge(graphdef, params)
        out = model(batch.tokens, batch.info, key=key, extra=extra)
        hidden = constrain_tokens(out.hidden)
        sums = cross_entropy(model, hidden, batch.targets, batch.loss_weights, tile=tile)
        total = sums.loss + z_loss * sums.z if z_loss else sums.loss
        for name, (value, _) in out.losses.items():
            total = total + value * exchange[name]
        return total, (sums, dict(out.losses), dict(out.metrics), out.extra)

    def exchange_rates(
        state: TrainState, micro: Batch, keys: jax.Array
    ) -> tuple[list[str], dict[str, jax.Array]]:
        """What one unit of each extra loss's sum is worth in units of the token loss's sum.

        An extra loss is divided by its own weight over the whole batch, the token loss by its own;
        the ratio makes one sum of them, so that the gradients too are divided once.
        """

        def weights(batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
            out = nnx.merge(graphdef, state.params)(
                batch.tokens, batch.info, key=key, extra=state.extra
            )
            return {name: weight for name, (_, weight) in out.losses.items()}

        first = jax.tree.map(lambda x: x[0], (micro, keys))
        names = list(jax.eval_shape(weights, *first))
        if not names:
            return names, {}
        # Weights hang on the batch, seldom on the parameters: XLA drops the rest of this pass.
        totals = jax.tree.map(jnp.sum, jax.lax.map(lambda xs: weights(*xs), (micro, keys)))
        tokens = jnp.sum(micro.loss_weights)
        return names, {name: tokens / _nonzero(total) for name, total in totals.items()}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), accumulation)
        micro = jax.tree.map(lambda x: _microbatches(x, accumulation), batch)
        names, rates = exchange_rates(state, micro, keys)

        def one(carry: Any, xs: Any) -> tuple[Any, Any]:
            grads, extra = carry
            batch, key = xs
            (_, (sums, losses, metrics, extra)), new = jax.value_and_grad(objective, has_aux=True)(
                state.params, extra, batch, key, rates
            )
            return (jax.tree.map(jnp.add, grads, new), extra), (sums, losses, metrics)

        if accumulation == 1:
            first = jax.tree.map(lambda x: x[0], (micro, keys))
            (_, (sums, losses, model_metrics, extra)), grads = jax.value_and_grad(
                objective, has_aux=True
            )(state.params, state.extra, *first, rates)
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            (grads, extra), outs = jax.lax.scan(one, (zeros, state.extra), (micro, keys))
            sums, losses = jax.tree.map(lambda x: x.sum(0), outs[:2])
            model_metrics = jax.tree.map(lambda x: x.mean(0), outs[2])
        weight = _nonzero(sums.weight)
        grads = jax.tree.map(lambda g: (g / weight).astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        model = nnx.merge(graphdef, params)
        if hasattr(model, "end_step"):  # what moves once per update, not once per microbatch
            params, extra = model.end_step(params, extra)
        metrics = {
            "loss": sums.loss / weight,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
            **({"z_loss": z_loss * sums.z / weight} if z_loss else {}),
            **{name: losses[name][0] / _nonzero(losses[name][1]) for name in names},
            **model_metrics,
        }
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            extra=extra,
            key=state.key,
        )
        if "capacity_error" in metrics:  # a selection, because 0 x nan is nan
            failed = metrics["capacity_error"] > 0
            new_state = jax.tree.map(partial(jnp.where, failed), state, new_state)
        return new_state, metrics

    placed: dict[str, Any] = {}
    if shardings is not None:
        placed = {"in_shardings": (shardings, rows), "out_shardings": (shardings, None)}
    return jax.jit(step, donate_argnums=0, **placed)


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    """[batch, ...] -> [count, batch / count, ...]: rows i, i + count, ... make microbatch i.

    Strided, so that every device's rows serve every microbatch and none moves.
    """
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)


def _nonzero(weight: jax.Array) -> jax.Array:
    """A batch of padding alone has weight 0 and loss sum 0: its mean is 0, not nan."""
    return jnp.where(weight > 0, weight, jnp.ones_like(weight))
