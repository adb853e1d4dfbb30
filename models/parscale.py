"""ParScale: one decoder read by several streams at once, which differ in what they start from.

Every layer gives each stream learned keys and values, or a learned state, before a document's
first token; all other weights are shared. A small perceptron weighs the streams' last hidden states
and the head reads their mean. Streams cost computation, hardly any parameters. Source: Chen et al.
2025, Parallel Scaling Law for Language Models (arXiv 2505.10475).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least
from effattn.models.transformer import TransformerConfig
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.mixer import Output, State
from effattn.nn.param import normal, parameter
from effattn.nn.start import Learned, Start
from effattn.nn.streams import Aggregation, fold, unfold
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class ParScaleConfig:
    """base: the config of any model that is a stack of blocks between an embedding and a head.

    streams: P of the paper. prefix_length: learned keys and values per attention layer and stream;
    0: none, nor learned states, which leaves one stream the base itself. smoothing: the share of
    the aggregation that is spread evenly, so that no stream is forgotten. start_std: of prefixes
    and states at first. freeze_base: train what ParScale adds, and nothing of the base.
    """

    # The field whose model's parameters `train.init_from` also takes, from a run of it alone.
    recycles = "base"

    base: Any = field(default_factory=TransformerConfig)
    streams: int = 2
    prefix_length: int = 48
    smoothing: float = 0.01  # the released code's default; the paper's text says 0.1
    start_std: float = 0.02
    init_std: float = 0.02  # of the aggregation
    freeze_base: bool = False

    @property
    def width(self) -> int:
        return self.base.width

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts of the model that the optimizer leaves alone."""
        return ("base",) if self.freeze_base else ()

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "ParScale":
        """Raises ValueError where a field is out of range or the base takes no streams."""
        check_at_least("model.streams", self.streams, 1)
        check_at_least("model.prefix_length", self.prefix_length, 0)
        if not 0 <= self.smoothing <= 1:
            raise ValueError(
                f"model.smoothing: got {self.smoothing}, expected between 0 and 1: a share"
            )
        if self.streams > 1 and self.prefix_length == 0:
            raise ValueError(
                f"model.prefix_length: got 0 with streams={self.streams}, expected at least 1: "
                "streams that start alike stay alike"
            )
        if self.freeze_base and self.streams == 1 and self.prefix_length == 0:
            raise ValueError("model.freeze_base: got True, but one stream without prefix adds none")
        return ParScale(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)

    def start_flops(self) -> int:
        """Per token and stream: what reads the learned keys and values, or the learned states."""
        if not self.prefix_length:
            return 0
        base = nnx.eval_shape(lambda: self.base.build(vocab_size=1, rngs=nnx.Rngs(params=0)))
        return sum(
            2 * repeats * learned.reads * math.prod(learned.shape)
            for repeats, shapes in start_shapes(base, self.prefix_length)
            for learned in shapes.values()
        )


