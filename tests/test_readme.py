"""The README's Python runs as it stands."""

import re
from pathlib import Path


def test_the_examples_run():
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    exec("\n".join(blocks), names)
    assert names["y"].shape == names["x"].shape
