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


def each_value(cases):
    """Few cases in which every value of every factor occurs, found greedily; the others are left to
    the slow tests. A case is a dict, or a tuple of several arguments."""
    factors = [set(_values(case)) for case in cases]
    missing, kept = set().union(*factors), set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(factors[i] & missing))
        missing -= factors[best]
        kept.add(best)
    return [_param(case, slow=i not in kept) for i, case in enumerate(cases)]


def thinned(names, every=2):
    """The first of `every` names and so on; the others are left to the slow tests."""
    return [_param(name, slow=bool(i % every)) for i, name in enumerate(names)]


def _values(case):
    pairs = case.items() if isinstance(case, dict) else enumerate(case)
    return [(factor, repr(value)) for factor, value in pairs]


def _param(case, *, slow):
    arguments = case if isinstance(case, tuple) else (case,)
    return pytest.param(*arguments, marks=pytest.mark.slow if slow else ())
