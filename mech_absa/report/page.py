"""One page from the folders of runs, whole in one file: it opens from disk, with no network, and
years later.

The conclusion comes first. Tables, charts and words are HTML, there without any script; maps and
the browsers of examples are drawn by scripts of the page from data of the page, which stand in it
as JSON. Whatever comes from the data is text and stays text: the templates escape it, the JSON has
its `<`, `>` and `&` spelled as escapes, and the scripts only ever set text. A content security
policy forbids the page to load anything. The same folders give the same bytes.

    views/      what is said of each kind of run          maps.py    effects, small enough to travel in a page
    charts.py   curves and intervals                      runs.py    folders as they lie on disk
    text.py     numbers as text, data as JSON             embed.py   the maps as a notebook shows them
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import (
    Environment,
    FileSystemLoader,
    StrictUndefined,
    UndefinedError,
    select_autoescape,
)
from markupsafe import Markup

from ..errors import ConfigError, DataError
from ..records import write_text
from . import maps
from .runs import WORDS, Run, read_runs
from .text import embedded, number, percent, pretty, verdict
from .views import VIEWS
from .views.compare import comparison

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("tools.js", "maps.js", "examples.js", "answers.js", "page.js")
"""In this order: each uses what those before it define."""


def write_report(folder: str | Path | Iterable[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of a run, or of several side by side, and return its path.

    Args:
        folder: of a trace, a training, an evaluation or a domain matrix; or several.
        out: the file; default `report.html` in the (first) folder, `comparison.html` for several.

    Raises:
        ConfigError: no folder was given.
        DataError: a folder holds no finished run.

    Example:
        >>> import mech_absa as ma
        >>> import tempfile
        >>> edit = ma.load_edit("bundled")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ma.write_report(ma.save_edit(edit, folder)).name
        'report.html'
    """
    folders = [Path(folder)] if isinstance(folder, (str, Path)) else [Path(f) for f in folder]
    if not folders:
        raise ConfigError(
            "no folder was given; at least one --out folder of a finished run is needed"
        )
    runs = read_runs(folders)
    name = "report.html" if len(runs) == 1 else "comparison.html"
    path = Path(out) if out is not None else folders[0] / name
    write_text(path, render(runs))
    return path


def leave_report(folder: str | Path) -> Path | None:
    """Write `report.html` of a run that has just ended; if that fails, print why and return None."""
    try:
        return write_report(folder)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(
            f"warning: {Path(folder) / 'report.html'} could not be written ({reason}); all other files are there",
            file=sys.stderr,
        )
        return None


def environment() -> Environment:
    """Return the templates with everything escaped that is not marked as safe."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {
        "number": number,
        "percent": percent,
        "pretty": pretty,
        "verdict": verdict,
    }
    templates.tests["number"] = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
    return templates


def render(runs: Sequence[Run]) -> str:
    """Return the page of some runs as text.

    Raises:
        DataError: a file of a run holds other values than the page can show.
    """
    try:
        return _rendered(runs)
    except BROKEN as error:
        folders = ", ".join(str(r.path) for r in runs[:3])
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{folders}: the files do not describe a finished run ({type(error).__name__}: {reason}); make the run again"
        ) from error


BROKEN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, UndefinedError)
"""What values of a wrong type or size in a run's files cause while a page is made of them."""


def _rendered(runs: Sequence[Run]) -> str:
    """Return the page; errors of any kind where a file of a run holds other values than expected."""
    budget = maps.BUDGET // max(1, sum(r.kind == "trace" for r in runs))
    views = [VIEWS[r.kind](r, budget) for r in runs]
    for i, view in enumerate(views):
        view["id"] = f"run{i}"
    data = {"runs": [v.pop("data") for v in views]}
    title = (
        f"{WORDS[runs[0].kind]}: {runs[0].name}"
        if len(runs) == 1
        else f"Comparison of {len(runs)} runs"
    )
    several = comparison(runs) if len(runs) > 1 else None
    return environment().get_template("report.html").render(
        title=title, views=views, comparison=several, data=embedded(data), css=css(), js=scripts()
    )  # fmt: skip


def css() -> Markup:
    """Return the style sheet of the page."""
    return Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))


def scripts() -> Markup:
    """Return the scripts of the page, one after the other."""
    parts = [(TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS]
    return Markup("".join(parts))
