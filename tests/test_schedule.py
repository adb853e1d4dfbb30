"""Schedules against values worked out by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from effattn.experiment import SCHEDULES, OptimizerConfig
from effattn.train.schedule import make_schedule


def schedule(name, *, steps=100, batch_size=8, seq_len=64, **fields):
    config = OptimizerConfig(
        **{"schedule": name, "learning_rate": 0.5, "warmup_steps": 10, "final_fraction": 0.1}
        | fields
    )
    return make_schedule(config, steps=steps, batch_size=batch_size, seq_len=seq_len)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "inverse_sqrt"])
def test_warm_up_rises_from_the_first_step_and_reaches_the_peak(name):
    values = schedule(name)(jnp.arange(10))
    np.testing.assert_allclose(values, 0.5 * np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_last_step_uses_the_final_fraction(name):
    np.testing.assert_allclose(schedule(name)(99), 0.05, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "step", "value"),
    [
        ("cosine", 54, 0.05 + 0.45 / 2),  # progress 45 / 90
        ("cosine", 39, 0.05 + 0.45 * (1 + math.cos(math.pi / 3)) / 2),  # progress 30 / 90
        ("linear", 54, 0.5 * (1 - 0.9 / 2)),
        ("wsd", 49, 0.5),
        ("wsd", 89, 0.5),  # the decay takes the last ten steps
        ("wsd", 94, 0.5 * (1 - 0.9 / 2)),
        ("inverse_sqrt", 39, 0.5 * math.sqrt(10 / 40)),
        ("inverse_sqrt", 99, 0.5 * math.sqrt(10 / 100)),
    ],
)
def test_values(name, step, value):
    np.testing.assert_allclose(schedule(name)(step), value, rtol=1e-6)


def test_power_is_the_peak_until_the_law_falls_below_it():
    """min(peak, batch a n^b), n tokens seen; then linearly to a tenth of its value at the decay."""
    lr = schedule("power", power_a=1.0, power_b=-0.5)

    def law(s):
        return 8 * (s * 8 * 64) ** -0.5

    assert law(11) < 0.5
    np.testing.assert_allclose(lr(0), 0.1 * min(0.5, law(1)), rtol=1e-5)
    np.testing.assert_allclose(lr(10), law(11), rtol=1e-5)
    np.testing.assert_allclose(lr(79), law(80), rtol=1e-5)
    np.testing.assert_allclose(lr(94), law(90) * (1 - 0.9 / 2), rtol=1e-5)
    np.testing.assert_allclose(lr(99), law(90) * 0.1, rtol=1e-5)
    capped = schedule("power", power_a=1.0, power_b=-0.5, learning_rate=0.01)
    np.testing.assert_allclose(capped(79), 0.01, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "fields", [{"warmup_steps": 0}, {"warmup_steps": 500}, {"decay_fraction": 0.0}]
)
def test_odd_settings_stay_finite_and_below_the_peak(name, fields):
    values = schedule(name, **fields)(jnp.arange(100))
    assert np.isfinite(values).all() and (values > 0).all() and (values <= 0.5 + 1e-6).all()


def test_an_unknown_schedule_is_refused_with_near_matches():
    with pytest.raises(ValueError, match=r"optimizer\.schedule: got 'cosin'.*did you mean cosine"):
        schedule("cosin")
