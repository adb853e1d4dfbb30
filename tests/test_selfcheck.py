"""The self check: it covers what is registered, passes here, and fails where a law is broken."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from effattn import selfcheck
from effattn.models import MODELS

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("masks", "golden")


def test_every_registered_model_is_checked():
    assert set(selfcheck.SMALL_MODELS) == set(MODELS)
    names = [check.name for check in selfcheck.CHECKS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(
            check, id=check.name, marks=[] if check.name.startswith(QUICK) else pytest.mark.slow
        )
        for check in selfcheck.CHECKS
    ],
)
def test_the_check_passes_here(check):
    distance, limit = check.run()
    assert distance <= limit


def test_the_vectors_in_the_package_are_those_of_the_tests():
    folder = ROOT / "effattn" / "selfcheck_data"
    for path in folder.glob("*.npz"):
        assert path.read_bytes() == (ROOT / "tests" / "golden" / path.name).read_bytes()


def test_distance_is_relative_and_sees_nan():
    assert selfcheck.distance(np.array([1e6, 1.0]), np.array([1e6, 2.0])) == 1e-6
    assert selfcheck.distance(np.array([0.1]), np.array([0.3])) == pytest.approx(0.2)
    assert selfcheck.distance(np.array([-np.inf, 1.0]), np.array([-np.inf, 1.0])) == 0
    assert selfcheck.distance(np.array([np.nan]), np.array([1.0])) == np.inf
    assert selfcheck.distance(np.array([-np.inf]), np.array([1.0])) == np.inf


class Leaky:
    """Logits that hang on the mean of all tokens, later ones too."""

    def __call__(self, model, tokens, info):
        seen = tokens + tokens.mean(axis=1, keepdims=True)
        return seen[..., None] * jnp.ones((1, 1, selfcheck.VOCAB))


class Deaf(Leaky):
    """Logits that hang on nothing: every equality holds."""

    def __call__(self, model, tokens, info):
        return jnp.ones((*tokens.shape, selfcheck.VOCAB))


@pytest.mark.parametrize("mutant", [Leaky, Deaf])
def test_the_check_of_causality_finds_a_leak_and_a_model_that_hears_nothing(monkeypatch, mutant):
    monkeypatch.setattr(selfcheck, "_small", lambda name: None)
    monkeypatch.setattr(selfcheck, "_logits", mutant())
    distance, limit = selfcheck._causality("any")
    assert distance > limit
