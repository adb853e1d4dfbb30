"""Model FLOPs counted from the config, the figure behind model FLOP/s.

XLA's own count takes the body of a scan once, so it is wrong for scanned layers. Counted here:
2 m n per token and [m, n] matrix product, and what a mixer does with the pairs of tokens that its
mask lets through, no more. Not counted: the embedding look-up, norms, activations, rotary, softmax,
the optimizer and recomputation. The output head counts with the true vocabulary, tied or not.
The backward pass is twice the forward pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from effattn.checks import check_at_least


def training_flops(config: Any, *, vocab_size: int, seq_len: int) -> float | None:
    """FLOPs per token, forward and backward; None for a model that nobody has counted."""
    forward = forward_flops(config, vocab_size=vocab_size, seq_len=seq_len)
    return None if forward is None else 3 * forward


def forward_flops(config: Any, *, vocab_size: int, seq_len: int) -> float | None:
    """FLOPs per token of a forward pass over a row of seq_len tokens, one document per row.

    A config that is not in `COUNTS` may have a method `forward_flops(*, vocab_size, seq_len)`.
    """
    check_at_least("seq_len", seq_len, 1)
    if hasattr(config, "forward_flops"):
        return config.forward_flops(vocab_size=vocab_size, seq_len=seq_len)
    count = COUNTS.get(type(config).__name__)
    return None if count is None else count(config, vocab_size, seq_len)


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
) -> float:
    """Projections of query, key, value and output; scores and weighted values of visible pairs."""
    projections = 2 * width * head_dim * (2 * num_heads + 2 * num_kv_heads)
    pairs = 4 * num_heads * head_dim * mean_visible(seq_len, window)
    return projections + pairs


def taylor_flops(
    *, width: int, num_heads: int, head_dim: int, feature_dim: int, feature_map: str = "taylor"
) -> float:
    """BASED's linear layer in its recurrent form: what chunks compute beyond it is overhead.

    With F features, per head: the state's update and its read-out, 2 F e each, and the normaliser's
    read-out, 2 F.
    """
    features = _num_features(feature_dim, feature_map)
    projections = 2 * width * num_heads * (2 * feature_dim + 2 * head_dim)
    return projections + num_heads * (4 * features * head_dim + 2 * features)


def recurrence_flops(*, num_heads: int, key_dim: int, value_dim: int) -> float:
    """Linear attention in its recurrent form: update and read-out of the state, decay aside."""
    return 4 * num_heads * key_dim * value_dim


def prefix_flops(
    *,
    width: int,
    num_heads: int,
    head_dim: int,
    feature_dim: int,
    feature_map: str = "taylor",
    seq_len: int,
    enc_length: int,
) -> float:
    """What JRT adds to `taylor_flops`: a second key and value, and the state's update, of a prefix.

    Spread over the row's tokens.
    """
    features = _num_features(feature_dim, feature_map)
    projections = 2 * width * num_heads * (feature_dim + head_dim)
    share = min(enc_length, seq_len) / seq_len
    return share * (projections + num_heads * 2 * features * head_dim)


def _num_features(feature_dim: int, feature_map: str) -> int:
    """1 + d + d (d + 1) / 2 of the Taylor map, d of "elu"."""
    if feature_map == "taylor":
        return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
    return feature_dim


def short_conv_flops(*, width: int, kernel: int, expand: int) -> float:
    """Projection to the convolved and the gate half, depthwise convolution, projection back."""
    inner = expand * width // 2
    return 2 * width * inner * 3 + 2 * kernel * inner


def mlp_flops(*, width: int, mlp_width: int) -> float:
    return 2 * 2 * width * mlp_width


def gated_mlp_flops(*, width: int, mlp_width: int) -> float:
    return 2 * 3 * width * mlp_width


def _transformer(config: Any, vocab_size: int, seq_len: int) -> float:
    mlp_width = config.mlp_width
    if mlp_width is None:
        mlp_width = -(-8 * config.width // (3 * 64)) * 64
    layer = attention_flops(
        **_heads(config), width=config.width, seq_len=seq_len, window=config.window
    ) + gated_mlp_flops(width=config.width, mlp_width=mlp_width)
    return config.num_layers * layer + 2 * config.width * vocab_size


def _based(config: Any, vocab_size: int, seq_len: int) -> float:
    width, heads = config.width, _heads(config)
    taylor = {
        "width": width,
        "num_heads": config.num_heads,
        "head_dim": heads["head_dim"],
        "feature_dim": config.feature_dim,
        "feature_map": config.feature_map,
    }
    linear = taylor_flops(**taylor)
    mixers = {
        "conv": short_conv_flops(width=width, kernel=config.conv_kernel, expand=config.conv_expand),
        "linear": linear,
        "prefix": linear + prefix_flops(**taylor, seq_len=seq_len, enc_length=config.enc_length),
        "window": attention_flops(**heads, width=width, seq_len=seq_len, window=config.window),
    }
    mlp_width = 2 * width if config.mlp_width is None else config.mlp_width
    mlp = gated_mlp_flops(width=width, mlp_width=mlp_width)
    return sum(mixers[kind] + mlp for kind in config.layers()) + 2 * width * vocab_size


def _lightning(config: Any, vocab_size: int, seq_len: int) -> float:
    width, heads = config.width, _heads(config)
    num_heads, head_dim = config.num_heads, heads["head_dim"]
    projections = 2 * width * num_heads * head_dim * 5  # query, key, value, gate, output
    one = {"num_heads": num_heads, "value_dim": head_dim}
    mixers = {
        "lightning": projections + recurrence_flops(key_dim=head_dim, **one),
        "lightning with LRPE": projections + recurrence_flops(key_dim=2 * head_dim, **one),
        "softmax": attention_flops(**heads, width=width, seq_len=seq_len, window=None),
    }
    mlp = gated_mlp_flops(width=width, mlp_width=config.inner_mlp_width())
    return sum(mixers[kind] + mlp for kind in config.layers()) + 2 * width * vocab_size


def ssd_flops(
    *, width: int, expand: int, head_dim: int, state_dim: int, num_groups: int, kernel: int
) -> float:
    """Mamba-2's block: x, gate, output, B, C and steps, convolutions, the recurrence."""
    inner, groups = expand * width, num_groups * state_dim
    num_heads = inner // head_dim
    layer = 2 * width * (3 * inner + 2 * groups + num_heads) + 2 * kernel * (inner + 2 * groups)
    return layer + recurrence_flops(num_heads=num_heads, key_dim=state_dim, value_dim=head_dim)


