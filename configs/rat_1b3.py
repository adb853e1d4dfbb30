"""RAT 1.3B as published: 1.364 B parameters with Llama 2's 32000 tokens, 1.233 B without them.

`rat_1b3:hybrid` puts local attention, a window of 1024, into every other layer. Values:
CLAIRE-Labo/RAT, rat-xl.yaml and rat_localattention_interleave-xl.yaml (100 B tokens of
FineWeb-Edu). The data is not shipped: set data.source to JSON lines and data.tokenizer to
Llama 2's tokenizer.json.
"""

from effattn.checks import check_in
from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.rat import RATModelConfig

PATTERNS = {"rat": ("rat",), "hybrid": ("rat", "local")}
STEPS = 47_684  # of 512 x 4096 tokens


def get_config(arg: str | None = None) -> Experiment:
    name = "rat" if arg is None else arg
    check_in("rat_1b3", name, PATTERNS)
    return Experiment(
        model=RATModelConfig(
            num_layers=24,
            width=2048,
            num_heads=16,
            pattern=PATTERNS[name],
            chunk_size=16,
            num_groups=2,
            window=1024,
            tied=False,
            remat="names",
        ),
        data=DataConfig(
            source="fineweb-edu/*.jsonl",
            field="text",
            tokenizer="llama2/tokenizer.json",
            vocab_size=32_000,
            batch_size=512,
            seq_len=4096,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=8e-4,
            schedule="cosine",
            warmup_steps=STEPS // 20,
            final_fraction=1e-6 / 8e-4,
            weight_decay=0.1,
            clip=1.0,
            b1=0.9,
            b2=0.95,
        ),
        train=TrainConfig(steps=STEPS, eval_every=1000, compute_dtype="bfloat16"),
    )
