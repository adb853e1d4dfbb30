"""Forward FLOPs of models whose layers do not all see every token of the row: H-Net, MoR, NAT.

All of it is spread over the tokens of the row, see `effattn.train.flops`.
"""

import math
from collections.abc import Sequence
from typing import Any

from effattn.train.layer_flops import (
    attention_flops,
    gated_mlp_flops,
    heads_of,
    mean_visible,
    ssd_flops,
)


def hnet(config: Any, vocab_size: int, seq_len: int) -> list[tuple[str, int, str, float]]:
    """At the targets' compression, whatever the router does."""
    rows = [row for stage in _hnet_stages(config, seq_len, None) for row in stage]
    return [*rows, ("head", 1, "logits", 2 * config.width * vocab_size)]


def hnet_stage_flops(
    config: Any, *, seq_len: int, compressions: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Of every stage's own stacks, router and residual, outermost first, per byte.

    compressions: tokens per chunk of each stage that has another inside; None: the targets. A stage
    of n bytes per token computes on 1 / n of the row, and its attention sees 1 / n of the keys.
    """
    stages = _hnet_stages(config, seq_len, compressions)
    return tuple(sum(flops for *_, flops in rows) for rows in stages)


def _hnet_stages(
    config: Any, seq_len: int, compressions: Sequence[float] | None
) -> list[list[tuple[str, int, str, float]]]:
    stages, widths = config.stages(), config.widths()
    if compressions is None:
        compressions = [config.of_stage("targets", s) for s in range(len(stages) - 1)]
    found, bytes_per_token = [], 1.0
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
        rows = []
        for kind, mixer, letters in (("attention", attention, "tT"), ("ssd", ssd, "mM")):
            count, with_mlp = (sum(c in of for c in layers) for of in (letters, letters[1]))
            for part, flops in mixer.items() if count else ():
                rows.append((f"stage {s}: {kind}", count, part, count * flops / bytes_per_token))
            if with_mlp:
                flops = with_mlp * mlp["mlp"] / bytes_per_token
                rows.append((f"stage {s}: {kind}", count, "mlp", flops))
        if stage.inner is not None:  # the router's two matrices and the residual's
            routing = 2 * width * width / bytes_per_token
            rows.append((f"stage {s}: routing", 1, "router", 2 * routing))
            rows.append((f"stage {s}: routing", 1, "residual", routing))
        found.append(rows)
        if stage.inner is not None:
            bytes_per_token *= compressions[s]
    return found


def mor(config: Any, vocab_size: int, seq_len: int) -> list[tuple[str, int, str, float]]:
    """At the shares of training; token choice as if every depth were chosen as often."""
    heads, layout, width = heads_of(config), config.layout(), config.width
    inner, keys = (heads[name] * heads["head_dim"] for name in ("num_heads", "num_kv_heads"))
    mlp = gated_mlp_flops(width=width, mlp_width=config.inner_mlp_width())["mlp"]
    outputs = config.num_recursions if config.routing == "token" else 1
    router = 2 * width * outputs
    if config.router == "mlp":
        router = 2 * 2 * width * (width + outputs)
    router *= 2 if config.sampling == "aux_router" and config.routing == "expert" else 1
    private = attention_flops(**heads, width=width, seq_len=seq_len, window=None) | {"mlp": mlp}
    count = 2 * layout.private
    rows = [("private", count, part, count * flops) for part, flops in private.items() if count]
    alive = float(seq_len)
    for r, share in enumerate(config.shares()):
        taken = max(1, int(share * seq_len))
        reads = r > 0 and config.kv == "shared" and config.routing != "none"
        made = keys if not reads or config.update_cache else 0
        layer = {
            "projections": 2 * width * (2 * inner + 2 * made),
            "pairs": 4 * inner * mean_visible(seq_len if reads else taken, None),
            "mlp": mlp,
        }
        for part, flops in layer.items():
            spent = taken / seq_len * layout.base_depth * flops
            rows.append((f"recursion {r}", layout.base_depth, part, spent))
        if config.routing == "expert" or (config.routing == "token" and r == 0):
            rows.append((f"recursion {r}", layout.base_depth, "router", alive / seq_len * router))
        alive = taken
    return [*rows, ("head", 1, "logits", 2 * width * vocab_size)]


def nat(config: Any, vocab_size: int, seq_len: int) -> list[tuple[str, int, str, float]]:
    """Of an image, shared out among its tokens; the head answers at every one of them."""
    taps = 3 ** len(config.axes)
    grids, widths = config.grids(), config.widths()
    channels, grid = config.channels, config.axes
    rows = []
    for i, stride in enumerate(config.stem_strides):
        width = widths[0] if i == len(config.stem_strides) - 1 else widths[0] // 2
        grid = tuple(-(-n // stride) for n in grid)
        flops = 2 * taps * channels * width * math.prod(grid)
        rows.append(("stem", len(config.stem_strides), "convolution", flops / seq_len))
        channels = width
    levels = zip(config.depths, grids, widths, strict=True)
    for level, (depth, grid, width) in enumerate(levels):
        places = math.prod(grid)
        if width != channels:
            flops = 2 * taps * channels * width * places
            rows.append((f"level {level}", depth, "downsampling", flops / seq_len))
        visible = math.prod(min(config.window, n) for n in grid)
        block = {
            "projections": 2 * width * width * 4,
            "pairs": 4 * width * visible,
            "mlp": 2 * width * width * 2 * config.mlp_ratio,
        }
        for part, flops in block.items():
            rows.append((f"level {level}", depth, part, depth * places * flops / seq_len))
        channels = width
    return [*rows, ("head", 1, "logits", 2 * config.width * vocab_size)]
