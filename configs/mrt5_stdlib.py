"""A small MrT5 on the standard library's sources: 256 bytes are encoded, the next 256 decoded."""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.mrt5 import MrT5Config


def get_config() -> Experiment:
    return Experiment(
        model=MrT5Config(
            num_layers=5,
            num_decoder_layers=3,
            width=160,
            num_heads=4,
            head_dim=40,
            mlp_width=432,
            gate_layer=2,
            source_length=256,
            integral_gain=1e-3,  # 1e-5 of the paper wants thousands of steps more than these
        ),
        # Bytes of the source are not predicted, so that next to none of them is hidden.
        data=DataConfig(
            source="stdlib",
            batch_size=8,
            seq_len=512,
            prefix_length=256,
            prefix_masked=1e-6,
            prefix_weight=0.0,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.01,
            schedule="cosine",
            warmup_steps=30,
            final_fraction=0.05,
            weight_decay=0.05,
        ),
        train=TrainConfig(steps=1500, log_every=10, eval_every=500, checkpoint_every=500),
    )
