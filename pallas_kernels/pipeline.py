"""The order in which the step of a TPU kernel is written, piece by piece."""

from collections.abc import Callable, Sequence
from typing import Any


def pipelined[P](
    pieces: Sequence[P],
    begin: Callable[[P], Any],
    finish: Callable[[P, Any], None],
    ahead: int,
) -> None:
    """finish(piece, begin(piece)) for every piece, `begin` called `ahead` pieces early.

    All is one basic block of the program, and the order in which it is written is the order from
    which the compiler's scheduler starts: so the products that `begin` asks for wait in the matrix
    units while the vector units are at an earlier piece.
    """
    begun: list[Any] = [begin(piece) for piece in pieces[:ahead]]
    for i, piece in enumerate(pieces):
        if i + ahead < len(pieces):
            begun.append(begin(pieces[i + ahead]))
        finish(piece, begun[i])
        begun[i] = None
