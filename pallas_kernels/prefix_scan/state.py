"""The state of the softmax scan as a value, and one decoding step of either scan."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn.checks import Dims, check_shape


class SoftmaxState(NamedTuple):
    """What a softmax over a prefix remembers of it. float32, or float64 for such inputs.

    maximum: [batch, num_heads], the largest score m; -inf before the first token.
    denominator: [batch, num_heads], u = sum_j exp(s_j - m).
    numerator: [batch, num_heads, value_dim], w = sum_j exp(s_j - m) v_j.

    m is a reference point, free to be anything: only exp(m) u and exp(m) w mean something, and
    gradients take the m of a returned state for a constant.
    """

    maximum: Any
    denominator: Any
    numerator: Any

    @property
    def nbytes(self) -> int:
        """Bytes of the whole batch, also of abstract arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self)


def scan_dtype(*arrays: jax.Array) -> Any:
    """Of states and sums: float32 at least."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def init_softmax_state(
    batch: int, num_heads: int, value_dim: int, dtype: Any = jnp.float32
) -> SoftmaxState:
    """The state before the first token, (-inf, 0, 0). dtype: of the inputs."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    zeros = jnp.zeros((batch, num_heads), dtype)
    numerator = jnp.zeros((batch, num_heads, value_dim), dtype)
    return SoftmaxState(jnp.full_like(zeros, -jnp.inf), zeros, numerator)


def check_softmax_state(state: SoftmaxState, dims: Dims) -> None:
    """Raises ValueError unless `state` has the shapes that `dims` asks for."""
    for name, letters in (("maximum", "b h"), ("denominator", "b h"), ("numerator", "b h e")):
        check_shape(f"state.{name}", getattr(state, name), letters, dims)


def softmax_scan_step(
    score: jax.Array,
    value: jax.Array,
    state: SoftmaxState,
    *,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, SoftmaxState]:
    """One token of `softmax_scan`: (out like value, state after the token).

    score: [batch, num_heads]; value: [batch, num_heads, value_dim]. valid: bool [batch]; a row
    with valid=False keeps its state and gets out = 0. Time and memory do not depend on how many
    tokens came before. Raises ValueError where shapes do not fit.
    """
    dims: Dims = {}
    check_shape("score", score, "b h", dims)
    check_shape("value", value, "b h e", dims)
    check_softmax_state(state, dims)
    if valid is not None:
        check_shape("valid", valid, "b", dims)
    dtype = scan_dtype(score, value)
    before = SoftmaxState(*(x.astype(dtype) for x in state))
    after = add_token(before, score.astype(dtype), value.astype(dtype))
    out = average(after)
    if valid is not None:
        after = jax.tree.map(lambda new, old: where_rows(valid, new, old), after, before)
        out = where_rows(valid, out, jnp.zeros_like(out))
    return out.astype(value.dtype), after


def gated_scan_step(
    gate: jax.Array, x: jax.Array, state: jax.Array, *, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of `gated_scan`: (h like x, state after the token), h = gate state + x.

    x, state: [batch, *channels]; gate: as many axes, of size 1 or that of x. valid: bool [batch];
    a row with valid=False keeps its state and gets h = 0. Raises ValueError where shapes do not
    fit.
    """
    dtype = scan_dtype(gate, x)
    gate = matched_gate(gate, x, leading=1)
    check_same_shape("state", state, x.shape)
    state = state.astype(dtype)
    after = gate.astype(dtype) * state + x.astype(dtype)
    if valid is None:
        return after.astype(x.dtype), after
    check_shape("valid", valid, "b", {"b": (x.shape[0], "x")})
    out = where_rows(valid, after, jnp.zeros_like(after)).astype(x.dtype)
    return out, where_rows(valid, after, state)


def add_token(state: SoftmaxState, score: jax.Array, value: jax.Array) -> SoftmaxState:
    """The monoid's product of a state and one token, (score, 1, value)."""
    maximum = jax.lax.stop_gradient(jnp.maximum(state.maximum, score))
    # -inf - -inf is nan: a finite reference serves as well where there is nothing yet.
    reference = jnp.where(maximum == -jnp.inf, 0, maximum)
    keep, enter = jnp.exp(state.maximum - reference), jnp.exp(score - reference)
    return SoftmaxState(
        maximum,
        state.denominator * keep + enter,
        state.numerator * keep[..., None] + value * enter[..., None],
    )


def average(state: SoftmaxState) -> jax.Array:
    """numerator / denominator, 0 where the state is empty."""
    denominator = jnp.where(state.denominator == 0, 1, state.denominator)
    return state.numerator / denominator[..., None]


def where_rows(keep: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` in the rows where keep [batch, ...] is True, `old` in the others."""
    return jnp.where(keep.reshape(*keep.shape, *(1,) * (new.ndim - keep.ndim)), new, old)


def check_same_shape(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `array` has this shape."""
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(array.shape)}")


def matched_gate(gate: jax.Array, x: jax.Array, leading: int) -> jax.Array:
    """gate with its first `leading` axes as long as those of x; the others may stay of size 1.

    Raises ValueError where an axis is neither 1 nor that of x.
    """
    fits = gate.ndim == x.ndim and all(
        g in (1, n) for g, n in zip(gate.shape, x.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"gate: expected the axes of `x`, {tuple(x.shape)}, each of them or of size 1, "
            f"got {tuple(gate.shape)}"
        )
    return jnp.broadcast_to(gate, (*x.shape[:leading], *gate.shape[leading:]))
