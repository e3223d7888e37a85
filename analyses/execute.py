"""Run the notebooks anew and keep their outputs, in a form that can be read on the web and compared with the last.

    python analyses/execute.py                    all of them, in full: about a quarter of an hour on two cores
    python analyses/execute.py 1 3                the first and the third
    python analyses/execute.py --fast             all of them on a handful of examples, as the tests do; nothing is written

What is kept is what a reader needs: outputs in order, without timings, without the facts of this machine, and without the script of the
CircuitsVis widgets (1.3 MB each), of which a still picture is left. A notebook that is run by hand shows the living ones.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from mech_absa.records import write_text
from mech_absa.widgets import without_script

HERE = Path(__file__).parent
NOTEBOOKS = tuple(sorted(HERE.glob("[0-9]_*.ipynb")))
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def execute(path: Path, fast: bool = False) -> Any:
    """A notebook with new outputs, run from top to bottom in a kernel of its own; the file stays as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed that is not marked `raises-exception`.
    """
    notebook = nbformat.read(path, as_version=4)
    settings = {
        "MECH_ABSA_FAST": "1" if fast else "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore:IProgress not found",  # of tqdm, about a package that only moving bars need
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)  # the kernel inherits them
    try:
        NotebookClient(
            notebook,
            timeout=1800,
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return tidy(notebook)


def tidy(notebook: Any) -> Any:
    """The same notebook without what differs from machine to machine or is of no use to a reader."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        if "outputs" in cell:  # a bar leaves an empty place when the work is done
            cell.outputs = [o for o in cell.outputs if o.get("data", {}).get("text/html") != ""]
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}
            if "text" in output:
                output.text = _ANSI.sub("", output.text)
            if (
                "traceback" in output
            ):  # the sentence is the point; frames name files of this machine
                output.traceback = [f"{output.ename}: {output.evalue}"]
            data = output.get("data", {})
            if "text/html" in data:
                data["text/html"] = without_script(data["text/html"])
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run the notebooks of this folder and keep their outputs."
    )
    parser.add_argument(
        "number", nargs="*", type=int, help="which, by their first digit (default: all)"
    )
    parser.add_argument(
        "--fast", action="store_true", help="a handful of examples, and write nothing"
    )
    given = parser.parse_args()
    known = {int(path.name[0]): path for path in NOTEBOOKS}
    if missing := [n for n in given.number if n not in known]:
        parser.error(f"there is no notebook {missing[0]}; accepted: {', '.join(map(str, known))}")
    for path in (known[n] for n in given.number or known):
        started = time.perf_counter()
        notebook = execute(path, given.fast)
        if not given.fast:
            write_text(path, nbformat.writes(notebook) + "\n")
        print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
