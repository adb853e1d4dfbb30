"""`effattn selfcheck`: the laws and golden vectors on the user's own device, in about a minute.

A check returns how far two routes to one result are apart, relative to the larger result, and how
far they may be. A new op or model adds a line to CHECKS or SMALL_MODELS.
"""

import json
import pkgutil
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effattn.batch import TokenInfo, whole_rows
from effattn.blocks import EMPTY, FULL
from effattn.generate import generate
from effattn.masks import Causal, Dilated, Full, Neighborhood, PrefixLM, Sink, Window
from effattn.models import MODELS
from effattn.models.transformer import TransformerConfig
from effattn.nn.moe import ExpertsConfig
from effattn.pallas_kernels import attention as attention_op
from effattn.pallas_kernels import linear_attention as linear_attention_op
from effattn.versions import versions

# Sums of some tens of float32 terms in another order; gradients pass several of them.
ROUNDING, GRADIENT_ROUNDING = 2e-5, 2e-4
VOCAB = 32

# What `build` gets for a small model of every entry of MODELS.
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"num_layers": 2, "width": 32, "num_heads": 4, "num_kv_heads": 2},
    "based": {"num_layers": 3, "width": 32, "num_heads": 2, "feature_dim": 8, "window": 7},
    "lightning": {
        "num_layers": 3,
        "width": 32,
        "num_heads": 2,
        "pattern": ("lightning", "lightning", "softmax"),
    },
    "mamba2": {"num_layers": 2, "width": 32, "head_dim": 16, "state_dim": 8},
    "aaren": {"num_layers": 2, "width": 32, "num_heads": 2, "pattern": ("conv", "aaren")},
    "rat": {
        "num_layers": 2,
        "width": 32,
        "num_heads": 4,
        "pattern": ("rat", "local"),
        "chunk_size": 4,
        "window": 7,
    },
    "tokenformer": {"num_layers": 2, "width": 32, "num_heads": 2, "mlp_slots": 48},
    "mor": {"num_layers": 5, "width": 32, "num_heads": 4, "num_kv_heads": 2},
    "moe": {
        "num_layers": 2,
        "width": 32,
        "num_heads": 4,
        "dense_layers": 1,
        "experts": ExpertsConfig(count=4, top_k=2, mlp_width=24),
    },
    "hnet": {
        "layout": '["t1", ["T1"], "t1"]',
        "width": 32,
        "num_heads": (2,),
        "inner_widths": (48,),
        "targets": (2.0,),
    },
    "parscale": {
        "base": TransformerConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2),
        "prefix_length": 4,
    },
    "adaptive_width": {"num_layers": 2, "width": 32, "num_heads": 2, "mlp_width": 64},
    "mrt5": {
        "num_layers": 2,
        "num_decoder_layers": 1,
        "gate_layer": 1,
        "width": 32,
        "num_heads": 2,
        "head_dim": 16,
        "mlp_width": 48,
        "source_length": 2,
    },
    "routing": {"num_layers": 2, "width": 32, "num_heads": 2, "window": 7, "num_clusters": 3},
    "word_pooled": {
        "encoder_layers": 1,
        "num_layers": 1,
        "decoder_layers": 1,
        "width": 32,
        "num_heads": 2,
        "backbone_width": 32,
        "backbone_heads": 2,
        "longest_word": 4,
    },
    "nat": {
        "axes": (4, 6),
        "channels": 1,
        "depths": (1, 1),
        "width": 32,
        "head_dim": 8,
        "window": 3,
        "stem_strides": (1,),
    },
}
# They read whole images: nothing is packed, generated or hidden from the future.
IMAGE_MODELS = ("nat",)


class Check(NamedTuple):
    name: str
    about: str
    run: Callable[[], tuple[float, float]]  # -> (distance, the largest that is right)


def run_checks(say: Callable[[str], None] = print) -> int:
    """Runs every check and says a line about each; returns 1 where one failed, else 0."""
    device = jax.devices()[0]
    say(", ".join(f"{name} {version}" for name, version in versions().items()))
    say(f"device: {device.device_kind} ({device.platform}), {jax.device_count()} of them")
    say("")
    failures, began = 0, time.perf_counter()
    with jax.default_matmul_precision("highest"):
        for check in CHECKS:
            start = time.perf_counter()
            note = ""
            try:
                distance, limit = check.run()
                right = distance <= limit
                note = f"{distance:9.1e} of {limit:.0e}"
            except Exception as error:  # a crash of one check is its result; the others still run
                right, note = False, f"{type(error).__name__}: {error}"
            failures += not right
            seconds = time.perf_counter() - start
            say(f"{'ok  ' if right else 'FAIL'} {check.name:38}{note}  {seconds:5.1f} s")
    say("")
    say(
        f"{len(CHECKS) - failures} passed, {failures} failed in {time.perf_counter() - began:.0f} s"
    )
    return 1 if failures else 0


