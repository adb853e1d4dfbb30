"""TransNormerLLM 7B: 6.93 B parameters with the authors' vocabulary of 64000.

30 layers, width and heads: Qin et al. 2023 (arXiv 2307.14995). The width of the MLP is 2.75 times
the model's, as in the released 385M. Data and training as in `lightning_385m`, at a lower learning
rate: the authors' corpus is not published.
"""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.lightning import LightningModelConfig


def get_config(arg: str | None = None) -> Experiment:
    return Experiment(
        model=LightningModelConfig(
            num_layers=30,
            width=4096,
            num_heads=32,
            mlp_width=11264,
            lrpe_layers=(0,),
            remat="names",
        ),
        data=DataConfig(
            source="pile/*.jsonl",
            field="text",
            tokenizer="tokenizer.json",
            vocab_size=64_000,
            batch_size=1024,
            seq_len=2048,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=3e-4,
            schedule="cosine",
            warmup_steps=2000,
            final_fraction=0.1,
            weight_decay=0.1,
            clip=1.0,
            b1=0.9,
            b2=0.95,
        ),
        train=TrainConfig(steps=100_000, eval_every=1000, compute_dtype="bfloat16"),
    )
