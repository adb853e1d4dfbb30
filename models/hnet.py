"""H-Net: a byte model that learns where its own tokens begin, and runs its main part on those.

Encoder on bytes, a router that cuts them into chunks, a wider stage on the chunks' first vectors
(which may be such a model again), chunks smoothed and laid back on their bytes, decoder on bytes.
Source: Hwang, Wang and Gu 2025 (arXiv 2507.07955) and its released code. We differ: the moving
average and the router are float32, means of the ratio loss leave padding out, norms and the rates
of the state spaces get no weight decay, the residual projection's bias starts at zero.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_same_length
from effattn.nn.block import Block
from effattn.nn.chunking import (
    Boundaries,
    Router,
    RouterState,
    SmoothingState,
    dechunk,
    init_smoothing,
    ratio_loss,
    straight_through,
)
from effattn.nn.compact import Capacity, CapacityConfig, demoted, with_capacity
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import Embedding, GatedMLP, Head, RMSNorm, statistics_dtype
from effattn.nn.layout import StageLayout, parse_layout
from effattn.nn.linear_state import segments_at_ends
from effattn.nn.mixer import Output, State
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.mixers.ssd import SSDConfig
from effattn.nn.param import Dense, parameter
from effattn.pallas_kernels.linear_attention.packing import runs_of_segments
from effattn.parallel.sequence import Local, SequenceParallel

MLP_MULTIPLE = 128


@dataclass(kw_only=True)
class HNetConfig:
    """layout: see `effattn.nn.layout`. Stages are numbered from the outermost, 0.

    width: of stage 0; inner_widths: of the stages inside, never falling; empty: all the same.
    A tuple per stage may be shorter than there are stages: its last entry then counts for the rest.
    mlp_widths: of gated MLPs (capital letters), rounded up to a multiple of 128; None: 8/3 width.
    rotary_dims: channels of a head that turn; None: all. windows: tokens seen to the left by
    attention, besides the token itself; None: all. state_dim, ssm_head_dim, expand, conv_kernel,
    num_groups: of the state spaces. targets: wanted compression of each stage that has another
    inside, N > 1. ratio_weight: of the loss that pulls towards them.
    capacity: how many chunks a training step has room for. Evaluation and decoding have room for
    all, unless mode is "demote" and demote_in_evaluation.
    learning_rates: a factor per stage for its parameters, embedding and head with stage 0's.
    """

    layout: str = '["m2", ["T4"], "m2"]'
    width: int = 128
    inner_widths: tuple[int, ...] = ()
    mlp_widths: tuple[int | None, ...] = (None,)
    num_heads: tuple[int, ...] = (4,)
    rotary_dims: tuple[int | None, ...] = (None,)
    windows: tuple[int | None, ...] = (None,)
    rotary_base: float = 10000.0
    state_dim: int = 128
    ssm_head_dim: int = 64
    expand: int = 2
    conv_kernel: int = 4
    num_groups: int = 1
    targets: tuple[float, ...] = (6.0,)
    ratio_weight: float = 0.03
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    demote_in_evaluation: bool = False
    learning_rates: tuple[float, ...] = (1.0,)
    initializer_range: float = 0.02
    norm_eps: float = 1e-5
    tied: bool = False
    remat: str = "none"

    def stages(self) -> tuple[StageLayout, ...]:
        """Raises ValueError that points into a malformed layout."""
        return parse_layout(self.layout, "model.layout").stages()

    def widths(self) -> tuple[int, ...]:
        """One per stage. Raises ValueError where they are not one per stage, or fall inwards."""
        inner = len(self.stages()) - 1
        if not self.inner_widths:
            return (self.width,) * (inner + 1)
        check_same_length("model.inner_widths", self.inner_widths, inner, "stage inside another")
        widths = (self.width, *self.inner_widths)
        if any(low > high for low, high in zip(widths, widths[1:], strict=False)):
            raise ValueError(f"model.inner_widths: got widths {widths}, expected none to fall")
        return widths

    def of_stage(self, name: str, stage: int) -> Any:
        """Entry `stage` of the tuple `name`, whose last entry counts for all that follow."""
        values = getattr(self, name)
        check_at_least(f"len(model.{name})", len(values), 1)
        return values[min(stage, len(values) - 1)]

    def mlp_width(self, stage: int) -> int:
        wanted = self.of_stage("mlp_widths", stage)
        wanted = 8 * self.widths()[stage] / 3 if wanted is None else wanted
        return -int(-wanted // MLP_MULTIPLE) * MLP_MULTIPLE

    def attention(self, stage: int) -> AttentionConfig:
        return AttentionConfig(
            num_heads=self.of_stage("num_heads", stage),
            rotary_dim=self.of_stage("rotary_dims", stage),
            rotary_base=self.rotary_base,
            window=self.of_stage("windows", stage),
            init_std=self.initializer_range,
        )

    def ssd(self) -> SSDConfig:
        return SSDConfig(
            expand=self.expand,
            head_dim=self.ssm_head_dim,
            state_dim=self.state_dim,
            num_groups=self.num_groups,
            kernel_size=self.conv_kernel,
            eps=self.norm_eps,
            init_std=self.initializer_range,
        )

    def learning_rate_factor(self, path: tuple[str, ...]) -> float:
        """Of the parameter at `path` in the model; the trainer asks."""
        return self.of_stage("learning_rates", path.count("inner"))

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "HNet":
        """Raises ValueError where a field does not fit another."""
        stages = len(self.stages())
        for stage in range(stages - 1):
            target = self.of_stage("targets", stage)
            if not target > 1:
                raise ValueError(f"model.targets: got {target}, expected a compression above 1")
        check_at_least("model.ratio_weight", self.ratio_weight, 0)
        return HNet(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)


class Trace(NamedTuple):
    """What a stage did besides its output: `Output`'s losses and metrics, outermost stage first."""

    losses: dict[str, jax.Array]
    metrics: dict[str, jax.Array]


