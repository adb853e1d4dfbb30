"""The layout that everything else relies on: links, names, import direction, the wheel."""

import importlib
import logging
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("models", "pallas_kernels", "configs")


def modules(folder: Path) -> set[str]:
    """Every .py below `folder`, links followed."""
    found = set()
    for parent, _, names in os.walk(folder, followlinks=True):
        found |= {str((Path(parent) / n).relative_to(folder)) for n in names if n.endswith(".py")}
    return found


@pytest.mark.parametrize("name", LINKED)
def test_a_top_level_folder_is_the_package_by_a_relative_link(name):
    assert os.readlink(ROOT / "effattn" / name) == f"../{name}"
    assert modules(ROOT / "effattn" / name) == modules(ROOT / name)
    assert len(modules(ROOT / name)) >= 3


@pytest.mark.parametrize("name", LINKED)
def test_a_bare_import_is_refused(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=f"import effattn.{name}"):
        importlib.import_module(name)


def test_every_folder_with_modules_is_a_package():
    for module in modules(ROOT / "effattn"):
        assert (ROOT / "effattn" / Path(module).parent / "__init__.py").exists(), module


def test_no_file_is_a_drawer():
    for folder in ("effattn", "scripts", "tests"):
        for module in modules(ROOT / folder):
            assert Path(module).stem not in ("utils", "util", "common", "helpers", "misc"), module


def test_imports_point_one_way():
    from importlinter.cli import lint_imports

    try:
        assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0
    finally:
        # It configures logging anew, which silences every logger that was there before.
        logging.getLogger("effattn").disabled = False


def test_constraints_name_versions_and_no_host():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert any(line.startswith("jax==") for line in lines)
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9a-z.+]+", line), line


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, so that setuptools leaves no build/ in the checkout.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "effattn", *LINKED):
        subprocess.run(["cp", "-a", str(ROOT / name), str(source)], check=True)
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_one_import_package_with_every_module(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"effattn"}
    packed = {name.removeprefix("effattn/") for name in names if name.endswith(".py")}
    assert packed == modules(ROOT / "effattn")
    data = {p.name for p in (ROOT / "effattn" / "selfcheck_data").glob("*.npz")}
    assert data and {f"effattn/selfcheck_data/{name}" for name in data} <= set(names)
    assert "effattn/py.typed" in names
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert b"effattn = effattn.cli:main" in zipfile.ZipFile(wheel).read(entry_points)


def test_a_config_is_found_by_bare_name_in_the_wheel_alone(wheel, tmp_path):
    code = (
        "import effattn.config as c, effattn.configs;"
        "print(effattn.configs.__file__);"
        "print(c.load_config('quickstart', ['--config.model.width=96']).model.width)"
    )
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, width = done.stdout.split()
    assert where.startswith(str(wheel)) and width == "96"
