"""The studies of recall: what a name builds, the sizes of the states, the pages they write."""

import sys
from pathlib import Path

import pytest

from effattn.config import load_config

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import read_twice_study
import recall_curve


def test_every_entry_of_the_curve_is_a_config_and_names_its_layers():
    for names in recall_curve.LAYERS.values():
        for name in names:
            layers = load_config(f"recall:{name}").model.layers()
            assert layers[0] == "conv" and len(layers) == 2 + name.count("+")
    both = load_config("recall:elu8+window3").model
    assert (both.feature_map, both.feature_dim, both.window) == ("elu", 8, 3)
    with pytest.raises(ValueError, match="layers: got 'taylor', expected taylorN"):
        load_config("recall:taylor")
    with pytest.raises(ValueError, match="reading: got 'thrice2', expected once, twice or prefix"):
        load_config("read_twice:thrice2")


@pytest.mark.parametrize("name, floats", [("taylor4", 15 * 65), ("elu16", 16 * 65)])
def test_the_curve_counts_the_sums_of_a_linear_layer(name, floats):
    found = recall_curve.sizes(load_config(f"recall:{name}"))
    # Beside the sums of one head of 64 values: the number of its document.
    assert found["bytes"] - found["conv_bytes"] == 4 * (floats + 1)


def test_the_pages_hold_every_number_and_a_small_picture(tmp_path):
    points = [
        {"family": "Taylor", "layers": "taylor2", "accuracies": [0.25, 0.75], "steps": 7}
        | {"bytes": 2611, "conv_bytes": 1028}
    ]
    page = tmp_path / "curve.md"
    recall_curve.write(points, page, "by hand", load_config("recall:taylor2"))
    page.write_text(page.read_text() + "\n## What it shows\n\nKept.\n")
    recall_curve.write(points, page, "by hand", load_config("recall:taylor2"))
    assert page.read_text().count("Kept.") == page.read_text().count("# Recall against") == 1
    row = "| `taylor2` | 2,611 | 7 | 0.2500, 0.7500 | 0.5000 |"
    assert row in page.read_text() and "by hand" in page.read_text()

    points = [{"reading": "once2", "accuracies": [(0.5, 0.25)], "bytes": 1688}]
    twice = tmp_path / "twice.md"
    read_twice_study.write(points, twice, "by hand", load_config("read_twice:once2"))
    assert "| `once2` | 1,688 | 0.500 | 0.250 | 0.500 | 0.250 |" in twice.read_text()
    assert all(0 < path.stat().st_size < 200 * 1024 for path in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 2
