"""One experiment as a value: model, data, optimizer, training, mesh. A config file builds one.

Every field is a number, a string, a tuple or a nested config, so the command line can override it
(`--config.train.steps=100`) and `config.json` can record it. `validate` checks what no single part
can check alone.
"""

from dataclasses import dataclass, field
from typing import Any

from effattn.checks import check_at_least, check_in, check_multiple
from effattn.data.config import DataConfig
from effattn.nn.memory import MemoryConfig
from effattn.parallel.mesh import MeshConfig
from effattn.parallel.sequence import SequenceConfig

OPTIMIZERS = ("adamw", "lamb", "lion", "muon", "adafactor")
SCHEDULES = ("cosine", "linear", "wsd", "inverse_sqrt", "power")
COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclass(kw_only=True)
class OptimizerConfig:
    name: str = "adamw"
    learning_rate: float = 1e-3  # the peak; for adafactor relative to each parameter's RMS
    schedule: str = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1  # last learning rate / peak (wsd, power: / that before the decay)
    decay_fraction: float = 0.1  # wsd and power: the share of the steps spent in the final decay
    power_a: float = 4.6  # power: min(learning_rate, batch * a * tokens ** b)
    power_b: float = -0.51
    weight_decay: float = 0.1  # decoupled, times the learning rate; matrices and convolutions
    decay_embeddings: bool = False
    clip: float | None = 1.0  # global gradient norm
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_steps: int = 5  # Newton-Schulz iterations
    muon_rms: float = 0.2  # RMS of a matrix's update before the learning rate, whatever its shape
    adam_ratio: float = 1.0  # muon: learning rate of everything that is no matrix / learning_rate
    adafactor_min_dim: int = 128  # a matrix is factored where both sides are at least this long


@dataclass(kw_only=True)
class TrainConfig:
    steps: int = 1000
    seed: int = 0
    log_every: int = 1
    eval_every: int | None = None  # None: at the end only
    eval_batches: int | None = None  # None: the whole validation split, as always at the end
    checkpoint_every: int | None = 500  # None: at the end only
    keep_last: int = 2
    keep_best: int = 1  # by validation loss, among checkpoints saved at an evaluation
    accumulation: int = 1  # microbatches per step
    compute_dtype: str = "float32"
    z_loss: float = 0.0
    loss_tile: int | None = None  # positions per row whose logits exist at once; None: by size
    init_from: str | None = None  # a run directory or a safetensors file
    allow_data_change: bool = False  # resume on other data; its stream then starts anew
    profile_steps: tuple[int, int] | None = None  # trace from after the first to after the second
    tensorboard: bool = True  # where a writer is installed
    wandb_project: str | None = None


@dataclass(kw_only=True)
class Experiment:
    model: Any  # a config with build(*, vocab_size, sequence, dtype, rngs)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)


def validate(experiment: Experiment) -> None:
    """Raises ValueError that names the field, what it holds and what is wanted."""
    optimizer, train = experiment.optimizer, experiment.train
    experiment.memory.check()
    check_in("optimizer.name", optimizer.name, OPTIMIZERS)
    check_in("optimizer.schedule", optimizer.schedule, SCHEDULES)
    check_in("train.compute_dtype", train.compute_dtype, COMPUTE_DTYPES)
    _positive("optimizer.learning_rate", optimizer.learning_rate)
    check_at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    check_at_least("optimizer.weight_decay", optimizer.weight_decay, 0)
    check_at_least("optimizer.muon_steps", optimizer.muon_steps, 1)
    check_at_least("optimizer.adafactor_min_dim", optimizer.adafactor_min_dim, 1)
    _positive("optimizer.adam_ratio", optimizer.adam_ratio)
    _positive("optimizer.eps", optimizer.eps)
    _positive("optimizer.muon_rms", optimizer.muon_rms)
    for name in ("final_fraction", "decay_fraction"):
        _between(f"optimizer.{name}", getattr(optimizer, name), 0.0, 1.0)
    for name in ("b1", "b2", "muon_momentum"):
        value = getattr(optimizer, name)
        if not 0 <= value < 1:
            raise ValueError(f"optimizer.{name}: got {value}, expected 0 <= {name} < 1")
    if optimizer.clip is not None:
        _positive("optimizer.clip", optimizer.clip)
    for name in ("steps", "log_every", "keep_last", "accumulation"):
        check_at_least(f"train.{name}", getattr(train, name), 1)
    for name in ("seed", "keep_best", "z_loss"):
        check_at_least(f"train.{name}", getattr(train, name), 0)
    for name in ("eval_every", "eval_batches", "checkpoint_every", "loss_tile"):
        value = getattr(train, name)
        if value is not None:
            check_at_least(f"train.{name}", value, 1)
    check_multiple(
        "data.batch_size", experiment.data.batch_size, "train.accumulation", train.accumulation
    )
    if train.profile_steps is not None:
        steps = train.profile_steps
        if len(steps) != 2 or not 0 <= steps[0] < steps[1] <= train.steps:
            raise ValueError(
                f"train.profile_steps: got {steps}, expected (start, stop) with "
                f"0 <= start < stop <= train.steps={train.steps}"
            )


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: got {value}, expected more than 0")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, expected between {low} and {high}")
