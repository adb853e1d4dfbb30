"""The smallest run that goes through every part of training; shared by the tests of training."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.based import BasedModelConfig
from effattn.parallel.mesh import MeshConfig
from effattn.train.metrics import Metrics

CORPUS = Path(__file__).resolve().parent.parent / ".cache" / "test_corpus"


def corpus() -> str:
    """A folder of small texts, the same in every process."""
    if not (CORPUS / "done").exists():
        CORPUS.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)
        words = ["sun", "moon", "star", "sky", "rain", "wind", "snow", "leaf"]
        for number in range(40):
            text = " ".join(draw.choice(words) for _ in range(60)) + "\n"
            (CORPUS / f"{number}.txt").write_text(text)
        (CORPUS / "done").write_text("")
    return str(CORPUS / "*.txt")


def experiment(
    *, batch_size=8, mesh=None, optimizer="adamw", model=None, data=None, **train
) -> Experiment:
    if model is None:
        model = BasedModelConfig(
            num_layers=2, width=16, num_heads=2, feature_dim=4, pattern=("conv", "linear")
        )
    if data is None:
        data = {"source": corpus(), "seq_len": 16, "validation_fraction": 0.2}
    train = {"steps": 4, "eval_batches": 2, "tensorboard": False} | train
    return Experiment(
        model=model,
        data=DataConfig(batch_size=batch_size, cache_dir=str(CORPUS / "cache"), **data),
        optimizer=OptimizerConfig(name=optimizer, learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(**train),
        mesh=MeshConfig(data=1) if mesh is None else mesh,
    )


def stop_at(monkeypatch, wanted: int) -> Callable[[], bool]:
    """A `stop` for `train`: true from step `wanted` on.

    Runs that differ only in where they stop share their compiled programs; runs of different
    `steps` do not, for the schedule is part of the program.
    """
    taken = 0
    take = Metrics.step

    def step(self, number, values):
        nonlocal taken
        taken = number
        take(self, number, values)

    monkeypatch.setattr(Metrics, "step", step)
    return lambda: taken >= wanted


def losses(workdir) -> dict[int, float]:
    """step -> loss of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").open()]
    return {line["step"]: line["loss"] for line in lines}
