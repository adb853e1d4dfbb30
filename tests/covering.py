"""Few cases that cover many: every two values of every two factors meet in one of them."""

import itertools

import numpy as np
import pytest


def pairwise(factors):
    """Cases such that every two values of every two factors meet, found greedily."""
    names, rng = list(factors), np.random.default_rng(0)
    values = [range(len(factors[name])) for name in names]
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in values[a]
        for j in values[b]
    }

    def new(case):
        pairs = itertools.combinations(enumerate(case), 2)
        return {(a, i, b, j) for (a, i), (b, j) in pairs} & missing

    cases = []
    while missing:
        tries = [[int(rng.integers(len(v))) for v in values] for _ in range(200)]
        best = max(tries, key=lambda case: len(new(case)))
        missing -= new(best)
        if best:
            cases.append({n: factors[n][i] for n, i in zip(names, best, strict=True)})
    return cases


def thinned(cases, every=2):
    """The first of `every` cases and so on; the others are left to the slow tests. A case that is a
    tuple is several arguments."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=pytest.mark.slow if i % every else (),
        )
        for i, case in enumerate(cases)
    ]