def _mamba2(config: Any, vocab_size: int, seq_len: int) -> float:
    layer = ssd_flops(
        width=config.width,
        expand=config.expand,
        head_dim=config.head_dim,
        state_dim=config.state_dim,
        num_groups=config.num_groups,
        kernel=config.conv_kernel,
    )
    return config.num_layers * layer + 2 * config.width * vocab_size


def hnet_stage_flops(
    config: Any, *, seq_len: int, compressions: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Of every stage's own stacks, router and residual, outermost first, per byte.

    compressions: tokens per chunk of each stage that has another inside; None: the targets. A stage
    of n bytes per token computes on 1 / n of the row, and its attention sees 1 / n of the keys.
    """
    stages, widths = config.stages(), config.widths()
    if compressions is None:
        compressions = [config.of_stage("targets", s) for s in range(len(stages) - 1)]
    flops, bytes_per_token = [], 1.0
    for s, (stage, width) in enumerate(zip(stages, widths, strict=True)):
        heads = config.of_stage("num_heads", s)
        attention = attention_flops(
            width=width,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            seq_len=max(1, round(seq_len / bytes_per_token)),
            window=config.of_stage("windows", s),
        )
        ssd = ssd_flops(
            width=width,
            expand=config.expand,
            head_dim=config.ssm_head_dim,
            state_dim=config.state_dim,
            num_groups=config.num_groups,
            kernel=config.conv_kernel,
        )
        mlp = gated_mlp_flops(width=width, mlp_width=config.mlp_width(s))
        layers = stage.encoder + stage.decoder
        own = sum((attention if c in "tT" else ssd) + (mlp if c.isupper() else 0) for c in layers)
        if stage.inner is not None:
            own += 3 * 2 * width * width  # the router's two matrices and the residual's
        flops.append(own / bytes_per_token)
        if stage.inner is not None:
            bytes_per_token *= compressions[s]
    return tuple(flops)


def _hnet(config: Any, vocab_size: int, seq_len: int) -> float:
    """At the targets' compression, whatever the router does."""
    return sum(hnet_stage_flops(config, seq_len=seq_len)) + 2 * config.width * vocab_size


def _aaren(config: Any, vocab_size: int, seq_len: int) -> float:
    """One column per head makes the scores; the state is one row of values per head."""
    width, num_heads, head_dim = config.width, config.num_heads, _heads(config)["head_dim"]
    aaren = 2 * width * (num_heads + 2 * num_heads * head_dim)  # scores, value, output
    aaren += recurrence_flops(num_heads=num_heads, key_dim=1, value_dim=head_dim)
    conv = short_conv_flops(width=width, kernel=config.conv_kernel, expand=config.conv_expand)
    mixers = {"aaren": aaren, "conv": conv}
    mlp = mlp_flops(width=width, mlp_width=config.inner_mlp_width())
    return sum(mixers[kind] + mlp for kind in config.layers()) + 2 * width * vocab_size


def _rat(config: Any, vocab_size: int, seq_len: int) -> float:
    """A token sees the chunks before its own and its own running pair, which one gate updates."""
    width, heads = config.width, _heads(config)
    inner, groups = heads["num_heads"] * heads["head_dim"], config.num_groups * heads["head_dim"]
    whole, rest = divmod(seq_len, config.chunk_size)
    slots = config.chunk_size * whole * (whole + 1) / 2 + rest * (whole + 1)
    rat = 2 * width * (4 * inner + 2 * groups)  # z, value, gate, output; query and key
    rat += 2 * 2 * inner + 4 * inner * slots / seq_len
    local = attention_flops(**heads, width=width, seq_len=seq_len, window=config.window)
    mixers = {"rat": rat, "local": local}
    mlp = mlp_flops(width=width, mlp_width=config.inner_mlp_width())
    return sum(mixers[kind] + mlp for kind in config.layers()) + 2 * width * vocab_size


def _parscale(config: Any, vocab_size: int, seq_len: int) -> float | None:
    """The base's layers once per stream, what reads the streams' starts, the aggregation (two
    matrices, a weighted sum) and one head."""
    base = forward_flops(config.base, vocab_size=vocab_size, seq_len=seq_len)
    if base is None:
        return None
    head = 2 * config.width * vocab_size
    join = 0 if config.streams == 1 else 2 * config.streams * config.width * (config.width + 2)
    return config.streams * (base - head + config.start_flops()) + join + head


def _mor(config: Any, vocab_size: int, seq_len: int) -> float:
    """At the shares of training; token choice as if every depth were chosen as often."""
    heads, layout, width = _heads(config), config.layout(), config.width
    inner, keys = (heads[name] * heads["head_dim"] for name in ("num_heads", "num_kv_heads"))
    mlp = gated_mlp_flops(width=width, mlp_width=config.inner_mlp_width())
    outputs = config.num_recursions if config.routing == "token" else 1
    router = 2 * width * outputs
    if config.router == "mlp":
        router = 2 * 2 * width * (width + outputs)
    router *= 2 if config.sampling == "aux_router" and config.routing == "expert" else 1
    total, alive = 0.0, seq_len
    for r, share in enumerate(config.shares()):
        taken = max(1, int(share * seq_len))
        reads = r > 0 and config.kv == "shared" and config.routing != "none"
        made = keys if not reads or config.update_cache else 0
        visible = mean_visible(seq_len if reads else taken, None)
        layer = 2 * width * (2 * inner + 2 * made) + 4 * inner * visible + mlp
        total += taken / seq_len * layout.base_depth * layer
        if config.routing == "expert" or (config.routing == "token" and r == 0):
            total += alive / seq_len * router
        alive = taken
    private = mlp + attention_flops(**heads, width=width, seq_len=seq_len, window=None)
    return total + 2 * layout.private * private + 2 * width * vocab_size


def _nat(config: Any, vocab_size: int, seq_len: int) -> float:
    """Of an image, shared out among its tokens; the head answers at every one of them."""
    taps = 3 ** len(config.axes)
    grids, widths = config.grids(), config.widths()
    total, channels, grid = 0.0, config.channels, config.axes
    for i, stride in enumerate(config.stem_strides):
        width = widths[0] if i == len(config.stem_strides) - 1 else widths[0] // 2
        grid = tuple(-(-n // stride) for n in grid)
        total += 2 * taps * channels * width * math.prod(grid)
        channels = width
    for depth, grid, width in zip(config.depths, grids, widths, strict=True):
        places = math.prod(grid)
        if width != channels:
            total += 2 * taps * channels * width * places
        visible = math.prod(min(config.window, n) for n in grid)
        block = 2 * width * width * (4 + 2 * config.mlp_ratio) + 4 * width * visible
        total += depth * places * block
        channels = width
    return total / seq_len + 2 * config.width * vocab_size


def _heads(config: Any) -> dict[str, int]:
    num_kv_heads = getattr(config, "num_kv_heads", None)
    return {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_heads if num_kv_heads is None else num_kv_heads,
        "head_dim": config.width // config.num_heads
        if config.head_dim is None
        else config.head_dim,
    }


COUNTS: dict[str, Callable[[Any, int, int], float | None]] = {
    "TransformerConfig": _transformer,
    "BasedModelConfig": _based,
    "LightningModelConfig": _lightning,
    "Mamba2Config": _mamba2,
    "AarenModelConfig": _aaren,
    "RATModelConfig": _rat,
    "MoRConfig": _mor,
    "HNetConfig": _hnet,
    "ParScaleConfig": _parscale,
    "NATConfig": _nat,
}
