"""H-Net, small, on the sources of the standard library, byte by byte: learned chunks of about 4.

Two state-space layers on bytes before and after six wider attention layers on chunks. A step has
room for a chunk per byte where it must, and costs a quarter of that once the chunks have settled.
"""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.hnet import HNetConfig
from effattn.nn.compact import CapacityConfig


def get_config() -> Experiment:
    return Experiment(
        model=HNetConfig(
            layout='["m2", ["T4"], "m2"]',
            width=128,
            inner_widths=(192,),
            num_heads=(4,),
            state_dim=32,
            ssm_head_dim=64,
            targets=(4.0,),
            capacity=CapacityConfig(mode="bucket", rungs=(0.25, 0.35, 1.0), pooled=True),
        ),
        data=DataConfig(source="stdlib", batch_size=8, seq_len=256),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.01,
            adam_ratio=0.3,
            schedule="linear",
            warmup_steps=30,
            final_fraction=0.0,
            weight_decay=0.05,
        ),
        train=TrainConfig(steps=1000, log_every=10, checkpoint_every=250),
    )
