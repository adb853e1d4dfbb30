"""Text from a model: prompts of unequal length are read in chunks, then tokens follow in blocks.

One dispatch samples a block of tokens in a `jax.lax.scan`; between blocks the host looks for stop
strings and streams text. Every row has its own random key and its own positions, so what a row
says does not depend on its neighbours.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effattn.batch import TokenInfo, whole_rows
from effattn.checks import check_at_least

BLOCK = 16  # tokens per dispatch: enough to hide the dispatch, few enough to stream smoothly
# Shapes are rounded up, so that prompts of about one length share their compiled programs.
PREFILL_CHUNK, SHORTEST_CHUNK, LENGTH_STEP = 256, 16, 64


class TextCodec(Protocol):
    """What is read of a tokenizer (see effattn.data.tokenizer)."""

    end_of_document: int

    def decode(self, ids: Any) -> bytes: ...


class Completion(NamedTuple):
    """tokens: the new ones. text: theirs, cut before a stop string; empty without a tokenizer.

    reason: why the row ended: "stop" string, "end" of document, max_new_tokens as "length", or
    "context".
    """

    tokens: list[int]
    text: bytes
    reason: str


class Generation(NamedTuple):
    """completions: one per prompt. state_bytes: the decoding state of all rows.

    tokens_per_second: new tokens of all rows over the time of the blocks after the first, which
    compiles; None where there was only one.
    """

    completions: list[Completion]
    state_bytes: int
    tokens_per_second: float | None


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    context: int | None = None,
    tokenizer: TextCodec | None = None,
    dtype: Any = jnp.float32,
    on_text: Callable[[int, bytes], None] | None = None,
) -> Generation:
    """Continues every prompt by up to max_new_tokens tokens.

    model: an nnx.Module with the Model protocol; dtype: of its cached activations. temperature 0
    takes the most likely token; otherwise a token is drawn from softmax(logits / temperature), cut
    to the top_k most likely ones and then to the smallest set that holds a share top_p of what
    remains. Row i draws with the key of `seed + i`. context: the most tokens a row may hold, prompt
    included; None: no limit. With a tokenizer a row also ends at a `stop` string, which may span
    tokens, and at the end of a document; on_text(row, bytes) gets text as soon as it is certain.
    Raises ValueError for an argument out of range, a prompt that leaves no room in the context and
    a model that cannot decode, FloatingPointError where logits are not finite.
    """
    if not getattr(model, "decodes", True):
        raise ValueError(
            f"model: got {type(model).__name__} with decodes=False, expected one that can go on "
            "token by token: what it says of a token depends on later ones"
        )
    check_sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        seed=seed,
    )
    _check_prompts(prompts, context)
    if stop and tokenizer is None:
        raise ValueError("stop: a stop string needs a tokenizer")
    graphdef, weights = nnx.split(model)
    params, place = _place(nnx.to_pure_dict(weights))
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    block = min(BLOCK, _power_of_two(max_new_tokens))
    room = -(-max_new_tokens // block) * block
    max_len = -(-(int(lengths.max()) + room) // LENGTH_STEP) * LENGTH_STEP
    state = _start(graphdef, params, rows=len(prompts), max_len=max_len, dtype=jnp.dtype(dtype))
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    prefix = getattr(model, "prefix_length", 0)
    logits, state = _read_prompts(graphdef, params, prompts, lengths, state, prefix)
    draw = _Draw(
        keys=jax.vmap(jax.random.key)(jnp.arange(len(prompts), dtype=jnp.uint32) + np.uint32(seed)),
        temperature=jnp.float32(temperature if temperature > 0 else 1.0),
        top_p=jnp.float32(top_p),
    )
    position, draw = place(jnp.asarray(lengths)), place(draw)
    rule = _Rule(
        greedy=temperature == 0,
        top_k=None if top_k is None else min(top_k, logits.shape[-1]),
        nucleus=top_p < 1,
    )
    if max(max(prompt) for prompt in prompts) >= logits.shape[-1]:
        raise ValueError(f"prompts: got a token id beyond the vocabulary of {logits.shape[-1]}")
    token = _sample(logits, draw, position, rule=rule)

    limits = [max_new_tokens] * len(prompts)
    if context is not None:
        limits = [min(max_new_tokens, context - int(length)) for length in lengths]
    rows = [
        _Row(prompt, limit, "length" if limit == max_new_tokens else "context", tokenizer, stop)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    finite = jnp.isfinite(logits).all()
    kept, began = 0, None
    for _ in range(room // block):
        token, position, state, tokens, finite = _decode_block(
            graphdef, params, state, token, position, finite, draw, length=block, rule=rule
        )
        new, healthy = jax.device_get((tokens, finite))
        if not healthy:
            raise FloatingPointError(
                "generate: the model's logits are not finite; its parameters have overflowed"
            )
        before = sum(len(row.tokens) for row in rows)
        for index, row in enumerate(rows):
            piece = row.add(new[:, index].tolist())
            if piece and on_text is not None:
                on_text(index, piece)
        if began is None:
            began = time.perf_counter()
        else:
            kept += sum(len(row.tokens) for row in rows) - before
        if all(row.reason is not None for row in rows):
            break
    seconds = time.perf_counter() - (began if began is not None else time.perf_counter())
    return Generation(
        completions=[row.completion() for row in rows],
        state_bytes=state_bytes,
        tokens_per_second=kept / seconds if kept else None,
    )


def read_twice(document: Sequence[int], question: Sequence[int], *, times: int = 2) -> list[int]:
    """JRT-Prompt: the document and the question, `times` times over.

    A recurrent model that has met the question knows in the second reading what to remember. For
    any causal model. Source: Arora et al. 2024, Just read twice (arXiv 2407.05483), section 3.
    """
    check_at_least("times", times, 1)
    return [*document, *question] * times


def check_sampling(
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    stop: Sequence[str],
    seed: int,
) -> None:
    """Raises ValueError for an argument of `generate` that is out of range."""
    check_at_least("max_new_tokens", max_new_tokens, 1)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: got {temperature}, expected a finite number >= 0")
    if top_k is not None:
        check_at_least("top_k", top_k, 1)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected more than 0 and at most 1")
    if not all(stop):
        raise ValueError("stop: got an empty string, which would stop before the first token")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, expected 0 <= seed < 2 ** 32")


def _check_prompts(prompts: Sequence[Sequence[int]], context: int | None) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: expected at least one, each with at least one token")
    if min(min(prompt) for prompt in prompts) < 0:
        raise ValueError("prompts: got a negative token id")
    longest = max(len(prompt) for prompt in prompts)
    if context is not None and longest >= context:
        raise ValueError(
            f"prompts: the longest has {longest} tokens, which leaves no room to generate in a "
            f"context of {context}"
        )


def _power_of_two(number: int) -> int:
    """The least power of two that is at least `number`: few lengths, few compilations."""
    return 1 << (number - 1).bit_length()


# ---- on the device


class _Draw(NamedTuple):
    """keys: [rows], one per row; temperature, top_p: scalars."""

    keys: jax.Array
    temperature: jax.Array
    top_p: jax.Array


class _Rule(NamedTuple):
    """The parts of sampling that are compiled in. top_k is at most the vocabulary's size."""

    greedy: bool
    top_k: int | None
    nucleus: bool


