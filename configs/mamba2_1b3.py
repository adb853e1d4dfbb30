"""Mamba-2 1.3B as released: 1343.8 M parameters with GPT-NeoX's 50277 tokens, padded to 50288.

Sizes: the release state-spaces/mamba2-1.3b, trained on 300 B tokens of the Pile. Learning rate and
batch are not from the release: five times and once those of GPT-3 at this size. The Pile is not
shipped: set data.source to JSON lines and data.tokenizer to GPT-NeoX's tokenizer.json.
"""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.mamba2 import Mamba2Config


def get_config(arg: str | None = None) -> Experiment:
    return Experiment(
        model=Mamba2Config(
            num_layers=48,
            width=2048,
            expand=2,
            head_dim=64,
            state_dim=128,
            remat="names",
        ),
        data=DataConfig(
            source="pile/*.jsonl",
            field="text",
            tokenizer="gpt-neox/tokenizer.json",
            vocab_size=50_288,
            batch_size=256,
            seq_len=2048,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=3000,
            final_fraction=0.1,
            weight_decay=0.1,
            clip=1.0,
            b1=0.9,
            b2=0.95,
        ),
        train=TrainConfig(steps=572_000, eval_every=1000, compute_dtype="bfloat16"),
    )
