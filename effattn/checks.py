"""Argument checks whose errors name the argument, what came and what is wanted."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

Dims = dict[str, tuple[int, str]]


def check_shape(name: str, array: Any, spec: str, dims: Dims) -> None:
    """Raises ValueError unless `array.shape` fits `spec`; binds the letters it meets first.

    spec: one letter per axis, `"b s k h"`. dims: letter -> (size, argument that set it); this call
    adds the letters that are still free, so one dict ties the arguments of an op together.

    >>> check_shape("value", value, "b s k h", dims)
    ValueError: value: expected [b=2, s=1024, k=4, h=any], got (2, 1024, 8, 64): k is 4 from `key`
    """
    letters = spec.split()
    shape = tuple(array.shape)
    wrong = [
        (letter, size)
        for letter, size in zip(letters, shape, strict=False)
        if letter in dims and dims[letter][0] != size
    ]
    if len(letters) != len(shape) or wrong:
        wanted = ", ".join(f"{x}={dims[x][0] if x in dims else 'any'}" for x in letters)
        reason = "; ".join(f"{x} is {dims[x][0]} from `{dims[x][1]}`" for x, _ in wrong)
        reason = reason or f"{len(letters)} axes are wanted"
        raise ValueError(f"{name}: expected [{wanted}], got {shape}: {reason}")
    for letter, size in zip(letters, shape, strict=True):
        dims.setdefault(letter, (size, name))


def check_in(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError with near matches unless `value` is one of `choices`."""
    choices = list(choices)
    if value in choices:
        return
    near = get_close_matches(str(value), [str(c) for c in choices], n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, choices))}{hint}")


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Raises ValueError unless `value >= minimum`."""
    if not value >= minimum:
        raise ValueError(f"{name}: got {value}, expected at least {minimum}")


def check_multiple(name: str, value: int, of: str, divisor: int) -> None:
    """Raises ValueError unless `divisor` divides `value`; `of` names the divisor's argument."""
    if divisor < 1 or value % divisor:
        raise ValueError(f"{name}: got {value}, expected a multiple of {of}={divisor}")


def check_same_length(name: str, values: Sequence[Any], length: int, of: str) -> None:
    """Raises ValueError unless `len(values) == length`; `of` says what sets the length."""
    if len(values) != length:
        raise ValueError(f"{name}: got {len(values)} entries, expected {length}, one per {of}")
