"""Forward FLOPs of one layer per token, by part: what `effattn.train.flops` adds up over a model.

Counted: 2 m n of an [m, n] matrix product, and what a mixer does with the pairs of tokens that its
mask lets through, no more. A layer is a dictionary from the part's name to its FLOPs.
"""

from typing import Any

Parts = dict[str, float]


def mean_visible(seq_len: int, window: int | None) -> float:
    """Keys that a query sees on average: Causal(), or Causal() & Window(left=window)."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    full = seq_len - window  # queries that see window + 1 keys; the others see 1, 2, ..., window
    return (window * (window + 1) / 2 + full * (window + 1)) / seq_len


def attention_flops(
    *,
    width: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    seq_len: int,
    window: int | None,
) -> Parts:
    """Projections of query, key, value and output; scores and weighted values of visible pairs."""
    return {
        "projections": 2 * width * head_dim * (2 * num_heads + 2 * num_kv_heads),
        "pairs": 4 * num_heads * head_dim * mean_visible(seq_len, window),
    }


def taylor_flops(
    *, width: int, num_heads: int, head_dim: int, feature_dim: int, feature_map: str = "taylor"
) -> Parts:
    """BASED's linear layer in its recurrent form: what chunks compute beyond it is overhead.

    With F features, per head: the state's update and its read-out, 2 F e each, and the normaliser's
    read-out, 2 F.
    """
    features = _num_features(feature_dim, feature_map)
    return {
        "projections": 2 * width * num_heads * (2 * feature_dim + 2 * head_dim),
        "state": num_heads * (4 * features * head_dim + 2 * features),
    }


def prefix_flops(
    *,
    width: int,
    num_heads: int,
    head_dim: int,
    feature_dim: int,
    feature_map: str = "taylor",
    seq_len: int,
    enc_length: int,
) -> Parts:
    """What JRT adds to `taylor_flops`: a second key and value, and the state's update, of a prefix.

    Spread over the row's tokens.
    """
    features = _num_features(feature_dim, feature_map)
    share = min(enc_length, seq_len) / seq_len
    return {
        "projections": share * 2 * width * num_heads * (feature_dim + head_dim),
        "state": share * num_heads * 2 * features * head_dim,
    }


def _num_features(feature_dim: int, feature_map: str) -> int:
    """1 + d + d (d + 1) / 2 of the Taylor map, d of "elu"."""
    if feature_map == "taylor":
        return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
    return feature_dim


def recurrence_flops(*, num_heads: int, key_dim: int, value_dim: int) -> float:
    """Linear attention in its recurrent form: update and read-out of the state, decay aside."""
    return 4 * num_heads * key_dim * value_dim


def short_conv_flops(*, width: int, kernel: int, expand: int) -> Parts:
    """Projection to the convolved and the gate half, depthwise convolution, projection back."""
    inner = expand * width // 2
    return {"projections": 2 * width * inner * 3, "convolution": 2 * kernel * inner}


def ssd_flops(
    *, width: int, expand: int, head_dim: int, state_dim: int, num_groups: int, kernel: int
) -> Parts:
    """Mamba-2's block: x, gate, output, B, C and steps, convolutions, the recurrence."""
    inner, groups = expand * width, num_groups * state_dim
    num_heads = inner // head_dim
    return {
        "projections": 2 * width * (3 * inner + 2 * groups + num_heads),
        "convolution": 2 * kernel * (inner + 2 * groups),
        "state": recurrence_flops(num_heads=num_heads, key_dim=state_dim, value_dim=head_dim),
    }


def lightning_flops(*, width: int, num_heads: int, head_dim: int, key_dim: int) -> Parts:
    """Query, key, value, gate and output; a state of key_dim x head_dim per head."""
    return {
        "projections": 2 * width * num_heads * head_dim * 5,
        "state": recurrence_flops(num_heads=num_heads, key_dim=key_dim, value_dim=head_dim),
    }


def aaren_flops(*, width: int, num_heads: int, head_dim: int) -> Parts:
    """One column per head makes the scores; the state is one row of values per head."""
    return {
        "projections": 2 * width * (num_heads + 2 * num_heads * head_dim),
        "state": recurrence_flops(num_heads=num_heads, key_dim=1, value_dim=head_dim),
    }


def rat_flops(*, width: int, inner: int, groups: int, chunk_size: int, seq_len: int) -> Parts:
    """A token sees the chunks before its own and its own running pair, which one gate updates.

    inner, groups: channels of all heads, and of the shared queries and keys.
    """
    whole, rest = divmod(seq_len, chunk_size)
    slots = chunk_size * whole * (whole + 1) / 2 + rest * (whole + 1)
    return {
        # z, value, gate, output; query and key
        "projections": 2 * width * (4 * inner + 2 * groups),
        "state": 2 * 2 * inner,
        "pairs": 4 * inner * slots / seq_len,
    }


def mlp_flops(*, width: int, mlp_width: int) -> Parts:
    return {"mlp": 2 * 2 * width * mlp_width}


def gated_mlp_flops(*, width: int, mlp_width: int) -> Parts:
    return {"mlp": 2 * 3 * width * mlp_width}


def experts_flops(*, width: int, count: int, top_k: int, mlp_width: int, shared: int) -> Parts:
    """Of the experts that a token takes; a capacity may drop some of them."""
    taken = gated_mlp_flops(width=width, mlp_width=(top_k + shared) * mlp_width)
    return {"router": 2 * width * count, "experts": taken["mlp"]}


def added(*layers: Parts) -> Parts:
    """Parts of the same name together."""
    total: Parts = {}
    for parts in layers:
        for name, flops in parts.items():
            total[name] = total.get(name, 0) + flops
    return total


def heads_of(config: Any) -> dict[str, int]:
    """num_heads, num_kv_heads and head_dim of a config, its defaults filled in."""
    num_kv_heads = getattr(config, "num_kv_heads", None)
    return {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_heads if num_kv_heads is None else num_kv_heads,
        "head_dim": config.width // config.num_heads
        if config.head_dim is None
        else config.head_dim,
    }
