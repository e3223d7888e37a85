"""The page: the report's style, maps and tools, and what the explorer adds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..report.page import TEMPLATES as SHARED
from ..report.page import css, environment
from ..report.text import embedded

OWN = Path(__file__).parent / "templates"
SCRIPTS = ("tools.js", "maps.js", "examples.js")
"""Of the report; each uses what those before it define."""
LAST = "page.js"
"""Of the report: the theme, the link, and that the page is ready."""


@functools.cache
def _scripts() -> Markup:
    files = [*(SHARED / name for name in SCRIPTS), OWN / "explore.js", SHARED / LAST]
    return Markup("".join(f.read_text(encoding="utf-8") for f in files))


def render(data: dict[str, Any], nonce: str) -> str:
    """Return the page.

    Args:
        data: what the scripts know from the start.
        nonce: names the only script that may run.
    """
    template = environment().from_string((OWN / "explore.html").read_text(encoding="utf-8"))
    own = Markup((OWN / "explore.css").read_text(encoding="utf-8"))
    return template.render(data=embedded(data), model=data["model"], kinds=data["kinds"],
        css=css() + own, js=_scripts(), nonce=nonce)  # fmt: skip


__all__ = ["render"]
