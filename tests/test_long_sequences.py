"""65,536 tokens on a CPU: pieces equal one pass; float32 states are as exact as a recurrence's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import thinned

from effattn.pallas_kernels.delta_rule import delta_rule
from effattn.pallas_kernels.linear_attention import linear_attention
from effattn.pallas_kernels.prefix_scan import gated_scan, softmax_scan

LENGTH = 65_536
PIECES = (0, 30_001, LENGTH)  # neither a whole number of chunks
HEADS, KEY_DIM, VALUE_DIM = 2, 4, 3
DECAYS = (1.0, 0.999, 0.5, 1e-3, 1e-6)

CASES = {
    "linear": (linear_attention, ("query", "key", "value"), {}),
    "linear-per-head": (linear_attention, ("query", "key", "value"), {"per_head": True}),
    "linear-per-token": (linear_attention, ("query", "key", "value", "log_decay"), {}),
    "linear-taylor": (
        linear_attention,
        ("query", "key", "value"),
        {"feature_map": "taylor", "normalize": True},
    ),
    "delta": (delta_rule, ("query", "key", "value", "beta"), {}),
    "gated-delta": (delta_rule, ("query", "key", "value", "beta", "log_decay"), {}),
    "softmax": (softmax_scan, ("scores", "values"), {}),
    "gated": (gated_scan, ("gate", "x"), {}),
}


def make(names, dtype=np.float32):
    """A row of LENGTH tokens for each argument, keys of unit length."""
    rng = np.random.default_rng(0)
    lead = (1, LENGTH, HEADS)
    key = rng.normal(size=(*lead, KEY_DIM))
    arrays = {
        "query": rng.normal(size=(*lead, KEY_DIM)),
        "key": key / np.linalg.norm(key, axis=-1, keepdims=True),
        "value": rng.normal(size=(*lead, VALUE_DIM)),
        "beta": rng.uniform(size=lead),
        # From tokens that forget nearly nothing to some that forget nearly all.
        "log_decay": -np.exp(rng.normal(-4, 3, size=lead)),
        "scores": 5 * rng.normal(size=lead),
        "values": rng.normal(size=(*lead, VALUE_DIM)),
        "gate": rng.uniform(size=(*lead, 1)) ** 0.05,
        "x": rng.normal(size=(*lead, VALUE_DIM)),
    }
    return {name: jnp.asarray(arrays[name], dtype) for name in names}


@pytest.mark.parametrize("name", thinned(CASES))
def test_pieces_of_a_long_sequence_equal_one_pass(name):
    """Outputs and the state, in float64: only the order of the sums differs."""
    op, names, options = CASES[name]
    options = dict(options)
    with jax.enable_x64(True):
        arrays = make(names, np.float64)
        if options.pop("per_head", False):
            options["log_decay"] = jnp.asarray([-1e-5, -0.5])
        run = jax.jit(lambda state, arrays: op(**arrays, state=state, **options))
        whole, final = run(None, arrays)
        state, outs = None, []
        for start, stop in zip(PIECES, PIECES[1:], strict=False):
            out, state = run(state, {k: x[:, start:stop] for k, x in arrays.items()})
            outs.append(out)
        assert_close(jnp.concatenate(outs, axis=1), whole, 1e-10)
        for ours, expected in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
            assert_close(ours, expected, 1e-10)


def assert_close(ours, expected, tolerance):
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape and np.isfinite(ours).all()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["per-head", "per-token", "gated-scan"])
def test_float32_states_are_as_exact_as_those_of_a_float32_recurrence(kind):
    """Against float64 after 64k tokens, at most twice the error of one token after the other.

    One head per decay; 0.999 and 1 sum over many tokens, 1e-6 keeps the last one alone.
    """
    rng = np.random.default_rng(1)
    lead = (1, LENGTH, len(DECAYS))
    key, value = (rng.normal(size=(*lead, 8)).astype(np.float32) for _ in range(2))
    log_decay = np.log(np.asarray(DECAYS)).astype(np.float32)
    if kind == "gated-scan":
        # The rounding of what is given is no error of the op's.
        decay = np.asarray(DECAYS, np.float32)
        added = [key, np.ones_like(key)]
        _, ours = gated_scan(jnp.broadcast_to(decay[:, None], (*lead, 1)), jnp.asarray(key))
    else:
        decay = np.exp(log_decay.astype(np.float64))
        added = [key[..., :, None], value[..., None, :]]
        given = np.broadcast_to(log_decay, lead) if kind == "per-token" else log_decay
        _, state = linear_attention(key, key, value, log_decay=jnp.asarray(given))
        ours = state.kv
    ours = np.asarray(ours)[0]
    plain, exact = (recurrence(*added, decay, dtype) for dtype in (np.float32, np.float64))
    assert np.isfinite(ours).all()
    for head, number in enumerate(DECAYS):
        scale = np.sqrt(np.mean(exact[head] ** 2))
        error, allowed = (
            np.sqrt(np.mean((x[head] - exact[head]) ** 2)) / scale for x in (ours, plain)
        )
        # A last bit of float32, where the recurrence happens to have none to lose.
        assert error <= 2 * max(allowed, 2.0**-24), (number, error, allowed)


def recurrence(left, right, decay, dtype):
    """S_t = decay S_{t-1} + left_t right_t, one token after the other in numpy; [heads, ...]."""
    added = left[0].astype(dtype) * right[0].astype(dtype)
    decay = decay.astype(dtype).reshape(-1, *(1,) * (added.ndim - 2))
    state = np.zeros_like(added[0])
    for token in added:
        state = decay * state + token
    return state
