"""Every notebook runs from top to bottom, and what is kept of it is what a reader should see.

Two things are checked: the notebooks as they are committed (outputs there, in order, clean, small), without running anything; and a run in
the fast mode, in which `MECH_ABSA_FAST` shrinks the numbers of examples.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import re
from pathlib import Path

import nbformat
import pytest

from mech_absa.widgets import coloured_tokens

ANALYSES = Path(__file__).parents[1] / "analyses"
NOTEBOOKS = sorted(ANALYSES.glob("[0-9]_*.ipynb"))
LIMIT = 1_500_000
"""Bytes of a committed notebook."""

_spec = importlib.util.spec_from_file_location("execute", ANALYSES / "execute.py")
execute = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(execute)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def shown(output) -> list[str]:
    """All texts of an output."""
    data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
    return [
        output.get("text", ""),
        output.get("evalue", ""),
        *output.get("traceback", []),
        *map(str, data.values()),
    ]


def faults(notebook) -> list[str]:
    """What no output may hold, a line each."""
    found = []
    for i, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        expected = "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.outputs:
            said = "\n".join(shown(output))
            said = re.sub(r"data:image/png;base64,[\w+/=]*", "", said)
            if output.output_type == "error" and not expected:
                found.append(f"code cell {i} failed: {said[:300]}")
            if output.get("name") == "stderr" or re.search(r"\w*Warning\b", said):
                found.append(f"code cell {i} warns: {said[:300]}")
            if "Traceback (most recent call last)" in said:
                found.append(f"code cell {i} shows a traceback: {said[:300]}")
            if path := re.search(
                r"(?<![\w.~:/<])/(?:[\w.+-]+/)+[\w.+-]*",
                re.sub(r"https?://\S+|</?\w+[^>]*>", " ", said),
            ):
                found.append(f"code cell {i} shows an absolute path: {path[0]}")
            if (
                len(platform.node()) > 3 and platform.node() in said
            ):  # a shorter name is a word like any other
                found.append(f"code cell {i} names the machine {platform.node()}")
            if "\x1b[" in said or re.search(r"\d+%\|", said):
                found.append(
                    f"code cell {i} shows a progress bar or control characters: {said[:200]}"
                )
    return found


def test_each_notebook_has_a_number_of_its_own_and_a_row_in_the_list():
    assert [int(p.name[0]) for p in NOTEBOOKS] == [1, 2, 3, 4, 5, 6, 7, 8]
    listed = (ANALYSES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({p.name})" in listed for p in NOTEBOOKS)


@each
def test_as_committed_it_was_run_in_order_and_can_be_read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), (
        "run from top to bottom, once"
    )
    assert sum(bool(c.outputs) for c in code) > len(code) / 2 and any(
        "image/png" in o.get("data", {}) for c in code for o in c.outputs
    )
    assert faults(notebook) == []
    assert path.stat().st_size < LIMIT
    assert "CircuitsVis.render(" not in path.read_text(encoding="utf-8"), (
        "the script of a widget weighs 1.3 MB; execute.py leaves it out"
    )
    assert notebook.cells[0].source.startswith("# ") and "question of this notebook" in " ".join(
        notebook.cells[0].source.split()
    )


@each
def test_its_links_lead_somewhere(path):
    for cell in (c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"):
        for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
            assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow) for p in NOTEBOOKS],
    ids=lambda p: p.stem,
)
def test_it_runs_in_the_fast_mode(path):
    notebook = execute.execute(path, fast=True)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code)
    assert faults(notebook) == []


@pytest.mark.slow
def test_a_fast_run_leaves_the_environment_and_the_file_as_they_were(tmp_path, monkeypatch):
    monkeypatch.delenv("MECH_ABSA_FAST", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "as it was")
    cell = nbformat.v4.new_code_cell(
        "import os\nos.environ['MECH_ABSA_FAST'], os.environ['HF_HUB_OFFLINE'], os.path.basename(os.getcwd())"
    )
    source = tmp_path / "0_small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), source)
    before = source.read_bytes()
    notebook = execute.execute(source, fast=True)
    assert ast.literal_eval(notebook.cells[0].outputs[0].data["text/plain"]) == (
        "1",
        "1",
        tmp_path.name,
    )
    assert (
        "MECH_ABSA_FAST" not in os.environ
        and os.environ["HF_HUB_OFFLINE"] == "as it was"
        and source.read_bytes() == before
    )


def test_tidying_keeps_what_a_reader_needs():
    v4 = nbformat.v4
    widget = coloured_tokens(["<a>", "b"], [1.0, -1.0]).html
    outputs = [
        v4.new_output("stream", name="stdout", text="\x1b[31mred\x1b[0m"),
        v4.new_output("display_data", {"text/html": widget}, metadata={"isolated": True}),
        v4.new_output(
            "error", ename="ConfigError", evalue="one sentence", traceback=["/home/me/x.py", "more"]
        ),
    ]
    cell = v4.new_code_cell(
        "1",
        outputs=outputs,
        metadata={"tags": ["raises-exception"], "execution": {"started": "2020"}},
    )
    notebook = execute.tidy(
        v4.new_notebook(
            cells=[cell],
            metadata={
                "kernelspec": {"name": "x", "display_name": "me"},
                "language_info": {"name": "python", "version": "3.1"},
            },
        )
    )
    stream, html, error = notebook.cells[0].outputs
    assert stream.text == "red" and error.traceback == ["ConfigError: one sentence"]
    assert (
        len(html.data["text/html"]) < 2000
        and "&lt;a&gt;" in html.data["text/html"]
        and html.metadata == {}
    )
    assert (
        notebook.cells[0].metadata == {"tags": ["raises-exception"]}
        and "version" not in notebook.metadata.language_info
    )
    nbformat.validate(notebook)


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (
            nbformat.v4.new_output("stream", name="stdout", text="see /home/me/data.csv"),
            "absolute path: /home/me/data.csv",
        ),
        (nbformat.v4.new_output("stream", name="stdout", text="(/tmp/x/y)"), "absolute path"),
        (nbformat.v4.new_output("stream", name="stderr", text="hm"), "warns"),
        (
            nbformat.v4.new_output("stream", name="stdout", text="x.py:1: FutureWarning: no"),
            "warns",
        ),
        (nbformat.v4.new_output("error", ename="E", evalue="v", traceback=["t"]), "failed"),
        (nbformat.v4.new_output("stream", name="stdout", text="on machine-of-mine."), "machine"),
        (nbformat.v4.new_output("stream", name="stdout", text=" 40%|####  | 2/5"), "progress"),
        (
            nbformat.v4.new_output(
                "stream", name="stdout", text="Traceback (most recent call last):"
            ),
            "traceback",
        ),
        (
            nbformat.v4.new_output(
                "display_data", {"text/html": "<td>a/b</td> run/report.html 1/2 https://a.b/c/d"}
            ),
            None,
        ),
    ],
)
def test_faults_are_seen(output, fault, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "machine-of-mine")
    found = faults(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    )
    assert (found == []) if fault is None else any(fault in f for f in found), found
