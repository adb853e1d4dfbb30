"""What an import brings along: nothing heavy before it is used, and no device is touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

HEAVY = ["jax.experimental.pallas", "orbax", "grain", "scipy", "matplotlib", "tensorstore"]
STAGES = {
    # stage: (modules to import, modules that must not have come along)
    "command": (
        ["effattn.cli", "effattn.commands.train", "effattn.config"],
        ["jax", "flax", "numpy", "ml_collections", *HEAVY],
    ),
    "ops": (
        [
            "effattn.masks",
            "effattn.blocks",
            "effattn.pallas_kernels.attention",
            "effattn.pallas_kernels.delta_rule",
            "effattn.pallas_kernels.linear_attention",
            "effattn.pallas_kernels.prefix_scan",
        ],
        ["flax", "optax", "ml_collections", *HEAVY],
    ),
    # What "auto" asks on every machine, whether it takes the call or not.
    "backends": (
        [
            f"effattn.pallas_kernels.attention.{name}"
            for name in ("tpu", "cudnn", "tokamax", "decode_tpu")
        ],
        ["flax", "optax", "ml_collections", "tokamax", *HEAVY],
    ),
    "layers": (["effattn.nn.mixers.based", "effattn.nn.mixers.attention"], HEAVY),
    "models": (["effattn.models.based", "effattn.models.transformer"], HEAVY),
    "tools": (
        [
            "effattn.experiment",
            "effattn.train.loop",
            "effattn.data.pipeline",
            "effattn.data.baselines",
            "effattn.evaluate",
            "effattn.generate",
            "effattn.export",
            "effattn.plots",
            "effattn.selfcheck",
            "effattn.commands.run_directory",
        ],
        HEAVY,
    ),
}


@pytest.fixture(scope="module")
def present():
    """stage -> the modules of its second list that are there after it; one process for all."""
    code = f"""
import importlib, json, sys
stages, seen = {STAGES!r}, {{}}
for stage, (modules, unwanted) in stages.items():
    for module in modules:
        importlib.import_module(module)
    seen[stage] = [name for name in unwanted if name in sys.modules]
    if stage == "command":
        import jax
        brought = set(sys.modules)
    else:
        seen[stage] = [name for name in seen[stage] if name not in brought]
bridge = sys.modules["jax._src.xla_bridge"]
seen["devices"] = list(bridge._backends)
print(json.dumps(seen))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("stage", STAGES)
def test_an_import_brings_nothing_heavy_along(present, stage):
    assert present[stage] == []


def test_no_import_touches_a_device(present):
    assert present["devices"] == []
