"""What a sequence mixer and a model are: the protocols that layers, laws and trainers rely on.

State is a value: `init_state` makes it, `prefill` and `step` take it and return the next one.
"""

from typing import Any, NamedTuple, Protocol

import jax

from effattn.batch import TokenInfo

State = Any


class Output(NamedTuple):
    """What a model's `__call__` returns.

    hidden: [batch, seq_len, width], after the final norm; `model.logits` takes any part of it.
    losses: name -> (sum, weight), so that microbatches and shards add up exactly.
    metrics: name -> scalar. extra: untrained state that a later call gets back, or None.
    """

    hidden: jax.Array
    losses: dict[str, tuple[jax.Array, jax.Array]]
    metrics: dict[str, jax.Array]
    extra: Any


class SequenceMixer(Protocol):
    """Mixes tokens along the sequence: x [batch, seq_len, width] -> the same shape.

    causal: no output depends on a later token. decodes: `prefill` and `step` exist. For every n,
    `prefill` of n tokens and then `step`s give what `__call__` gives; `prefill` may continue.
    One with `order_free` as True reads positions alone, never which token stands beside which, so
    its tokens may come in another order (a zigzag ring's).
    A mixer may take more arguments by name in these three: what `Stack` tells it about its layer.
    One with a method `start_shapes` takes a `start`, from which its documents then begin; see
    `effattn.nn.start`.

    A mixer or model with an attribute `prefix_length` > 0 sees so many first tokens of a document
    from everywhere in it. It is not causal, but no output depends on a later token beyond the
    prefix; and it decodes a document whose prefix lies in one `prefill` whole.
    """

    causal: bool
    decodes: bool

    def __call__(
        self, x: jax.Array, info: TokenInfo, *, state: State = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """(y, aux). state: where the rows start from, None for empty. aux: one fixed pytree."""
        ...

    def init_state(self, batch: int, max_len: int, dtype: Any) -> State:
        """The empty state for rows of up to max_len tokens; `dtype` for cached activations."""
        ...

    def prefill(self, x: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        """(y, state) after all of x; invalid tokens change no state."""
        ...

    def step(self, x_t: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        """One token per row, x_t [batch, width]; rows with valid=False keep their state."""
        ...


class Model(Protocol):
    """A language model, made by `config.build(vocab_size=, sequence=, dtype=, rngs=)`.

    One that cannot say all of this has `causal`, `decodes` or `packs` (several documents in a row)
    as False; without `decodes`, `prefill` and `step` may be missing. One that makes hard choices
    (boundaries, routes) has `chooses` as True: a rounding may tip a choice over.

    One with untrained state has `init_extra() -> extra`, and may have `end_step(params, extra) ->
    (params, extra)`, called once after every update of the parameters (a pure dict).
    """

    def __call__(
        self,
        tokens: jax.Array,
        info: TokenInfo,
        *,
        key: jax.Array | None = None,
        extra: Any = None,
    ) -> Output:
        """tokens: int [batch, seq_len]."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., width] -> float32 [..., vocab_size]; the loss calls it tile by tile."""
        ...

    def init_state(self, batch: int, max_len: int, dtype: Any) -> State: ...

    def prefill(self, tokens: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        """(logits [batch, seq_len, vocab_size], state)."""
        ...

    def step(self, token: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        """token and info's fields: [batch]. (logits [batch, vocab_size], state)."""
        ...


def state_bytes(layer: SequenceMixer | Model, batch: int, max_len: int, dtype: Any) -> int:
    """Bytes of the decoding state of `batch` rows of up to `max_len` tokens; allocates nothing."""
    state = jax.eval_shape(lambda: layer.init_state(batch, max_len, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
