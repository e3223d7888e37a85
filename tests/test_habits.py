"""The files around the package say the same as the package: one version, one command that tests, true instructions."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import mech_absa
from mech_absa.edits import FAMILIES
from mech_absa.metrics import METRICS
from mech_absa.patch.corruption import WORDS
from mech_absa.readers import FORMATS

ROOT = Path(__file__).resolve().parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_version(release):
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == mech_absa.__version__
    assert f"## {mech_absa.__version__}\n" in text("docs/changelog.md")
    for name, pattern in release.PLACES.items():
        changed = release.with_version(text(name), pattern, "9.8.7")
        assert changed.replace("9.8.7", mech_absa.__version__) == text(name) != changed


def test_a_release_is_refused_for_a_reason(release):
    assert release.check("0.2.0", "# Changelog\n\n## 0.2.0\n", "") is None
    assert "three numbers" in release.check("0.2", "## 0.2\n", "")
    assert "no section '## 0.2.0'" in release.check("0.2.0", "## 0.2.01\n", "")
    assert "working tree" in release.check("0.2.0", "## 0.2.0\n", " M README.md\n")
    with pytest.raises(ValueError, match="2 lines name the version"):
        release.with_version("version: 1\nversion: 2\n", re.compile(r"(?m)^version: (\S+)$"), "3")


def test_the_workflow_runs_what_a_contributor_runs():
    jobs = yaml.safe_load(text(".github/workflows/test.yml"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["make test"]
    recipe = text("Makefile").partition("\ntest: ")[2].partition("\n\n")[0]
    assert re.findall(r"-m (ruff check|ruff format --check|mypy|pytest)", recipe) == [
        "ruff check", "ruff format --check", "mypy", "pytest",
    ]  # fmt: skip


def test_the_authors_of_the_paper():
    (paper,) = yaml.safe_load(text("CITATION.cff"))["references"]
    names = [f"{a['given-names']} {a['family-names']}" for a in paper["authors"]]
    assert names == ["Shichen Li", "Zhongqing Wang", "Zheyu Zhao", "Yue Zhang", "Peifeng Li"]


@pytest.mark.parametrize(
    "name, table, file",
    [
        ("FAMILIES", FAMILIES, "mech_absa/edits/edit.py"),
        ("WORDS", WORDS, "mech_absa/patch/corruption.py"),
        ("FORMATS", FORMATS, "mech_absa/readers/__init__.py"),
        ("METRICS", METRICS, "mech_absa/metrics.py"),
    ],
)
def test_contributing_names_the_tables_where_they_are(name, table, file):
    guide = text("CONTRIBUTING.md")
    assert f"`{name}`" in guide and Path(file).parent.as_posix() in guide
    assert re.search(rf"(?m)^{name}\b", text(file)) and len(table) >= 5


def test_every_file_that_contributing_names_exists():
    for path in re.findall(
        r"`((?:mech_absa|tests|docs|scripts|\.github)[\w./]*)`", text("CONTRIBUTING.md")
    ):
        if path != "mech_absa.__all__":
            assert (ROOT / path).exists(), path


def test_issue_forms_parse():
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert {"name", "description", "body"} <= set(yaml.safe_load(form.read_text("utf-8")))
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert [h["id"] for h in hooks] == ["ruff-check", "ruff-format", "floors"]
