"""A decoder of the size of Llama 3 8B: 8.03 B parameters with its 128256 tokens; `:1m`, `:500k`.

Sizes: Grattafiori et al. 2024 (arXiv 2407.21783), table 3. The recipe is ours. `:1m` and `:500k`
are rows of 1,048,576 and 524,288 tokens, one at a time, for which the rotary base grows: a ring
over the sequence, a tiled loss, and parameters split over all devices. Set data.source to JSON
lines and data.tokenizer to a tokenizer.json.
"""

from effattn.checks import check_in
from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.transformer import TransformerConfig
from effattn.parallel.mesh import MeshConfig
from effattn.parallel.sequence import SequenceConfig

# argument: (tokens of a row, rows, rotary base)
LENGTHS = {
    "8k": (8192, 128, 500_000.0),
    "500k": (524_288, 1, 50_000_000.0),
    "1m": (1_048_576, 1, 100_000_000.0),
}


def get_config(arg: str | None = None) -> Experiment:
    arg = "8k" if arg is None else arg
    check_in("config argument", arg, LENGTHS)
    seq_len, batch_size, rotary_base = LENGTHS[arg]
    long = arg != "8k"
    return Experiment(
        model=TransformerConfig(
            num_layers=32,
            width=4096,
            num_heads=32,
            num_kv_heads=8,
            mlp_width=14336,
            rotary_base=rotary_base,
            tied=False,
            remat="full",
        ),
        data=DataConfig(
            source="corpus/*.jsonl",
            field="text",
            tokenizer="tokenizer.json",
            vocab_size=128_256,
            batch_size=batch_size,
            seq_len=seq_len,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            warmup_steps=2000,
            weight_decay=0.1,
            clip=1.0,
        ),
        train=TrainConfig(
            steps=100_000,
            eval_every=1000,
            compute_dtype="bfloat16",
            loss_tile=16_384 if long else None,
        ),
        mesh=MeshConfig(sequence=8) if long else MeshConfig(),
        sequence=SequenceConfig(kind="ring", zigzag=True) if long else SequenceConfig(),
    )
