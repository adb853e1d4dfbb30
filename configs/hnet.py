"""H-Net as published, on bytes: `hnet:1stage_L`, `1stage_XL`, `2stage_L`, `2stage_XL`.

Layouts, widths, heads, rotary channels and windows: the authors' configuration files (Hwang et al.
2025; 679.4 M, 1270.8 M, 874.3 M and 1603.5 M parameters with their 256 bytes). Targets, context,
batch and schedule: the paper; 100 B bytes of FineWeb-Edu, which is not shipped. The factors of the
learning rate are the authors' example for two stages and the paper's rule for one.
"""

from effattn.checks import check_in
from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.hnet import HNetConfig
from effattn.nn.compact import CapacityConfig

ONE, TWO = '["m4", ["T{}"], "m4"]', '["m4", ["T1m4", ["T{}"], "m4T1"], "m4"]'
# name: (layout, widths, MLP widths, channels of a head that turn, windows)
SIZES = {
    "1stage_L": (ONE.format(22), (1024, 1536), (0, 4096), (32, 48), (1023, None)),
    "1stage_XL": (ONE.format(24), (1024, 2048), (0, 5504), (32, 64), (1023, None)),
    "2stage_L": (
        TWO.format(26),
        (1024, 1024, 1536),
        (0, 2816, 4096),
        (32, 32, 48),
        (1023, 1023, None),
    ),
    "2stage_XL": (
        TWO.format(27),
        (1024, 1536, 2048),
        (0, 4096, 5504),
        (32, 48, 64),
        (1023, 1023, None),
    ),
}


def get_config(arg: str | None = None) -> Experiment:
    name = "1stage_L" if arg is None else arg
    check_in("config argument", name, SIZES)
    layout, widths, mlp_widths, rotary_dims, windows = SIZES[name]
    one = len(widths) == 2
    return Experiment(
        model=HNetConfig(
            layout=layout,
            width=widths[0],
            inner_widths=widths[1:],
            mlp_widths=mlp_widths,
            num_heads=(16,),
            rotary_dims=rotary_dims,
            windows=windows,
            targets=(6.0,) if one else (3.0, 3.0),
            capacity=CapacityConfig(mode="bucket", rungs=(0.25, 0.5, 1.0)),
            learning_rates=(2.6, 0.9) if one else (3.0, 1.7, 0.9),
            remat="full",
        ),
        data=DataConfig(
            source="fineweb/*.jsonl", field="text", tokenizer="utf8", batch_size=256, seq_len=8192
        ),
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            schedule="wsd",
            warmup_steps=2000,
            final_fraction=0.0,
            decay_fraction=0.2,
            weight_decay=0.1,
        ),
        train=TrainConfig(steps=47_700, eval_every=1000, compute_dtype="bfloat16"),
    )
