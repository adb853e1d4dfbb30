"""H-Net: a byte model that learns where its own tokens begin, and runs its main part on those.

Encoder on bytes, a router that cuts them into chunks, a wider stage on the chunks' first vectors
(which may be such a model again), chunks smoothed and laid back on their bytes, decoder on bytes.
Source: Hwang, Wang and Gu 2025 (arXiv 2507.07955) and its released code. We differ: the moving
average and the router are float32, means of the ratio loss leave padding out, norms and the rates
of the state spaces get no weight decay, the residual projection's bias starts at zero.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_in, check_same_length
from effattn.nn.chunking import Boundaries
from effattn.nn.compact import Capacity, CapacityConfig
from effattn.nn.hierarchy import Stage, make_stage
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import Embedding, Head, statistics_dtype
from effattn.nn.layout import StageLayout, parse_layout
from effattn.nn.mixer import Output, State
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.mixers.ssd import SSDConfig
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
    inside, N > 1. ratio_weight: of the loss that pulls towards them. segmenter: "learned", or
    "words" for chunks of the outermost stage by rule, of longest_word bytes at most.
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
    segmenter: str = "learned"
    longest_word: int = 16
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
        check_in("model.segmenter", self.segmenter, ("learned", "words"))
        check_at_least("model.longest_word", self.longest_word, 1)
        return HNet(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)


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
        embedded = self._embed(tokens)
        y, _, trace = self.stack(embedded, info, capacity=capacity, key=key, **self._bytes(tokens))
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
        embedded = self._embed(tokens)
        _, found, _ = self.stack(embedded, info, capacity=Capacity(), **self._bytes(tokens))
        return found

    def _bytes(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """What the outermost stage gets besides embeddings; a layout of one stack cuts nothing."""
        return {"tokens": tokens} if isinstance(self.stack, Stage) else {}

    def prefill(self, tokens: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        """(logits [batch, seq_len, vocab_size], state)."""
        y, state = self.stack.prefill(self._embed(tokens), info, state, **self._bytes(tokens))
        return self.logits(y), state

    def step(self, token: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        """token and info's fields: [batch]. (logits [batch, vocab_size], state)."""
        y, state = self.stack.step(self._embed(token), info, state, **self._bytes(token))
        return self.logits(y), state