def distance(got: Any, wanted: Any) -> float:
    """Largest difference of two equal pytrees over max(1, largest value); inf where one is nan."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        same = a == b  # -inf is equal to -inf
        difference = np.abs(np.where(same, 0, a) - np.where(same, 0, b)).max(initial=0.0)
        largest = max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0.0))
        worst = max(worst, difference / largest if np.isfinite(difference) else np.inf)
    return float(worst)


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# ---- masks


def _masks() -> tuple[float, float]:
    masks = [
        Full(),
        Causal() & (Window(left=5) | Sink(3)),
        PrefixLM(9) & ~Dilated(3),
        Causal() & Neighborhood(axes=(8, 8), window=(3, 5), dilation=(2, 1)),
    ]
    positions = np.arange(64, dtype=np.int32)
    blocks = positions.reshape(8, 8)
    wrong = 0
    for mask in masks:
        allowed = np.asarray(mask.allowed(positions[:, None], positions[None, :]))
        allowed = allowed.reshape(8, 8, 8, 8).swapaxes(1, 2)  # [q block, kv block, q, kv]
        kinds = np.asarray(mask.block_kinds(blocks, blocks))
        wrong += int(((kinds == EMPTY) & allowed.any((2, 3))).sum())
        wrong += int(((kinds == FULL) & ~allowed.all((2, 3))).sum())
    return wrong, 0


# ---- ops


def _with_gradients(op: Callable[..., Any], *arrays: jax.Array) -> Any:
    """(out, gradients of a fixed weighted sum of out)."""

    def weighted(*arrays: jax.Array) -> tuple[jax.Array, Any]:
        out = op(*arrays)
        total = jnp.zeros(())
        for leaf in jax.tree.leaves(out):
            weights = jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
            total += jnp.sum(jnp.where(jnp.isfinite(leaf), leaf, 0) * weights)
        return total, out

    grads, out = jax.jit(jax.grad(weighted, argnums=range(len(arrays)), has_aux=True))(*arrays)
    return out, grads


def _attention(**options: Any) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        arrays = _normal(0, 2, 70, 4, 16), _normal(1, 2, 70, 2, 16), _normal(2, 2, 70, 2, 24)

        def op(implementation: str) -> Any:
            return _with_gradients(
                lambda *a: attention_op.attention(*a, implementation=implementation, **options),
                *arrays,
            )

        return distance(op("auto"), op("reference")), GRADIENT_ROUNDING

    return run


def _segments() -> np.ndarray:
    return np.repeat([[1, 2, 0], [1, 2, 3]], [31, 25, 14], axis=1)


def _linear(log_decay: str | None = None, **options: Any) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        arrays = [_normal(0, 2, 70, 2, 8), _normal(1, 2, 70, 2, 8), _normal(2, 2, 70, 2, 12)]
        shapes = {"head": (2,), "token": (2, 70, 2), "channel": (2, 70, 2, 8)}
        if log_decay is not None:
            arrays.append(-jnp.abs(_normal(3, *shapes[log_decay])) / 4)

        def op(implementation: str) -> Any:
            def call(query: Any, key: Any, value: Any, decay: Any = None) -> Any:
                return linear_attention_op.linear_attention(
                    query, key, value, log_decay=decay, implementation=implementation, **options
                )

            return _with_gradients(call, *arrays)

        return distance(op("auto"), op("reference")), GRADIENT_ROUNDING

    return run


def _decode() -> tuple[float, float]:
    """Rows of unequal length against attention over the same slots, the rest of them unread."""
    lengths, slots = jnp.array([70, 33]), np.arange(70, dtype=np.int32)
    query, key, value = _normal(0, 2, 1, 4, 16), _normal(1, 2, 70, 2, 16), _normal(2, 2, 70, 2, 24)
    mask = Causal() & Window(left=40)
    unread = jnp.asarray(slots)[None, :, None, None] >= lengths[:, None, None, None]
    got = attention_op.decode_attention(
        query, *(jnp.where(unread, jnp.nan, x) for x in (key, value)), lengths=lengths, mask=mask
    )
    wanted = attention_op.attention(
        query,
        key,
        value,
        mask=mask,
        q_positions=lengths[:, None] - 1,
        kv_positions=slots,
        implementation="reference",
    )
    return distance(got, wanted), ROUNDING


def _stored(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(meta, arrays) of a file of vectors in the package."""
    path = resources.files("effattn") / "selfcheck_data" / f"{name}.npz"
    with path.open("rb") as file, np.load(file) as stored:
        arrays = {key: stored[key] for key in stored.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def _golden_neighborhood(name: str) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        meta, arrays = _stored(name)

        def op(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
            return attention_op.neighborhood_attention(
                query,
                key,
                value,
                window=meta["window"],
                stride=meta["stride"],
                dilation=meta["dilation"],
                causal=meta["causal"],
                extra_key=jnp.asarray(arrays["add_k"]),
                extra_value=jnp.asarray(arrays["add_v"]),
                scale=meta["scale"],
                return_lse=True,
            )

        inputs = (jnp.asarray(arrays[n]) for n in ("q", "k", "v"))
        (out, lse), pullback = jax.vjp(jax.jit(op), *inputs)
        got = (out, lse, *pullback((jnp.asarray(arrays["do"]), jnp.zeros_like(lse))))
        wanted = [arrays[n] for n in ("out", "lse", "dq", "dk", "dv")]
        return distance(got, wanted), 5e-5  # what its README grants to gradients in float32

    return run


def _golden(name: str) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        meta, arrays = _stored(name)
        query, key, value, cotangent = (
            jnp.asarray(arrays[n].swapaxes(1, 2)) for n in ("in.q", "in.k", "in.v", "ct.o")
        )  # theirs are [batch, heads, seq_len, dim]

        def op(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return linear_attention_op.linear_attention(
                query,
                key,
                value,
                feature_map="taylor",
                normalize=True,
                eps=meta["eps"],
                scale=meta["scale_value"],
            )[0]

        out, pullback = jax.vjp(jax.jit(op), query, key, value)
        got = (out, *pullback(cotangent))
        wanted = [arrays[n].swapaxes(1, 2) for n in ("out64.o", "grad.q", "grad.k", "grad.v")]
        return distance(got, wanted), meta["tolerance"]["grad_float32"]

    return run


# ---- models


def _small(name: str, dtype: Any = jnp.float32) -> Any:
    """A model whose parameters are all drawn anew: zeros at initialisation would hide mistakes."""
    config = pkgutil.resolve_name(MODELS[name])(**SMALL_MODELS[name])
    with nnx.use_eager_sharding(False):
        graphdef, params = nnx.split(
            nnx.eval_shape(lambda: config.build(vocab_size=VOCAB, dtype=dtype, rngs=nnx.Rngs(0)))
        )
    leaves, tree = jax.tree.flatten(params)
    drawn = [_normal(i, *leaf.shape) * 0.3 for i, leaf in enumerate(leaves)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, drawn))


def _logits(model: Any, tokens: jax.Array, info: TokenInfo) -> jax.Array:
    return jax.jit(lambda m, t, i: m.logits(m(t, i).hidden))(model, tokens, info)


def _tokens(batch: int, seq_len: int) -> jax.Array:
    drawn = np.random.default_rng(0).integers(0, VOCAB, (batch, seq_len))
    return jnp.asarray(drawn, jnp.int32)


def _prefill_and_steps(name: str) -> tuple[float, float]:
    model, tokens = _small(name), _tokens(2, 24)
    whole = _logits(model, tokens, whole_rows(tokens))
    lengths = jnp.array([9, 5])  # rows of unequal length; each goes on at its own end
    prefill, step = jax.jit(lambda m, *a: m.prefill(*a)), jax.jit(lambda m, *a: m.step(*a))
    state = model.init_state(2, 24, jnp.float32)
    logits, state = prefill(model, tokens[:, :9], whole_rows(tokens[:, :9], lengths), state)
    worst = max(distance(logits[r, :n], whole[r, :n]) for r, n in enumerate(lengths))
    for extra in range(15):
        at, ones = lengths + extra, jnp.ones((2,), jnp.int32)
        token = tokens[jnp.arange(2), at]
        logits, state = step(model, token, TokenInfo(at, ones, ones.astype(bool)), state)
        worst = max(worst, distance(logits, whole[jnp.arange(2), at]))
    return worst, GRADIENT_ROUNDING


def _causality(name: str) -> tuple[float, float]:
    model, tokens = _small(name), _tokens(2, 24)
    changed = tokens.at[:, 15:].set((tokens[:, 15:] + 1) % VOCAB)
    one, two = (_logits(model, t, whole_rows(t)) for t in (tokens, changed))
    if distance(one[:, 15:], two[:, 15:]) < 1e-3:
        return np.inf, 0  # what was changed must show somewhere
    return distance(one[:, :15], two[:, :15]), ROUNDING


def _packing(name: str) -> tuple[float, float]:
    model, tokens = _small(name), _tokens(1, 24)
    cuts = [(0, 7), (7, 18), (18, 24)]
    positions = jnp.concatenate([jnp.arange(b - a) for a, b in cuts])[None].astype(jnp.int32)
    segments = jnp.concatenate([jnp.full(b - a, i + 1) for i, (a, b) in enumerate(cuts)])[None]
    packed = _logits(model, tokens, TokenInfo(positions, segments, segments > 0))
    alone = [_logits(model, tokens[:, a:b], whole_rows(tokens[:, a:b])) for a, b in cuts]
    return distance(packed, jnp.concatenate(alone, axis=1)), GRADIENT_ROUNDING


def _generation(name: str) -> tuple[float, float]:
    model, prompts = _small(name), [[3, 1, 4, 1, 5], [9, 2]]
    result = generate(model, prompts, max_new_tokens=8)
    wrong = 0
    for prompt, completion in zip(prompts, result.completions, strict=True):
        row = jnp.asarray([prompt + completion.tokens])
        best = np.argmax(_logits(model, row, whole_rows(row))[0], axis=-1)[len(prompt) - 1 : -1]
        wrong += int((best != np.asarray(completion.tokens)).sum())
    return wrong, 0


def _bfloat16(name: str) -> tuple[float, float]:
    tokens = _tokens(2, 24)
    info = whole_rows(tokens)
    near = _logits(_small(name, jnp.bfloat16), tokens, info).astype(jnp.float32)
    # bfloat16 keeps 8 bits; a few layers of random weights multiply its rounding.
    return distance(near, _logits(_small(name), tokens, info)), 0.1


LAWS = [
    ("prefill + steps = full pass", "rows of unequal length", _prefill_and_steps),
    ("no future token is seen", "changed later tokens leave logits alone", _causality),
    ("packed = apart", "three documents in a row and each alone", _packing),
    ("greedy text = argmax", "generate against the full pass", _generation),
    ("bfloat16 near float32", "logits of both compute types", _bfloat16),
]

CHECKS = [
    Check("masks: blocks", "EMPTY and FULL blocks are what they say", _masks),
    Check("attention: causal", "auto against reference, gradients too", _attention()),
    Check(
        "attention: window, sink, cap",
        "auto against reference, gradients too",
        _attention(mask=Causal() & (Window(left=9) | Sink(2)), logit_soft_cap=5.0, return_lse=True),
    ),
    Check(
        "attention: packed rows",
        "auto against reference, gradients too",
        _attention(q_segment_ids=_segments(), return_lse=True),
    ),
    Check("decode: rows of unequal length", "a cache against attention over it", _decode),
    Check("linear attention", "auto against reference, gradients too", _linear()),
    *(
        Check(f"linear attention: decay per {d}", "auto against reference, gradients", _linear(d))
        for d in ("head", "token", "channel")
    ),
    Check(
        "linear attention: Taylor, packed",
        "auto against reference, gradients too",
        _linear(feature_map="taylor", normalize=True, segment_ids=_segments(), chunk_size=16),
    ),
    *(
        Check(f"golden: {name}", "vectors made by the authors' code", _golden(name))
        for name in ("based_op_naive", "based_op_naive_chunkable")
    ),
    Check(
        "golden: na_2d_gqa_extra",
        "vectors of NATTEN's definition",
        _golden_neighborhood("na_2d_gqa_extra"),
    ),
    *(
        Check(f"{name}: {law}", about, partial(run, name))
        for name in MODELS
        for law, about, run in LAWS
        if name not in IMAGE_MODELS or run is _bfloat16
    ),
]
