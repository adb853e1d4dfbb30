"""Training adaptive models: stopping and resuming change no number, untrained state included."""

import jax
import numpy as np
import pytest
from covering import thinned
from train_setup import experiment, losses, stop_at

from effattn.models.based import BasedModelConfig
from effattn.models.hnet import HNetConfig
from effattn.models.mor import MoRConfig
from effattn.models.parscale import ParScaleConfig
from effattn.nn.compact import CapacityConfig
from effattn.train.checkpoint import load_run
from effattn.train.loop import train

BASE = {"width": 16, "num_heads": 2}
MODELS = {
    "hnet": HNetConfig(
        layout='["t1", ["T1"], "t1"]',
        width=16,
        inner_widths=(24,),
        num_heads=(2,),
        targets=(3.0,),
        capacity=CapacityConfig(mode="bucket", rungs=(0.6, 1.0), pooled=True),
    ),
    # What it remembers between steps: loads of the depths, an estimate, the step of a warm-up.
    "mor": MoRConfig(
        **BASE,
        num_layers=5,
        num_kv_heads=None,
        routing="token",
        score="sigmoid",
        balance="loss_free",
        gap_every=2,
    ),
    "parscale": ParScaleConfig(
        base=BasedModelConfig(**BASE, num_layers=2, feature_dim=4, pattern=("linear", "window")),
        streams=2,
        prefix_length=3,
    ),
}


@pytest.mark.parametrize("name", thinned(MODELS, 3))
def test_a_resumed_run_equals_an_unbroken_one(name, tmp_path, monkeypatch):
    plan = {"model": MODELS[name], "steps": 4, "checkpoint_every": 1, "keep_last": 9}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(experiment(**plan), whole)["status"] == "finished"
    with monkeypatch.context() as patch:
        stop = stop_at(patch, 2)
        assert train(experiment(**plan), broken, stop=stop) == {"status": "stopped", "step": 2}
    assert train(experiment(**plan), broken)["status"] == "finished"
    assert losses(broken) == losses(whole)
    ends = [load_run(str(folder), None).params for folder in (whole, broken)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
