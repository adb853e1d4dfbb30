"""Opening a run that `effattn train` has left, for the commands that read one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import whole_rows
from effattn.config import ConfigError, apply_overrides
from effattn.data.config import IMAGES, TASKS, DataConfig
from effattn.data.tokenizer import Tokenizer, load_tokenizer
from effattn.experiment import Experiment
from effattn.train.checkpoint import load_run


class OpenRun(NamedTuple):
    experiment: Experiment
    model: Any
    step: int
    vocab_size: int


def open_run(workdir: str, step: str | None, overrides: Sequence[str] = ()) -> OpenRun:
    """The model and the config of a checkpoint: a number, "best", or "latest" (also None).

    overrides: of `config.data` alone. Raises ValueError where the run or the step is not there, a
    parameter is not finite, or an override touches the model.
    """
    for override in overrides:
        key = override.split("=")[0]
        if not key.lstrip("-").removeprefix("no").startswith("config.data."):
            raise ConfigError(
                f"{key}: the model is trained, so only fields of config.data can be changed"
            )
    if step not in (None, "best", "latest") and not step.isdecimal():
        raise ValueError(f"--step: got {step!r}, expected a number, best or latest")
    chosen = None if step in (None, "latest") else step if step == "best" else int(step)
    run = load_run(workdir, chosen)
    apply_overrides(run.experiment, overrides)
    model = nnx.merge(run.graphdef, run.params)
    return OpenRun(
        run.experiment, model, run.step, vocabulary_of(model, run.experiment.data.seq_len)
    )


def vocabulary_of(model: Any, seq_len: int) -> int:
    """The number of logits per token of a row of seq_len tokens; nothing is computed."""
    graphdef, params = nnx.split(model)

    def logits(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        row = jnp.ones((1, seq_len), jnp.int32)
        return model.logits(model(row, whole_rows(row)).hidden)

    return jax.eval_shape(logits, params).shape[-1]


def tokenizer_of(data: DataConfig, vocab_size: int) -> Tokenizer | None:
    """The tokenizer behind the ids of a run; None where they are bare numbers (a task, an array of
    ids whose tokenizer was not stated, images)."""
    if any(source in (*TASKS, *IMAGES) for source in data.sources):
        return None
    tokenizer = load_tokenizer(data.tokenizer)
    masks = int(data.prefix_length > 0)  # an id beyond the tokenizer's
    return tokenizer if tokenizer.vocab_size + masks == vocab_size else None
