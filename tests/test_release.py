"""The built wheel works without the source, and what an installation holds has a licence."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the source."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(
        ROOT / "mech_absa", source / "mech_absa", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*build, "-w", str(out), str(source)], capture_output=True, text=True)
    if "No module named 'setuptools'" in done.stderr or "BackendUnavailable" in done.stderr:
        pytest.skip("setuptools is not installed here")
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "mech_absa"
    files = {
        p.relative_to(ROOT).as_posix()
        for p in package.rglob("*")
        if p.is_file() and p.suffix not in (".pyc", ".pyo")
    }
    assert files <= inside, sorted(files - inside)[:5]
    assert not [n for n in inside if n.startswith(("tests", "figures", "docs", "benchmarks"))]


@pytest.mark.slow
def test_the_wheel_works_from_an_empty_folder_without_the_source(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=empty, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = run("-c", "import mech_absa; print(mech_absa.__file__)").strip()
    assert Path(where).is_relative_to(site), "the source was imported, not the wheel"
    flags = [
        "--limit",
        "2",
        "--keep",
        "all",
        "--by",
        "role",
        "--sites",
        "mlp_out",
        "--layers",
        "0-1",
    ]
    run("-m", "mech_absa", "patch", *flags, "--no-figures", "--quiet", "--out", "run")
    record = json.loads((empty / "run" / "run.json").read_text())
    assert record["command"] == "patch" and (empty / "run" / "report.html").stat().st_size > 1000
    assert {p.name for p in empty.iterdir()} == {"run"}


def test_every_dependency_says_its_licence():
    spec = importlib.util.spec_from_file_location("licences", ROOT / "scripts" / "licences.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    direct = {module.normal(n) for n in re.findall(r'(?m)^  "([A-Za-z0-9-]+)', named)}
    listed = {n: package for name in sorted(direct) for n, package in module.needed(name).items()}
    assert len(direct) > 20 and direct <= set(listed)
    assert not [n for n, package in listed.items() if module.licence(package) == "not said"]
