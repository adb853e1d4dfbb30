"""Learning rate as a function of the step: warm-up, then one of five shapes.

`step` counts finished updates, so the first update uses `schedule(0)` = peak / warmup_steps and the
last one, `schedule(steps - 1)`, uses the final value. With s = step + 1 and w = warmup_steps:
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from effattn.checks import check_in
from effattn.experiment import SCHEDULES, OptimizerConfig

Schedule = Callable[[jax.Array | int], jax.Array]


def make_schedule(
    config: OptimizerConfig, *, steps: int, batch_size: int, seq_len: int
) -> Schedule:
    """step (int or int array) -> learning rate, float32 (float64 under x64).

    Every shape is multiplied by min(1, s / w). With p = (s - w) / (steps - w) in [0, 1] and
    f = final_fraction:
    cosine        peak * (f + (1 - f) * (1 + cos(pi p)) / 2)
    linear        peak * (1 - (1 - f) * p)
    wsd           peak; over the last decay_fraction of the steps linearly down to f * peak
    inverse_sqrt  peak * sqrt(w / max(s, w)), with w at least 1
    power         min(peak, batch_size * power_a * n ** power_b), with n = s * batch_size * seq_len
                  tokens seen and batch_size in sequences (Shen et al. 2024, Power scheduler); over
                  the last decay_fraction linearly from its value there down to f times that value
    Raises ValueError for an unknown `config.schedule`.
    """
    check_in("optimizer.schedule", config.schedule, SCHEDULES)
    peak, final, warmup = config.learning_rate, config.final_fraction, config.warmup_steps
    decay_steps = max(1, round(config.decay_fraction * steps))
    decay_start = steps - decay_steps  # in units of s

    def power_law(s: jax.Array) -> jax.Array:
        # In logarithms: n ** b overflows no float32 however many tokens.
        log_tokens = jnp.log(s) + math.log(batch_size * seq_len)
        law = jnp.exp(math.log(batch_size * config.power_a) + config.power_b * log_tokens)
        return jnp.minimum(peak, law)

    def shape(s: jax.Array) -> jax.Array:
        progress = jnp.clip((s - warmup) / max(1, steps - warmup), 0.0, 1.0)
        down = 1 - (1 - final) * jnp.clip((s - decay_start) / decay_steps, 0.0, 1.0)
        if config.decay_fraction == 0:
            down = jnp.ones_like(s)
        match config.schedule:
            case "cosine":
                return peak * (final + (1 - final) * (1 + jnp.cos(jnp.pi * progress)) / 2)
            case "linear":
                return peak * (1 - (1 - final) * progress)
            case "wsd":
                return peak * down
            case "inverse_sqrt":
                return peak * jnp.sqrt(max(warmup, 1) / jnp.maximum(s, max(warmup, 1)))
            case _:
                held = s if config.decay_fraction == 0 else jnp.minimum(s, max(decay_start, 1))
                return power_law(held) * down

    def schedule(step: jax.Array | int) -> jax.Array:
        s = (jnp.asarray(step) + 1).astype(float)
        return shape(s) * jnp.minimum(1.0, s / max(warmup, 1))

    return schedule