class Isotropic(nnx.Module):
    """Blocks of one width and a norm at their end; the residual stream is float32."""

    def __init__(
        self,
        layers: str,
        config: HNetConfig,
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
    router: RouterState
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
        config: HNetConfig,
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
        self.router = Router(self.width, rngs=rngs)
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
        self, x: jax.Array, info: TokenInfo, *, capacity: Capacity, key: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[Boundaries, ...], Trace]:
        """(y, boundaries of this stage and all inside it, at this stage's tokens; losses)."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        encoded, _, _ = self.encoder(x, info, capacity=capacity, key=keys[0])
        found, _ = self.router(encoded, info)
        begins = demoted(found.begins, capacity) if capacity.mode == "demote" else found.begins
        ranks = chunk_positions(begins, info)[0]

        def inner(rows: jax.Array, info: TokenInfo) -> tuple[Any, Trace]:
            y, deeper, trace = self.inner(self._widen(rows), info, capacity=capacity, key=keys[1])
            return (y[..., : self.width], deeper), trace

        (chunks, deeper), trace, report = with_capacity(
            inner, encoded, info._replace(positions=ranks), found.begins, capacity
        )
        smooth, _ = dechunk(chunks, found.probability, begins, info)
        y = smooth * straight_through(found.confidence)[..., None] + self.residual(encoded)
        y, _, _ = self.decoder(y, info, capacity=capacity, key=keys[2])
        metrics = _merged(
            self._metrics(found, info), report.metrics(f"chunks_{self.stage}", capacity)
        )
        losses = {f"ratio_{self.stage}": self._ratio(found, info), **trace.losses}
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
        self, encoded: jax.Array, info: TokenInfo, state: StageState
    ) -> tuple[Boundaries, jax.Array, StageState]:
        """(boundaries after demotion, positions of chunks, the state with what was counted)."""
        found, router = self.router(encoded, info, state.router)
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
        smooth, smoothing = dechunk(chunks, found.probability, found.begins, info, state.smoothing)
        return smooth + self.residual(encoded), state._replace(smoothing=smoothing)

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: StageState
    ) -> tuple[jax.Array, StageState]:
        encoded, encoder = self.encoder.prefill(x, info, state.encoder)
        found, ranks, state = self._begin(encoded, info, state._replace(encoder=encoder))

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
        self, x_t: jax.Array, info: TokenInfo, state: StageState
    ) -> tuple[jax.Array, StageState]:
        encoded, encoder = self.encoder.step(x_t, info, state.encoder)
        one = TokenInfo(*(a[:, None] for a in info))
        found, ranks, state = self._begin(encoded[:, None], one, state._replace(encoder=encoder))
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


def make_stage(layout: StageLayout, config: HNetConfig, stage: int, height: int, **options: Any):
    """The innermost stage is one stack."""
    if layout.inner is None:
        return Isotropic(layout.encoder, config, stage, height + layout.height(), **options)
    return Stage(layout, config, stage, height, **options)


def chunk_positions(
    begins: jax.Array,
    info: TokenInfo,
    chunks: jax.Array | None = None,
    segment: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(the number of the chunk that each token is in, from 0 in its document; the next `chunks`).

    chunks, segment: [batch], chunks that the row's document `segment` had before these tokens.
    """
    runs, valid = runs_of_segments(info.segments)
    if chunks is None or segment is None:
        chunks = segment = jnp.zeros(len(begins), jnp.int32)
    first, _ = segments_at_ends(info)
    earlier = jnp.where(first == segment, chunks, 0)[:, None]
    total = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    # The first valid token of a document here: the run of the last valid one before is another.
    latest = jax.lax.cummax(jnp.where(valid, runs, -1), axis=1)
    opens = valid & (jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1) != runs)
    before = jax.lax.cummax(jnp.where(opens, total - begins, 0), axis=1)
    count = total - before + jnp.where(latest <= 0, earlier, 0)
    empty = ~jnp.any(valid, axis=1)
    return count - 1, jnp.where(empty, chunks, count[:, -1])


