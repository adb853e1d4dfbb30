"""The plan as a value: its sums, its bound, its JSON."""

import json

import pytest

from effattn.plan.report import Plan, read_plan
from plan_setup import GIB, plan


def test_memory_counts_what_is_donated_once():
    memory = plan().memory
    assert memory.total == 12 * GIB and memory.fits
    assert memory.arguments == 6.5 * GIB


def test_the_bound_hides_memory_behind_work_and_adds_exposed_collectives():
    found = plan()
    assert found.largest_term == "links" and found.step_seconds == pytest.approx(2.0)
    assert found.tokens_per_second == pytest.approx(8192)
    assert found.mfu_bound == pytest.approx(0.25)  # half a second of work in two


def test_json_gives_the_plan_back():
    found = plan()
    text = found.to_json()
    assert Plan.from_json(text) == found
    derived = json.loads(text)["derived"]
    assert derived["total"] == 12 * GIB and derived["fits"] is True


@pytest.mark.parametrize(
    "text, says",
    [
        ("nothing", "got no JSON"),
        ("[1]", "got format list"),
        ('{"loss": 1}', "got format None"),
        ('{"format": 1, "method": "compiled"}', "missing or wrong"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_in_a_sentence(tmp_path, text, says):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        read_plan(path, "--diff")
    assert str(error.value).startswith(f"--diff: {path}")
    with pytest.raises(ValueError, match="cannot read"):
        read_plan(tmp_path / "missing.json", "--diff")
