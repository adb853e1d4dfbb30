"""Word-pooled models: words of bytes become vectors, a backbone reads them, bytes are decoded.

Words are cut by a rule, at white space and after longest_word bytes (`WordRouter`): none is cut
off. A word's bytes see each other in the encoder and become one vector; the backbone reads the
words; what it says of the words so far is added to the first byte of the next, whose bytes the
decoder reads in order. Source: Neitemeier et al. 2025, Hierarchical Autoregressive Transformers
(arXiv 2501.10322); Thawani et al. 2023, Learn Your Tokens (arXiv 2310.11628), for several slots
per word. Where we differ: words begin with their space, which thus says that the word before it
has ended, so no symbol for the end of a word is predicted; a word's slots are queries of one
pooling layer over the encoder's bytes, and become one vector; the backbone's output is added to
the first byte and is no token of its own.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_multiple
from effattn.masks import Full
from effattn.nn.block import Block
from effattn.nn.chunking import WordRouter, WordState, chunk_positions
from effattn.nn.compact import Capacity, CapacityConfig, CapacityReport, with_capacity
from effattn.nn.decoder import Stack
from effattn.nn.layers import Embedding, GatedMLP, Head, RMSNorm, gated_mlp_width, statistics_dtype
from effattn.nn.mixer import Output, State
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.param import Dense, normal, parameter
from effattn.parallel.mesh import constrain_rows
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class WordPooledConfig:
    """width, num_heads: of bytes, in encoder and decoder; backbone_*: of words. mlp widths: 8/3
    width, rounded up to a multiple of 64.

    longest_word: bytes after which a word is cut in two. cls_slots: queries that pool a word, 1 as
    in Hierarchical Autoregressive Transformers, 4 as in Learn Your Tokens. capacity: how words are
    compacted, see `effattn.nn.compact`. bytes_per_word: what FLOP counts reckon with. remat: none |
    dots | names | full | offload.

    Words move within a row: over a sequence axis XLA gathers what attention reads.
    """

    encoder_layers: int = 4
    num_layers: int = 12
    decoder_layers: int = 4
    width: int = 512
    num_heads: int = 8
    backbone_width: int = 1024
    backbone_heads: int = 16
    longest_word: int = 24
    cls_slots: int = 1
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    bytes_per_word: float = 5.0
    rotary_base: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tied: bool = True
    remat: str = "none"

    def flops_by_part(
        self, *, vocab_size: int, seq_len: int
    ) -> tuple[tuple[str, int, str, float], ...]:
        """Per byte, with words of bytes_per_word each; see flops.py."""
        byte, word, length = self.width, self.backbone_width, self.bytes_per_word
        rows: list[tuple[str, int, str, float]] = []
        # name, layers, width, keys that a token sees, bytes per token
        for name, layers, width, seen, stands_for in (
            ("encoder", self.encoder_layers, byte, length, 1.0),
            ("backbone", self.num_layers, word, (seq_len / length + 1) / 2, length),
            ("decoder", self.decoder_layers, byte, (length + 1) / 2, 1.0),
        ):
            each = layers * 2 * width / stands_for
            rows.append((name, layers, "projections", each * 4 * width))
            rows.append((name, layers, "pairs", each * 2 * seen))
            rows.append((name, layers, "mlp", each * 3 * gated_mlp_width(width)))
        pooling = 2 * byte * byte + 4 * byte * self.cls_slots
        between = 2 * byte * word * (self.cls_slots + 1) / length
        rows += [("words", 1, "pooling", pooling), ("words", 1, "projections", between)]
        return (*rows, ("head", 1, "logits", 2 * byte * vocab_size))

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "WordPooled":
        """Raises ValueError where a field does not fit another."""
        for name in ("encoder_layers", "num_layers", "decoder_layers", "longest_word", "cls_slots"):
            check_at_least(f"model.{name}", getattr(self, name), 1)
        check_multiple("model.width", self.width, "model.num_heads", self.num_heads)
        heads = "model.backbone_heads", self.backbone_heads
        check_multiple("model.backbone_width", self.backbone_width, *heads)
        capacity = self.capacity.build("model.capacity")
        options = {"capacity": capacity, "sequence": sequence.local, "dtype": dtype, "rngs": rngs}
        return WordPooled(self, vocab_size=vocab_size, **options)


class WordPooledState(NamedTuple):
    """What a row knows between calls.

    router: where words begin. word: int32 [batch], number of the current word in the row, from 1;
    0: none yet. chunks: [batch], words of the current document. tokens: [batch, longest_word], the
    bytes of the current word so far, of which `length` [batch] are there.
    """

    router: WordState
    word: jax.Array
    chunks: jax.Array
    tokens: jax.Array
    length: jax.Array
    backbone: State
    decoder: State


class WordPooled(nnx.Module):
    def __init__(
        self,
        config: WordPooledConfig,
        *,
        vocab_size: int,
        capacity: Capacity,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        width, wide, std = config.width, config.backbone_width, config.initializer_range
        self.longest, self.slots, self.capacity = config.longest_word, config.cls_slots, capacity
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}

        def stack(layers: int, width: int, heads: int, kind: str) -> Stack:
            stds: dict[str, Any] = {"init_std": std, "out_init_std": std / (2 * layers) ** 0.5}
            attention = AttentionConfig(num_heads=heads, rotary_base=config.rotary_base, **stds)
            if kind == "decoder":  # which needs no longer memory than a word
                attention.window = config.longest_word - 1

            def block(name: str, rngs: nnx.Rngs) -> Block:
                mixer = attention.build(width, sequence=sequence, dtype=dtype, rngs=rngs)
                if kind == "encoder":
                    mixer.mask = Full()
                mlp = GatedMLP(width, gated_mlp_width(width), **stds, dtype=dtype, rngs=rngs)
                norms = [
                    RMSNorm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs) for _ in range(2)
                ]
                return Block(mixer, mlp, *norms)

            return Stack((kind,) * layers, block, remat=config.remat, rngs=rngs)

        def norm(width: int) -> RMSNorm:
            return RMSNorm(width, eps=config.norm_eps, **options)

        def dense(fan_in: int, fan_out: int) -> Dense:
            return Dense(fan_in, fan_out, (None, "embed"), init=normal(std), **options)

        self.embedding = Embedding(vocab_size, width, init_std=std, **options)
        self.router = WordRouter(config.longest_word)
        self.encoder = stack(config.encoder_layers, width, config.num_heads, "encoder")
        self.encoder_norm = norm(width)
        self.pool_query = parameter((config.cls_slots, width), (None, "embed"), normal(std), rngs)
        self.pool_value = dense(width, width)
        self.to_backbone = dense(config.cls_slots * width, wide)
        self.start = parameter((wide,), ("embed",), normal(std), rngs)
        self.backbone = stack(config.num_layers, wide, config.backbone_heads, "backbone")
        self.backbone_norm = norm(wide)
        self.to_decoder = dense(wide, width)
        self.decoder = stack(config.decoder_layers, width, config.num_heads, "decoder")
        self.final_norm = norm(width)
        self.head = None if config.tied else Head(width, vocab_size, init_std=std, **options)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        return x.astype(statistics_dtype(x.dtype))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., width] -> float32 [..., vocab_size]."""
        head = self.embedding if self.head is None else self.head
        return head.logits(hidden)

    def _encode(self, tokens: jax.Array, words: jax.Array, first: jax.Array) -> jax.Array:
        """The vector of every word, [batch, words, backbone_width], from `first` [batch] on.

        words: int32 [batch, seq_len], the number of the word of each byte, 0 for padding; a word's
        bytes follow one another. At most seq_len words, of which none is numbered below `first`.
        """
        info = in_words(words)
        x, _ = self.encoder(self._embed(tokens), info)
        x = self.encoder_norm(x)
        value = self.pool_value(x)
        wide = statistics_dtype(x.dtype)
        scores = (x.astype(wide) @ self.pool_query[...].T) * x.shape[-1] ** -0.5
        size = tokens.shape[1]
        place = jnp.where(info.valid, words - first[:, None], size)  # padding is in no word

        def pool(scores: jax.Array, value: jax.Array, place: jax.Array) -> jax.Array:
            """One row: [seq_len, slots], [seq_len, width] -> [seq_len, slots * width], of words."""
            largest = jax.ops.segment_max(jax.lax.stop_gradient(scores), place, size + 1)
            weights = jnp.exp(scores - largest[place])
            total = jax.ops.segment_sum(weights, place, size + 1)
            weights = (weights / total[place]).astype(value.dtype)
            pooled = jax.ops.segment_sum(weights[..., None] * value[:, None], place, size + 1)
            return pooled[:size].reshape(size, -1)

        return self.to_backbone(jax.vmap(pool)(scores, value, place))

    def _words(
        self,
        tokens: jax.Array,
        info: TokenInfo,
        state: WordPooledState | None,
        capacity: Capacity = Capacity(),  # noqa: B008 - a named tuple
    ) -> tuple[jax.Array, jax.Array, Any, CapacityReport]:
        """(what the backbone says where a word begins, 0 elsewhere [batch, seq_len, width]; the
        word of each byte; the state but for the decoder's; report)."""
        batch, length = tokens.shape
        found, router = self.router(tokens, info, None if state is None else state.router)
        begins = found.begins
        earlier = jnp.zeros((batch,), jnp.int32) if state is None else state.word
        numbers = earlier[:, None] + jnp.cumsum(begins, axis=1, dtype=jnp.int32)
        words = jnp.where(info.segments != 0, numbers, 0)
        if state is None:
            ranks, chunks = chunk_positions(begins, info)
            all_tokens, all_words, before = tokens, words, 0
        else:
            ranks, chunks = chunk_positions(begins, info, state.chunks, state.router.segment)
            # The current word's bytes so far come first: the word is encoded whole.
            there = jnp.arange(self.longest) < state.length[:, None]
            all_tokens = jnp.concatenate([state.tokens, tokens], axis=1)
            all_words = jnp.concatenate([jnp.where(there, earlier[:, None], 0), words], axis=1)
            before = self.longest

        def read(backbone: State) -> tuple[jax.Array, State, CapacityReport]:
            # Rows are whole: the partitioner of jaxlib 0.11.2 ends the process over the look-up
            # where words and channels lie over devices.
            vectors = constrain_rows(self._encode(all_tokens, all_words, earlier))
            row = jnp.arange(batch)[:, None]
            last = vectors[row, jnp.maximum(words - 1 - earlier[:, None], 0)]
            # A document's first word has none before it.
            last = jnp.where((ranks > 0)[..., None], last, self.start[...].astype(last.dtype))

            def inner(x: jax.Array, info: TokenInfo) -> tuple[jax.Array, State]:
                x = x.astype(statistics_dtype(x.dtype))
                if state is None:
                    y, after = self.backbone(x, info)[0], None
                else:
                    y, after = self.backbone.prefill(x, info, backbone)
                return self.to_decoder(self.backbone_norm(y)), after

            of_words = info._replace(positions=ranks)
            return with_capacity(inner, last, of_words, begins, capacity)

        if state is None:
            said, _, report = read(None)
            return said, words, None, report
        nothing = jax.eval_shape(read, state.backbone)
        said, backbone, report = jax.lax.cond(
            jnp.any(begins),
            read,
            lambda backbone: (
                jnp.zeros(nothing[0].shape, nothing[0].dtype),
                backbone,
                jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), nothing[2]),
            ),
            state.backbone,
        )
        word = earlier + jnp.sum(begins, axis=1, dtype=jnp.int32)
        own = (all_words == word[:, None]) & (all_words != 0)
        rank = jnp.cumsum(own, axis=1, dtype=jnp.int32)
        slot = jnp.where(own, rank - 1, before)
        kept = (
            jnp.zeros_like(state.tokens)
            .at[jnp.arange(batch)[:, None], slot]
            .set(all_tokens, mode="drop")
        )
        after = state._replace(
            router=router,
            word=word,
            chunks=chunks,
            tokens=kept,
            length=rank[:, -1],
            backbone=backbone,
        )
        return said, words, after, report

    def __call__(
        self, tokens: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, extra: Any = None
    ) -> Output:
        """tokens: int [batch, seq_len], bytes. Without a key it is no training step: no word is
        demoted, and none is too many."""
        training = key is not None or self.capacity.mode == "bucket"
        capacity = self.capacity if training else Capacity()
        said, words, _, report = self._words(tokens, info, None, capacity)
        x, _ = self.decoder(self._embed(tokens) + said, in_words(words), key=key)
        count = jnp.sum(info.valid).astype(jnp.float32)
        metrics = report.metrics("words", capacity)
        metrics["bytes_per_word"] = count / jnp.maximum(report.kept, 1)
        return Output(self.final_norm(x), {}, metrics, extra)

    def init_state(self, batch: int, max_len: int, dtype: Any = jnp.float32) -> WordPooledState:
        none = jnp.zeros((batch,), jnp.int32)
        return WordPooledState(
            router=self.router.init_state(batch, 0, dtype),
            word=none,
            chunks=none,
            tokens=jnp.zeros((batch, self.longest), jnp.int32),
            length=none,
            backbone=self.backbone.init_state(batch, max_len, dtype),
            decoder=self.decoder.init_state(batch, self.longest, dtype),
        )

    def prefill(
        self, tokens: jax.Array, info: TokenInfo, state: WordPooledState
    ) -> tuple[jax.Array, WordPooledState]:
        """(logits [batch, seq_len, vocab_size], state)."""
        earlier, length = state.word, state.length
        said, words, state, _ = self._words(tokens, info, state)
        inside = in_words(words, earlier, length)
        x, decoder = self.decoder.prefill(self._embed(tokens) + said, inside, state.decoder)
        return self.logits(self.final_norm(x)), state._replace(decoder=decoder)

    def step(
        self, token: jax.Array, info: TokenInfo, state: WordPooledState
    ) -> tuple[jax.Array, WordPooledState]:
        """token and info's fields: [batch]. Encoder and backbone run where any row begins a word.

        (logits [batch, vocab_size], state).
        """
        one = TokenInfo(*(field[:, None] for field in info))
        earlier, length = state.word, state.length
        said, words, state, _ = self._words(token[:, None], one, state)
        inside = TokenInfo(*(field[:, 0] for field in in_words(words, earlier, length)))
        x = (self._embed(token[:, None]) + said)[:, 0]
        x, decoder = self.decoder.step(x, inside, state.decoder)
        return self.logits(self.final_norm(x)), state._replace(decoder=decoder)


def in_words(
    words: jax.Array, current: jax.Array | None = None, length: jax.Array | None = None
) -> TokenInfo:
    """Every word as a document of its own. words: int32 [batch, seq_len], 0 for padding.

    current, length: [batch], a word of which so many bytes came before.
    """
    valid = words != 0
    index = jnp.broadcast_to(jnp.arange(words.shape[1], dtype=jnp.int32), words.shape)
    # Padding may stand between two bytes of a word, so places count what is valid.
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    latest = jax.lax.cummax(jnp.where(valid, index, -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(words, jnp.maximum(before, 0), axis=1)
    opens = valid & ((before < 0) | (previous != words))
    start = jax.lax.cummax(jnp.where(opens, rank, 0), axis=1)
    positions = rank - start
    if current is not None and length is not None:
        positions = positions + jnp.where(words == current[:, None], length[:, None], 0)
    return TokenInfo(jnp.where(valid, positions, 0), words, valid)