def _merged(one: dict[str, jax.Array], other: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Both; where both have a name, which is only "capacity_error", the sum."""
    both = {name: one[name] + other[name] for name in one.keys() & other.keys()}
    return {**one, **other, **both}


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


class HNet(LanguageModel):
    chooses = True

    def __init__(
        self,
        config: HNetConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        width, std = config.width, config.initializer_range
        self.capacity = config.capacity.build("model.capacity")
        self.demote = config.demote_in_evaluation
        self.ratio_weight = config.ratio_weight
        self.embedding = Embedding(vocab_size, width, init_std=1.0, dtype=dtype, rngs=rngs)
        layout = config.stages()[0]
        options: dict[str, Any] = {"sequence": sequence, "dtype": dtype, "rngs": rngs}
        self.stack = make_stage(layout, config, 0, 0, **options)
        self.final_norm = _as_it_is  # every stage ends with its own
        self.head = (
            None if config.tied else Head(width, vocab_size, init_std=std, dtype=dtype, rngs=rngs)
        )

    def _capacity(self, training: bool) -> Capacity:
        mode = self.capacity.mode
        if training or mode == "bucket" or (mode == "demote" and self.demote):
            return self.capacity
        return Capacity()

    def __call__(
        self, tokens: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, extra: Any = None
    ) -> Output:
        """tokens: int [batch, seq_len]. With a key it is a training step's pass."""
        capacity = self._capacity(training=key is not None)
        y, _, trace = self.stack(self._embed(tokens), info, capacity=capacity, key=key)
        # Weighted by tokens, which no parameter changes: a stage's own count would cost a pass.
        weight = jnp.sum(info.valid).astype(statistics_dtype(y.dtype))
        losses = {
            name: (self.ratio_weight * value * weight, weight)
            for name, value in trace.losses.items()
        }
        return Output(y, losses, trace.metrics, extra)

    def boundaries(self, tokens: jax.Array, info: TokenInfo) -> tuple[Boundaries, ...]:
        """Of every stage that has another inside, [batch, seq_len] at the bytes they stand at.

        Where a stage reads no byte, its probability is 0.
        """
        _, found, _ = self.stack(self._embed(tokens), info, capacity=Capacity())
        return found
