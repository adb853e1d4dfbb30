"""Model FLOPs counted from the config, by layer and part: the figure behind model FLOP/s.

XLA's own count takes the body of a scan once, so it is wrong for scanned layers. Counted here:
2 m n per token and [m, n] matrix product, and what a mixer does with the pairs of tokens that its
mask lets through, no more. Not counted: the embedding look-up, norms, activations, rotary, softmax,
the optimizer and recomputation. The output head counts with the true vocabulary, tied or not.
The backward pass is twice the forward pass. Layers are counted in `layer_flops`, models whose
layers see different tokens in `adaptive_flops`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from effattn.checks import check_at_least
from effattn.nn.layers import gated_mlp_width
from effattn.train import adaptive_flops
from effattn.train.layer_flops import (
    Parts,
    aaren_flops,
    added,
    attention_flops,
    experts_flops,
    gated_mlp_flops,
    heads_of,
    lightning_flops,
    mlp_flops,
    prefix_flops,
    rat_flops,
    short_conv_flops,
    ssd_flops,
    taylor_flops,
)


class Part(NamedTuple):
    """What the layers of one kind spend on one part, all of them together.

    layer: their kind, "head" of the logits. layers: how many there are. flops: per token of the
    row, forward.
    """

    layer: str
    layers: int
    part: str
    flops: float


def training_flops(config: Any, *, vocab_size: int, seq_len: int) -> float | None:
    """FLOPs per token, forward and backward; None for a model that nobody has counted."""
    forward = forward_flops(config, vocab_size=vocab_size, seq_len=seq_len)
    return None if forward is None else 3 * forward


def forward_flops(config: Any, *, vocab_size: int, seq_len: int) -> float | None:
    """FLOPs per token of a forward pass over a row of seq_len tokens, one document per row."""
    parts = flops_by_part(config, vocab_size=vocab_size, seq_len=seq_len)
    return None if parts is None else sum(part.flops for part in parts)


def flops_by_part(config: Any, *, vocab_size: int, seq_len: int) -> tuple[Part, ...] | None:
    """What `forward_flops` adds up, in the order of the forward pass.

    A config that is not in `COUNTS` may have a method `flops_by_part(*, vocab_size, seq_len)` that
    gives the fields of every Part. None for a model that nobody has counted.
    """
    check_at_least("seq_len", seq_len, 1)
    if hasattr(config, "flops_by_part"):
        rows = config.flops_by_part(vocab_size=vocab_size, seq_len=seq_len)
    elif type(config).__name__ in COUNTS:
        rows = COUNTS[type(config).__name__](config, vocab_size, seq_len)
    else:
        return None
    return None if rows is None else tuple(Part(*row) for row in rows)


# The fields of a Part each.
Rows = list[tuple[str, int, str, float]]


def _stack(layers: Sequence[str], parts_of: dict[str, Parts], width: int, vocab_size: int) -> Rows:
    """Of a stack whose every layer is of one of the kinds in `parts_of`, and of the head."""
    rows: Rows = []
    for kind in dict.fromkeys(layers):
        count = sum(layer == kind for layer in layers)
        rows += [(kind, count, part, count * flops) for part, flops in parts_of[kind].items()]
    return [*rows, ("head", 1, "logits", 2 * width * vocab_size)]


def _transformer(config: Any, vocab_size: int, seq_len: int) -> Rows:
    mlp_width = config.mlp_width
    if mlp_width is None:
        mlp_width = gated_mlp_width(config.width)
    attention = attention_flops(
        **heads_of(config), width=config.width, seq_len=seq_len, window=config.window
    )
    layer = added(attention, gated_mlp_flops(width=config.width, mlp_width=mlp_width))
    layers = ("attention",) * config.num_layers
    return _stack(layers, {"attention": layer}, config.width, vocab_size)


def _moe(config: Any, vocab_size: int, seq_len: int) -> Rows:
    width, experts = config.width, config.experts
    attention = attention_flops(**heads_of(config), width=width, seq_len=seq_len, window=None)
    dense = gated_mlp_flops(width=width, mlp_width=config.inner_mlp_width())
    mixture = experts_flops(
        width=width,
        count=experts.count,
        top_k=experts.top_k,
        mlp_width=experts.mlp_width,
        shared=experts.shared,
    )
    kinds = {"dense": added(attention, dense), "experts": added(attention, mixture)}
    return _stack(config.layers(), kinds, width, vocab_size)


def _based(config: Any, vocab_size: int, seq_len: int) -> Rows:
    width, heads = config.width, heads_of(config)
    taylor = {
        "width": width,
        "num_heads": config.num_heads,
        "head_dim": heads["head_dim"],
        "feature_dim": config.feature_dim,
        "feature_map": config.feature_map,
    }
    linear = taylor_flops(**taylor)
    prefix = prefix_flops(**taylor, seq_len=seq_len, enc_length=config.enc_length)
    mlp_width = 2 * width if config.mlp_width is None else config.mlp_width
    mlp = gated_mlp_flops(width=width, mlp_width=mlp_width)
    conv = short_conv_flops(width=width, kernel=config.conv_kernel, expand=config.conv_expand)
    window = attention_flops(**heads, width=width, seq_len=seq_len, window=config.window)
    mixers = {"conv": conv, "linear": linear, "prefix": added(linear, prefix), "window": window}
    kinds = {kind: added(mixer, mlp) for kind, mixer in mixers.items()}
    return _stack(config.layers(), kinds, width, vocab_size)


def _lightning(config: Any, vocab_size: int, seq_len: int) -> Rows:
    width, heads = config.width, heads_of(config)
    head_dim = heads["head_dim"]
    one = {"width": width, "num_heads": config.num_heads, "head_dim": head_dim}
    mixers = {
        "lightning": lightning_flops(key_dim=head_dim, **one),
        "lightning with LRPE": lightning_flops(key_dim=2 * head_dim, **one),
        "softmax": attention_flops(**heads, width=width, seq_len=seq_len, window=None),
    }
    mlp = gated_mlp_flops(width=width, mlp_width=config.inner_mlp_width())
    kinds = {kind: added(mixer, mlp) for kind, mixer in mixers.items()}
    return _stack(config.layers(), kinds, width, vocab_size)


def _mamba2(config: Any, vocab_size: int, seq_len: int) -> Rows:
    layer = ssd_flops(
        width=config.width,
        expand=config.expand,
        head_dim=config.head_dim,
        state_dim=config.state_dim,
        num_groups=config.num_groups,
        kernel=config.conv_kernel,
    )
    return _stack(("ssd",) * config.num_layers, {"ssd": layer}, config.width, vocab_size)


def _aaren(config: Any, vocab_size: int, seq_len: int) -> Rows:
    width, head_dim = config.width, heads_of(config)["head_dim"]
    mixers = {
        "aaren": aaren_flops(width=width, num_heads=config.num_heads, head_dim=head_dim),
        "conv": short_conv_flops(width=width, kernel=config.conv_kernel, expand=config.conv_expand),
    }
    mlp = mlp_flops(width=width, mlp_width=config.inner_mlp_width())
    kinds = {kind: added(mixer, mlp) for kind, mixer in mixers.items()}
    return _stack(config.layers(), kinds, width, vocab_size)


def _rat(config: Any, vocab_size: int, seq_len: int) -> Rows:
    width, heads = config.width, heads_of(config)
    mixers = {
        "rat": rat_flops(
            width=width,
            inner=heads["num_heads"] * heads["head_dim"],
            groups=config.num_groups * heads["head_dim"],
            chunk_size=config.chunk_size,
            seq_len=seq_len,
        ),
        "local": attention_flops(**heads, width=width, seq_len=seq_len, window=config.window),
    }
    mlp = mlp_flops(width=width, mlp_width=config.inner_mlp_width())
    kinds = {kind: added(mixer, mlp) for kind, mixer in mixers.items()}
    return _stack(config.layers(), kinds, width, vocab_size)


def _parscale(config: Any, vocab_size: int, seq_len: int) -> Rows | None:
    """The base's layers once per stream, what reads the streams' starts, the aggregation (two
    matrices, a weighted sum) and one head."""
    base = flops_by_part(config.base, vocab_size=vocab_size, seq_len=seq_len)
    if base is None:
        return None
    streams, width = config.streams, config.width
    rows: Rows = [(p.layer, p.layers, p.part, streams * p.flops) for p in base if p.layer != "head"]
    rows.append(("streams", streams, "starts", streams * config.start_flops()))
    if streams > 1:
        rows.append(("streams", streams, "aggregation", 2 * streams * width * (width + 2)))
    return [*rows, ("head", 1, "logits", 2 * width * vocab_size)]


COUNTS: dict[str, Callable[[Any, int, int], Rows | None]] = {
    "TransformerConfig": _transformer,
    "MoEConfig": _moe,
    "BasedModelConfig": _based,
    "LightningModelConfig": _lightning,
    "Mamba2Config": _mamba2,
    "AarenModelConfig": _aaren,
    "RATModelConfig": _rat,
    "MoRConfig": adaptive_flops.mor,
    "HNetConfig": adaptive_flops.hnet,
    "ParScaleConfig": _parscale,
    "NATConfig": adaptive_flops.nat,
}
