"""What each way of sparing memory does to a row of 524,288 tokens on 8 chips, compiled for v5e.

  python scripts/long_sequences.py

The training step of our transformer, 8 layers of width 1024 with a gated MLP of 4096 and 32,768
tokens, one row over 8 devices, bfloat16 with a bfloat16 residual stream; each layer attends to a
window of 128 tokens through a halo, so that the memory is that of all else. Writes
docs/results/long_sequences.md. Static: read off the compiled program.
"""

import sys
from pathlib import Path

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.transformer import TransformerConfig
from effattn.nn.memory import MemoryConfig
from effattn.parallel.mesh import MeshConfig
from effattn.parallel.sequence import SequenceConfig
from effattn.plan.compiled import compile_plan
from effattn.plan.report import Plan

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "long_sequences.md"
CHIPS, LENGTH, LAYERS, WIDTH = 8, 524_288, 8, 1024
GIB = 2**30
# name -> (remat, tokens of a loss tile and of an MLP tile on each device, share and stream on host)
ROWS = {
    "save everything": ("none", None, None, False),
    "remat per layer": ("full", None, None, False),
    "+ loss tiles of 2,048": ("full", 2048, None, False),
    "+ MLP tiles of 4,096": ("full", 2048, 4096, False),
    "+ residual stream on the host": ("full", 2048, 4096, True),
}
# The same rows of a bare decoder without attention and with an MLP of two matrices.
BARE = ("29.6, rejected", "9.90", "1.84", "1.56", "0.77; host 1.00")


def plan_of(name: str) -> Plan:
    remat, loss_tile, mlp_tile, on_host = ROWS[name]
    experiment = Experiment(
        model=TransformerConfig(
            num_layers=LAYERS,
            width=WIDTH,
            num_heads=8,
            mlp_width=4096,
            window=128,
            remat=remat,
        ),
        data=DataConfig(batch_size=1, seq_len=LENGTH, vocab_size=32_768),
        optimizer=OptimizerConfig(),
        train=TrainConfig(
            compute_dtype="bfloat16", loss_tile=LENGTH if loss_tile is None else CHIPS * loss_tile
        ),
        mesh=MeshConfig(data=1, sequence=CHIPS),
        sequence=SequenceConfig(kind="halo"),
        memory=MemoryConfig(
            mlp_tile=None if mlp_tile is None else CHIPS * mlp_tile,
            residual_on_host=on_host,
            residual_dtype="bfloat16",
        ),
    )
    return compile_plan(experiment, "v5e:2x4", name=name)


def main() -> None:
    lines = []
    for (name, _), bare in zip(ROWS.items(), BARE, strict=True):
        plan = plan_of(name)
        memory = plan.memory
        total = "rejected" if plan.fits is False else f"{memory.total / GIB:.2f}"
        row = [name, f"{memory.temporaries / GIB:.2f}", f"{memory.host / GIB:.2f}", total, bare]
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    versions = ", ".join(f"{n} {v}" for n, v in plan.versions.items() if v is not None)
    stream = LAYERS * LENGTH // CHIPS * WIDTH * 2 / GIB
    text = (
        f"# Long sequences on few chips: static\n\n{(__doc__ or '').split(chr(10) * 2)[2]}\n\n"
        f"    python {' '.join(sys.argv)}\n\n{plan.date}; v5e:2x4; {versions}.\n\n"
        "| variant | temporaries, GiB a chip | host, GiB | in all, GiB | a bare decoder's |\n"
        f"|---|---|---|---|---|\n{chr(10).join(lines)}\n\n"
        f"The residual stream is layers x tokens x width x 2 bytes = {stream:.2f} GiB a chip. The "
        "last column: temporaries of a decoder without attention and with an MLP of two matrices, "
        "compiled for the same chips by the same compiler. Ours are larger: the logits, their "
        "gradients and the sums of the loss are float32 (whole: 8 GiB for one such array a chip), "
        "the MLP has a third matrix, and parameters are gathered for each layer.\n"
    )
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
