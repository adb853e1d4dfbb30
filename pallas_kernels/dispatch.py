"""How an op picks its backend: one table per op, one sentence per refusal.

An op holds a literal table, name -> "module:attribute" of a `Backend`, in order of preference.
Modules are imported when a call first looks at them, so importing an op stays cheap.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from effattn.checks import check_in

logger = logging.getLogger("effattn.dispatch")

Table = Mapping[str, str]


@dataclass(frozen=True)
class Backend:
    """One way to compute an op. The op's `api.py` says what the three functions take and give.

    refuses: static description of a call -> a sentence that says why not, or None. It may look at
    shapes, dtypes, masks and the platform, never at values.
    """

    name: str
    refuses: Callable[[Any], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


@functools.cache
def load(path: str) -> Backend:
    """The backend behind "module:attribute"."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def choose(op: str, table: Table, call: Any, implementation: str) -> Backend:
    """The backend for `call`: the first that does not refuse for "auto", else the named one.

    Raises ValueError for an unknown name, and with the backend's own sentence where it refuses.
    """
    check_in("implementation", implementation, ["auto", *table])
    if implementation != "auto":
        backend = load(table[implementation])
        reason = backend.refuses(call)
        if reason is not None:
            raise ValueError(f"implementation: {implementation!r} refuses this {op}: {reason}")
        return backend
    refusals: list[str] = []
    for name, path in table.items():
        backend = load(path)
        reason = backend.refuses(call)
        if reason is None:
            _log_once(op, name, "; ".join(refusals))
            return backend
        refusals.append(f"{name} refuses: {reason}")
    raise ValueError(f"implementation: no backend takes this {op}: {'; '.join(refusals)}")


def explain(table: Table, call: Any) -> str:
    """One line per backend, in order of preference: taken by "auto", able to run, or why not."""
    lines, taken = [], False
    for name, path in table.items():
        reason = load(path).refuses(call)
        if reason is not None:
            lines.append(f"{name}: refuses: {reason}")
        else:
            lines.append(f"{name}: {'could run' if taken else 'taken by auto'}")
            taken = True
    return "\n".join(lines)


@functools.cache
def _log_once(op: str, name: str, refusals: str) -> None:
    reason = refusals or "it is the first in order of preference"
    logger.info("%s: auto takes %s (%s)", op, name, reason)
