"""Layouts of nested stacks as text: `["m4", ["T1m4", ["T26"], "m4T1"], "m4"]`.

A stage is innermost, `[stack]`, or goes through another on a shorter sequence,
`[encoder, stage, decoder]`. A stack is a run of layers: a letter, then how many of them. m is a
state space (Mamba-2), t is attention; capital letters add a gated MLP. Source: Hwang et al. 2025,
H-Net (arXiv 2507.07955), whose configuration files hold the same lists.
"""

import re
from dataclasses import dataclass
from typing import NoReturn

LETTERS = "mMtT"
_TOKEN = re.compile(r'\s*(\[|\]|,|"[^"]*"|\'[^\']*\')')
_RUN = re.compile(rf"([{LETTERS}])(\d+)")


@dataclass(frozen=True)
class StageLayout:
    """One letter per layer. inner None: the innermost stage, whose only stack is `encoder`."""

    encoder: str
    inner: "StageLayout | None" = None
    decoder: str = ""

    def stages(self) -> "tuple[StageLayout, ...]":
        """This stage and all inside it, outermost first."""
        return (self, *(() if self.inner is None else self.inner.stages()))

    def height(self) -> int:
        """Projections onto the residual stream in this stage's own stacks."""
        return sum(2 if letter.isupper() else 1 for letter in self.encoder + self.decoder)


def parse_layout(text: str, name: str = "layout") -> StageLayout:
    """Raises ValueError that points at the character where the text stops making sense."""
    stage, end = _Parser(text, name).stage(0)
    rest = text[end:].strip()
    if rest:
        _fail(text, name, end + len(text[end:]) - len(text[end:].lstrip()), "the end")
    return stage


class _Parser:
    def __init__(self, text: str, name: str):
        self.text, self.name = text, name

    def token(self, at: int, wanted: str) -> tuple[str, int, int]:
        """(token, where it starts, where it ends)."""
        match = _TOKEN.match(self.text, at)
        if match is None:
            start = at + len(self.text[at:]) - len(self.text[at:].lstrip())
            _fail(self.text, self.name, start, wanted)
        return match[1], match.start(1), match.end()

    def expect(self, at: int, symbol: str, wanted: str | None = None) -> int:
        wanted = f"{symbol!r}" if wanted is None else wanted
        token, start, end = self.token(at, wanted)
        if token != symbol:
            _fail(self.text, self.name, start, wanted)
        return end

    def stage(self, at: int) -> tuple[StageLayout, int]:
        at = self.expect(at, "[", "'[', which begins a stage")
        encoder, at = self.stack(at)
        token, start, end = self.token(at, "']' or ','")
        if token == "]":
            if not encoder:
                _fail(self.text, self.name, start, "a layer: the innermost stack has one at least")
            return StageLayout(encoder), end
        if token != ",":
            _fail(self.text, self.name, start, "']' or ','")
        inner, at = self.stage(end)
        decoder, at = self.stack(self.expect(at, ","))
        return StageLayout(encoder, inner, decoder), self.expect(at, "]")

    def stack(self, at: int) -> tuple[str, int]:
        wanted = 'a stack in quotes, such as "T2m4"'
        token, start, end = self.token(at, wanted)
        if token[0] not in "\"'":
            _fail(self.text, self.name, start, wanted)
        runs, place, layers = token[1:-1], 0, ""
        while place < len(runs):
            run = _RUN.match(runs, place)
            if run is None:
                known = place < len(runs) and runs[place] in LETTERS
                wanted = "a number of layers" if known else f"one of the letters {LETTERS}"
                _fail(self.text, self.name, start + 1 + place + known, wanted)
            layers += run[1] * int(run[2])
            place = run.end()
        return layers, end


def _fail(text: str, name: str, at: int, wanted: str) -> NoReturn:
    found = f"{text[at]!r} at character {at + 1}" if at < len(text) else "the end"
    raise ValueError(f"{name}: got {found}, expected {wanted}\n  {text}\n  {' ' * at}^")