def _place(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """(parameters, what puts other arrays beside them).

    On one device nothing stays on a mesh: the first block's arrays would be placed unlike those
    that it hands to the second, which would compile again.
    """
    devices = {d for leaf in jax.tree.leaves(params) for d in leaf.sharding.device_set}
    if len(devices) > 1:
        return params, lambda tree: tree
    place = partial(jax.device_put, device=devices.pop())
    return place(params), place


@partial(jax.jit, static_argnames=("graphdef", "rows", "max_len", "dtype"))
def _start(graphdef: nnx.GraphDef, params: Any, *, rows: int, max_len: int, dtype: Any) -> Any:
    return nnx.merge(graphdef, params).init_state(rows, max_len, dtype)


def _read_prompts(
    graphdef: nnx.GraphDef,
    params: Any,
    prompts: Sequence[Sequence[int]],
    lengths: np.ndarray,
    state: Any,
    prefix: int,
) -> tuple[jax.Array, Any]:
    """(logits [rows, vocab] after each prompt's last token, state).

    prefix: tokens that the model wants in one piece.
    """
    longest = int(lengths.max())
    chunk = min(max(PREFILL_CHUNK, prefix), max(SHORTEST_CHUNK, _power_of_two(longest)))
    tokens = np.zeros((len(prompts), -(-longest // chunk) * chunk), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    info = jax.device_get(whole_rows(tokens, lengths))
    logits = None
    for first in range(0, tokens.shape[1], chunk):
        part = slice(first, first + chunk)
        last = lengths - 1 - first  # of each row, in this chunk's numbering
        part_info = TokenInfo(*(field[:, part] for field in info))
        new, state = _prefill(graphdef, params, state, tokens[:, part], part_info, last)
        logits = new if logits is None else jnp.where((last >= 0)[:, None], new, logits)
    assert logits is not None
    return logits, state


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def _prefill(
    graphdef: nnx.GraphDef,
    params: Any,
    state: Any,
    tokens: jax.Array,
    info: TokenInfo,
    last: jax.Array,
) -> tuple[jax.Array, Any]:
    """(logits [rows, vocab] at token `last` of each row, wherever it is in the chunk; state)."""
    logits, state = nnx.merge(graphdef, params).prefill(tokens, info, state)
    last = jnp.clip(last, 0, tokens.shape[1] - 1)
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], state


@partial(
    jax.jit,
    static_argnames=("graphdef", "length", "rule"),
    donate_argnames=("state",),
)
def _decode_block(
    graphdef: nnx.GraphDef,
    params: Any,
    state: Any,
    token: jax.Array,
    position: jax.Array,
    finite: jax.Array,
    draw: _Draw,
    *,
    length: int,
    rule: _Rule,
) -> tuple[jax.Array, jax.Array, Any, jax.Array, jax.Array]:
    """Feeds `token` [rows] at `position` and samples `length` times.

    Returns (next token, its position, state, the tokens fed [length, rows], whether `finite` holds
    and every logit met was finite).
    """
    model = nnx.merge(graphdef, params)
    ones = jnp.ones_like(position)

    def body(carry: tuple[Any, jax.Array, jax.Array, jax.Array], _: None) -> tuple[Any, jax.Array]:
        state, token, position, finite = carry
        info = TokenInfo(position, ones, ones.astype(bool))
        logits, state = model.step(token, info, state)
        new = _sample(logits, draw, position + 1, rule=rule)
        finite = finite & jnp.isfinite(logits).all()
        return (state, new, position + 1, finite), token

    carry = (state, token, position, finite)
    (state, token, position, finite), tokens = jax.lax.scan(body, carry, length=length)
    return token, position, state, tokens, finite


@partial(jax.jit, static_argnames=("rule",))
def _sample(logits: jax.Array, draw: _Draw, position: jax.Array, *, rule: _Rule) -> jax.Array:
    """Token ids [rows] for `position`, from logits [rows, vocab]."""
    if rule.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / draw.temperature.astype(logits.dtype)
    keys = jax.vmap(jax.random.fold_in)(draw.keys, position)
    if rule.top_k is None and not rule.nucleus:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    # Sorted, ties by token id: exactly top_k tokens stay, and top_k = 1 is the argmax.
    kept, ids = jax.lax.top_k(logits, logits.shape[-1] if rule.top_k is None else rule.top_k)
    if rule.nucleus:
        share = jax.nn.softmax(kept, axis=-1)
        more_likely = jnp.cumsum(share, axis=-1) - share
        kept = jnp.where(more_likely < draw.top_p.astype(share.dtype), kept, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


# ---- on the host


class _Row:
    """The new tokens of one row, their text, and whether and why the row has ended."""

    def __init__(
        self,
        prompt: Sequence[int],
        limit: int,
        reason_at_limit: str,
        tokenizer: TextCodec | None,
        stop: Sequence[str],
    ):
        self.tokens: list[int] = []
        self.text = b""
        self.reason: str | None = None
        self._prompt, self._tokenizer = list(prompt), tokenizer
        self._limit, self._reason_at_limit = limit, reason_at_limit
        self._stops = [entry.encode() for entry in stop]
        self._given = 0  # bytes of text that were handed out
        # Text is what decoding adds to the prompt's: alone, some tokenizers drop a leading space.
        self._prompt_bytes = len(tokenizer.decode(self._prompt)) if tokenizer is not None else 0

    def _decode(self, tokens: list[int]) -> bytes:
        assert self._tokenizer is not None
        return self._tokenizer.decode(self._prompt + tokens)[self._prompt_bytes :]

    def add(self, new: list[int]) -> bytes:
        """Takes a block of tokens; returns the text that no later token can change."""
        if self.reason is not None:
            return b""
        before = len(self.tokens)
        if self._tokenizer is not None and self._tokenizer.end_of_document in new:
            new = new[: new.index(self._tokenizer.end_of_document) + 1]
            self.reason = "end"
        if before + len(new) >= self._limit:
            # The end of the document may be the last token allowed.
            if before + len(new) > self._limit or self.reason is None:
                self.reason = self._reason_at_limit
            new = new[: self._limit - before]
        self.tokens += new
        if self._tokenizer is None:
            return b""
        self.text = self._decode(self.tokens)
        if any(entry in self.text for entry in self._stops):
            self._stop_in_block(before)
        certain = len(self.text) if self.reason is not None else self._certain()
        piece = self.text[self._given : certain]
        self._given = max(self._given, certain)
        return piece

    def _stop_in_block(self, before: int) -> None:
        """Keeps the tokens up to the one that completes the first stop string."""
        for count in range(before + 1, len(self.tokens) + 1):
            text = self._decode(self.tokens[:count])
            found = [text.find(entry) for entry in self._stops if entry in text]
            if found:
                self.tokens, self.text, self.reason = (
                    self.tokens[:count],
                    text[: min(found)],
                    "stop",
                )
                return

    def _certain(self) -> int:
        """Length of the text less what may turn out to be a stop string or half a character."""
        certain = len(self.text)
        # A tokenizer shows an unfinished character as U+FFFD until its last byte is there.
        while self.text[:certain].endswith("\ufffd".encode()):
            certain -= 3
        for entry in self._stops:
            for length in range(min(len(entry) - 1, len(self.text)), 0, -1):
                if self.text.endswith(entry[:length]):
                    certain = min(certain, len(self.text) - length)
                    break
        return certain

    def completion(self) -> Completion:
        assert self.reason is not None
        return Completion(self.tokens, self.text, self.reason)
