"""TransNormerLLM 385M: 399.0 M parameters with the authors' vocabulary of 64000.

Sizes: the defaults of OpenNLPLab's modelling code (weigao266/TNL-MoE, smoe/models/tnl/
configuration_transnormer.py). Their corpus and training settings are not published: ours are those
of `based_360m`, on the Pile, which is not shipped either. Set data.source to JSON lines and
data.tokenizer to a tokenizer.json.
"""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.lightning import LightningModelConfig


def get_config(arg: str | None = None) -> Experiment:
    return Experiment(
        model=LightningModelConfig(
            num_layers=24,
            width=1024,
            num_heads=8,
            mlp_width=2816,
            lrpe_layers=(0,),
            remat="names",
        ),
        data=DataConfig(
            source="pile/*.jsonl",
            field="text",
            tokenizer="tokenizer.json",
            vocab_size=64_000,
            batch_size=256,
            seq_len=2048,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=8e-4,
            schedule="cosine",
            warmup_steps=200,
            final_fraction=0.1,
            weight_decay=0.1,
            clip=1.0,
            b1=0.9,
            b2=0.95,
        ),
        train=TrainConfig(steps=20_000, eval_every=1000, compute_dtype="bfloat16"),
    )
