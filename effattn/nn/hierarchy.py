"""Stages inside stages, each on a shorter sequence than the one around it: what H-Net is made of.

`Isotropic` is a stack of one width. `Stage` is an encoder, a router that cuts its tokens into
chunks, a stage or stack on the chunks alone, and a decoder. Both take an `HNetConfig`, which says
where they differ. Source: Hwang et al. 2025 (arXiv 2507.07955) and its released code.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.nn.block import Block
from effattn.nn.chunking import (
    Boundaries,
    Router,
    RouterState,
    SmoothingState,
    WordRouter,
    WordState,
    chunk_positions,
    dechunk,
    init_smoothing,
    ratio_loss,
    straight_through,
)
from effattn.nn.compact import Capacity, demoted, with_capacity
from effattn.nn.decoder import Stack
from effattn.nn.layers import GatedMLP, RMSNorm, statistics_dtype
from effattn.nn.layout import StageLayout
from effattn.nn.mixer import State
from effattn.nn.param import Dense, parameter
from effattn.parallel.sequence import SequenceParallel


class Trace(NamedTuple):
    """What a stage did besides its output: `Output`'s losses and metrics, outermost stage first."""

    losses: dict[str, jax.Array]
    metrics: dict[str, jax.Array]


class Isotropic(nnx.Module):
    """Blocks of one width and a norm at their end; the residual stream is float32."""

    def __init__(
        self,
        layers: str,
        config: Any,
        stage: int,
        height: int,
        *,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        """height: projections onto residual streams up to here, which shrinks them at first."""
        width = config.widths()[stage]
        stds = {
            "init_std": config.initializer_range,
            "out_init_std": config.initializer_range * max(1, height) ** -0.5,
        }
        options: dict[str, Any] = {"dtype": dtype}

        def norm(rngs: nnx.Rngs) -> RMSNorm:
            return RMSNorm(width, eps=config.norm_eps, rngs=rngs, **options)

        def block(letter: str, rngs: nnx.Rngs) -> Block:
            mixer: Any = config.attention(stage) if letter in "tT" else config.ssd()
            mixer.out_init_std = stds["out_init_std"]
            mixer = mixer.build(width, sequence=sequence, rngs=rngs, **options)
            if letter.islower():
                return Block(mixer, None, norm(rngs), None)
            mlp = GatedMLP(width, config.mlp_width(stage), **stds, rngs=rngs, **options)
            return Block(mixer, mlp, norm(rngs), norm(rngs))

        self.stack = Stack(layers, block, remat=config.remat, rngs=rngs)
        self.norm = norm(rngs)

    def __call__(
        self, x: jax.Array, info: TokenInfo, *, capacity: Capacity, key: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[Boundaries, ...], Trace]:
        y, _ = self.stack(x.astype(statistics_dtype(x.dtype)), info, key=key)
        return self.norm(y), (), Trace({}, {})

    def init_state(self, batch: int, max_len: int, dtype: Any) -> State:
        return self.stack.init_state(batch, max_len, dtype)

    def prefill(self, x: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        y, state = self.stack.prefill(x.astype(statistics_dtype(x.dtype)), info, state)
        return self.norm(y), state

    def step(self, x_t: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        y, state = self.stack.step(x_t.astype(statistics_dtype(x_t.dtype)), info, state)
        return self.norm(y), state


class StageState(NamedTuple):
    """chunks, total: [batch], chunks begun in the current document and in the row, before any
    demotion in the latter. limit: int, chunks that a row may have, none where it is 0."""

    encoder: State
    router: RouterState | WordState
    inner: State
    smoothing: SmoothingState
    decoder: State
    chunks: jax.Array
    total: jax.Array
    limit: jax.Array


class Stage(nnx.Module):
    """encoder, router, inner stage on the chunks, dechunking, decoder."""

    def __init__(
        self,
        layout: StageLayout,
        config: Any,
        stage: int = 0,
        height: int = 0,
        **options: Any,
    ):
        assert layout.inner is not None
        rngs, widths = options["rngs"], config.widths()
        self.stage, self.width = stage, widths[stage]
        self.target = config.of_stage("targets", stage)
        self.ratio_weight = config.ratio_weight
        self.demote = config.demote_in_evaluation and config.capacity.mode == "demote"
        self.capacity = config.capacity.build("model.capacity")
        height += layout.height()
        self.encoder = Isotropic(layout.encoder, config, stage, height, **options)
        self.by_rule = stage == 0 and config.segmenter == "words"
        self.sequence: SequenceParallel = options["sequence"]
        self.router: Any = Router(self.width, sequence=self.sequence, rngs=rngs)
        if self.by_rule:
            self.router = WordRouter(config.longest_word)
        self.residual = Dense(
            self.width,
            self.width,
            ("embed", None),
            init=jax.nn.initializers.zeros,
            use_bias=True,
            dtype=statistics_dtype(options["dtype"]),
            rngs=rngs,
        )
        zeros, wider = jax.nn.initializers.zeros, widths[stage + 1] - self.width
        self.widening = parameter((wider,), ("embed",), zeros, rngs) if wider else None
        self.inner = make_stage(layout.inner, config, stage + 1, height, **options)
        self.decoder = Isotropic(layout.decoder, config, stage, height, **options)

    def _widen(self, x: jax.Array) -> jax.Array:
        """The inner stage is as wide or wider: the same learned numbers for every chunk."""
        if self.widening is None:
            return x
        rest = jnp.broadcast_to(
            self.widening[...].astype(x.dtype), (*x.shape[:-1], len(self.widening))
        )
        return jnp.concatenate([x, rest], axis=-1)

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        capacity: Capacity,
        key: jax.Array | None = None,
        tokens: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Boundaries, ...], Trace]:
        """(y, boundaries of this stage and all inside it, at this stage's tokens; losses).

        tokens, in all three calls: the bytes behind x, which a rule reads.
        """
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        encoded, _, _ = self.encoder(x, info, capacity=capacity, key=keys[0])
        found, _ = self.router(tokens if self.by_rule else encoded, info)
        begins = demoted(found.begins, capacity) if capacity.mode == "demote" else found.begins
        ranks = chunk_positions(begins, info)[0]

        def inner(rows: jax.Array, info: TokenInfo) -> tuple[Any, Trace]:
            y, deeper, trace = self.inner(self._widen(rows), info, capacity=capacity, key=keys[1])
            return (y[..., : self.width], deeper), trace

        (chunks, deeper), trace, report = with_capacity(
            inner, encoded, info._replace(positions=ranks), found.begins, capacity
        )
        smooth, _ = dechunk(chunks, found.probability, begins, info, sequence=self.sequence)
        y = smooth * straight_through(found.confidence)[..., None] + self.residual(encoded)
        y, _, _ = self.decoder(y, info, capacity=capacity, key=keys[2])
        metrics = _merged(
            self._metrics(found, info), report.metrics(f"chunks_{self.stage}", capacity)
        )
        losses = trace.losses
        if not self.by_rule:
            losses = {f"ratio_{self.stage}": self._ratio(found, info), **losses}
        return y, (found, *deeper), Trace(losses, _merged(metrics, trace.metrics))

    def _ratio(self, found: Boundaries, info: TokenInfo) -> jax.Array:
        heard = jnp.where(info.valid, found.probability, 0)
        count = jnp.sum(info.valid)
        return ratio_loss(found.begins, heard, count, self.target)

    def _metrics(self, found: Boundaries, info: TokenInfo) -> dict[str, jax.Array]:
        count = jnp.maximum(jnp.sum(info.valid), 1).astype(jnp.float32)
        begun = jnp.sum(found.begins)
        return {
            f"boundary_rate_{self.stage}": begun / count,
            f"boundary_probability_{self.stage}": jnp.sum(
                jax.lax.stop_gradient(found.probability) * info.valid
            )
            / count,
            f"compression_{self.stage}": count / jnp.maximum(begun, 1),
        }

    def init_state(self, batch: int, max_len: int, dtype: Any) -> StageState:
        def zero() -> jax.Array:
            return jnp.zeros((batch,), jnp.int32)

        limit = self.capacity.ladder(max_len)[0] if self.demote else max_len
        return StageState(
            self.encoder.init_state(batch, max_len, dtype),
            self.router.init_state(batch, self.width, dtype),
            self.inner.init_state(batch, max_len, dtype),
            init_smoothing(batch, self.width, dtype),
            self.decoder.init_state(batch, max_len, dtype),
            zero(),
            zero(),
            jnp.int32(limit),
        )

    def _begin(
        self, encoded: jax.Array, tokens: Any, info: TokenInfo, state: StageState
    ) -> tuple[Boundaries, jax.Array, StageState]:
        """(boundaries after demotion, positions of chunks, the state with what was counted)."""
        found, router = self.router(tokens if self.by_rule else encoded, info, state.router)
        total = state.total + jnp.sum(found.begins, axis=1, dtype=jnp.int32)
        if self.demote:
            rank = jnp.cumsum(found.begins, axis=1, dtype=jnp.int32) + state.total[:, None]
            found = found._replace(begins=found.begins & (rank <= state.limit))
        ranks, chunks = chunk_positions(found.begins, info, state.chunks, state.router.segment)
        return found, ranks, state._replace(router=router, chunks=chunks, total=total)

    def _end(
        self,
        chunks: jax.Array,
        encoded: jax.Array,
        found: Boundaries,
        info: TokenInfo,
        state: StageState,
    ) -> tuple[jax.Array, StageState]:
        """(what the decoder reads, the state with the moving average)."""
        chunks = chunks[..., : self.width]
        smooth, smoothing = dechunk(
            chunks, found.probability, found.begins, info, state.smoothing, self.sequence
        )
        return smooth + self.residual(encoded), state._replace(smoothing=smoothing)

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: StageState, tokens: jax.Array | None = None
    ) -> tuple[jax.Array, StageState]:
        encoded, encoder = self.encoder.prefill(x, info, state.encoder)
        found, ranks, state = self._begin(encoded, tokens, info, state._replace(encoder=encoder))

        def inner(rows: jax.Array, info: TokenInfo) -> tuple[jax.Array, State]:
            return self.inner.prefill(self._widen(rows), info, state.inner)

        capacity = self.capacity if self.capacity.mode == "bucket" else Capacity()
        chunks, inner_state, _ = with_capacity(
            inner,
            encoded,
            info._replace(positions=ranks),
            found.begins,
            capacity._replace(pooled=False),  # a state belongs to a row
        )
        y, state = self._end(chunks, encoded, found, info, state._replace(inner=inner_state))
        y, decoder = self.decoder.prefill(y, info, state.decoder)
        return y, state._replace(decoder=decoder)

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: StageState, tokens: jax.Array | None = None
    ) -> tuple[jax.Array, StageState]:
        encoded, encoder = self.encoder.step(x_t, info, state.encoder)
        one = TokenInfo(*(a[:, None] for a in info))
        bytes_ = None if tokens is None else tokens[:, None]
        state = state._replace(encoder=encoder)
        found, ranks, state = self._begin(encoded[:, None], bytes_, one, state)
        begins = found.begins[:, 0]

        def advance(inner: State) -> tuple[jax.Array, State]:
            chunk = TokenInfo(ranks[:, 0], info.segment_ids, begins)
            y, inner = self.inner.step(self._widen(encoded), chunk, inner)
            return y[..., : self.width], inner

        # The inner stage runs where any row begins a chunk, and advances those rows alone.
        chunks, inner = jax.lax.cond(
            jnp.any(begins), advance, lambda inner: (jnp.zeros_like(encoded), inner), state.inner
        )
        state = state._replace(inner=inner)
        y, state = self._end(chunks[:, None], encoded[:, None], found, one, state)
        y, decoder = self.decoder.step(y[:, 0], info, state.decoder)
        return y, state._replace(decoder=decoder)


def make_stage(layout: StageLayout, config: Any, stage: int, height: int, **options: Any):
    """The innermost stage is one stack."""
    if layout.inner is None:
        return Isotropic(layout.encoder, config, stage, height + layout.height(), **options)
    return Stage(layout, config, stage, height, **options)


def _merged(one: dict[str, jax.Array], other: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Both; where both have a name, which is only "capacity_error", the sum."""
    both = {name: one[name] + other[name] for name in one.keys() & other.keys()}
    return {**one, **other, **both}