class ParScale(nnx.Module):
    """starts: one per block of the base's stack, leaves [repeats, streams, ...]; none without
    prefixes. aggregation: None of one stream."""

    def __init__(
        self,
        config: ParScaleConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.streams, self.frozen = config.streams, config.freeze_base
        self.base = config.base.build(
            vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs
        )
        for name in ("causal", "decodes", "packs"):
            setattr(self, name, getattr(self.base, name, True))
        self.prefix_length = getattr(self.base, "prefix_length", 0)

        def learn(repeats: int, learned: Learned) -> nnx.Param:
            shape = (repeats, config.streams, *learned.shape)
            axes = ("layers", "streams", *learned.axes)
            return parameter(shape, axes, normal(config.start_std), rngs)

        self.starts: nnx.List[nnx.Dict] = nnx.List([])
        if config.prefix_length:
            for repeats, shapes in start_shapes(self.base, config.prefix_length):
                of_block = {name: learn(repeats, learned) for name, learned in shapes.items()}
                self.starts.append(nnx.Dict(of_block))
        self.aggregation = (
            None
            if config.streams == 1
            else Aggregation(
                config.width,
                config.streams,
                smoothing=config.smoothing,
                init_std=config.init_std,
                dtype=dtype,
                rngs=rngs,
            )
        )

    def _shared(self) -> LanguageModel:
        """The base; without gradients where it is frozen, so that they cost nothing."""
        return jax.tree.map(jax.lax.stop_gradient, self.base) if self.frozen else self.base

    def _arguments(self) -> tuple[dict[str, Start], ...] | None:
        """For the stack: what the documents of every block start from."""
        if not len(self.starts):
            return None
        starts = [{name: value[...] for name, value in start.items()} for start in self.starts]
        return tuple({"start": start} if start else {} for start in starts)

    def _joined(self, base: LanguageModel, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The stack's output [streams * batch, ...] -> (hidden [batch, ...], streams' weights)."""
        hidden = base.final_norm(x)
        if self.aggregation is None:
            return hidden, None
        return self.aggregation(unfold(hidden, self.streams))

    def __call__(
        self, tokens: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, extra: Any = None
    ) -> Output:
        """tokens: int [batch, seq_len]. metrics: least_stream, the mean weight of the stream that
        has the smallest, times the number of streams: 1 where all count alike."""
        base = self._shared()
        x = fold(base._embed(tokens), self.streams)
        rows = fold(info, self.streams)
        x, _ = base.stack(x, rows, key=key, arguments=self._arguments())
        hidden, weights = self._joined(base, x)
        metrics = {}
        if weights is not None:
            share = jnp.sum(jnp.where(info.valid[..., None], weights, 0), axis=(0, 1))
            count = jnp.maximum(jnp.sum(info.valid), 1)
            metrics["least_stream"] = self.streams * jnp.min(share) / count
        return Output(hidden, losses={}, metrics=metrics, extra=extra)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., width] -> float32 [..., vocab_size]; once, not per stream."""
        return self._shared().logits(hidden)

    # ---- decoding

    def init_state(self, batch: int, max_len: int, dtype: Any = jnp.float32) -> State:
        """Of streams * batch rows, stream-major; prefixes are parameters and take no room in it."""
        return self.base.init_state(self.streams * batch, max_len, dtype)

    def prefill(self, tokens: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        """(logits [batch, seq_len, vocab_size], state)."""
        base, rows = self._shared(), fold(info, self.streams)
        x = fold(base._embed(tokens), self.streams)
        x, state = base.stack.prefill(x, rows, state, arguments=self._arguments())
        return base.logits(self._joined(base, x)[0]), state

    def step(self, token: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        """token and info's fields: [batch]. (logits [batch, vocab_size], state)."""
        base, rows = self._shared(), fold(info, self.streams)
        x = fold(base._embed(token), self.streams)
        x, state = base.stack.step(x, rows, state, arguments=self._arguments())
        return base.logits(self._joined(base, x)[0]), state


def start_shapes(base: Any, length: int) -> list[tuple[int, dict[str, Learned]]]:
    """(repeats, what a document starts from) per block of the base's stack.

    Raises ValueError for a model without a stack of blocks, and for one none of whose layers can
    start from anything: its streams would be the same.
    """
    if not isinstance(base, LanguageModel) or not isinstance(base.stack, Stack):
        raise ValueError(
            f"model.base: got {type(base).__name__}, expected a model that is one stack of blocks "
            "between an embedding and a head"
        )
    repeats = [group.repeats for group in base.stack.plan for _ in group.pattern]
    found = []
    for count, block in zip(repeats, base.stack.blocks, strict=True):
        shapes = getattr(block.mixer, "start_shapes", None)
        found.append((count, {} if shapes is None else shapes(length)))
    if not any(shapes for _, shapes in found):
        raise ValueError(
            f"model.base: none of the layers of {type(base).__name__} takes learned keys and "
            "values or a learned state, so its streams would be the same"
        )
    return found
