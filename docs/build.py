"""Fill the pages from the project at build time, so that they cannot go stale.

As mkdocs hooks (`hooks:` in mkdocs.yml), comments of the pages are replaced:

    <!-- help: train.matrix -->                 what `python -m mech_absa.train.matrix --help` prints
    <!-- include: benchmarks/README.md sweep --> what stands there between `<!-- sweep: begin -->` and `<!-- sweep: end -->`
    <!-- include: CITATION.cff yaml -->         the whole file as a block of code
    <!-- include: mech_absa/assets/README.md --> the whole file as a part of the page, without its title
    <!-- rest: train -->                        the reference of all modules of a room that no page of docs/api names; `.` is the files beside the rooms
    <!-- names: fit Preset -->                  a table of public names: what each is, with a link to its home
    <!-- svg: runs -->                          docs/img/runs.svg, inline, so that it takes the colours of the page

`figures/smollm2_aspect_swap.png`, the picture of the README, and the JSON schemas of
`mech_absa.schemas` become files of the site. The notebooks of `analyses/` become pages with their
outputs. As a Griffe extension (`House`), shapes such as `Float[Tensor, "batch pos"]` stay as they are written (a
string in them is a list of axes, not a forward reference), `a, b: what they are` in a docstring
speaks of both, and every doctest is shown as code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
PICTURES = {"img/heatmap.png": ROOT / "figures" / "smollm2_aspect_swap.png"}
NOTEBOOKS = sorted((ROOT / "analyses").glob("[0-9]_*.ipynb"))
PAGE_OF = {"../mech_absa/assets/README.md": "../bundled.md"}
"""File that notebooks link to -> the page that shows it."""
MARK = re.compile(r"^<!-- (help|include|rest|svg|names): (.+?) -->$", flags=re.MULTILINE)
WIDTH = "84"
CONSTANTS = {"ROLES": "What a token can be for, in reading order"}


def help_text(command: str) -> str:
    """Return what `--help` of a command prints on a terminal of `WIDTH` columns without colours."""
    printed = io.StringIO()
    argv, environment = sys.argv, dict(os.environ)
    os.environ |= {"COLUMNS": WIDTH, "NO_COLOR": "1", "TERM": "dumb"}
    sys.argv = [f"mech_absa.{command}", "--help"]
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.suppress(SystemExit),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the module may have been imported already
            runpy.run_module(f"mech_absa.{command}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ |= environment
    usage, *lines = (line.rstrip() for line in printed.getvalue().strip().splitlines())
    usage = textwrap.fill(
        usage, int(WIDTH), subsequent_indent=" " * len("usage: ")
    )  # tyro does not
    return re.sub(r"\n{3,}", "\n\n", "\n".join([usage, *lines]))


def included(path: str, part: str | None) -> str:
    """Return a file of the project, or a part of it, as Markdown."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".md"):
        return f"```{part or 'text'}\n{text.strip()}\n```"
    if part is None:
        whole = text.split("\n", 1)[1].strip()
        # Links to files of the project lead nowhere in the site.
        return re.sub(r"(?<!!)\[([^\]]*)\]\(\.\./[^)\s]*\)", r"\1", whole)
    found = re.search(
        rf"<!-- {part}: begin -->\n(.*?)\n?<!-- {part}: end -->", text, flags=re.DOTALL
    )
    if found is None:
        raise ValueError(f"{path} has no part {part}")
    return found[1]


def shown() -> set[str]:
    """Modules that a page of the reference names."""
    pages = (p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "api").glob("*.md"))
    return {name for text in pages for name in re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)}


def rest(room: str) -> str:
    """Return the reference of the other modules of a room."""
    package = ROOT / "mech_absa"
    files = package.glob("*.py") if room == "." else (package / room).rglob("*.py")
    names = sorted(
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in files
        if not p.stem.startswith("_")
    )
    return "\n".join(
        f"::: {n}\n    options: {{heading_level: 2, show_root_full_path: true}}\n"
        for n in names
        if n not in shown()
    )


def names_table(names: list[str]) -> str:
    """Return one row per public name: a link to its home, and the first sentence of its
    docstring.
    """
    import mech_absa

    rows = ["| name | is |", "|---|---|"]
    for name in names:
        value = mech_absa.__getattr__(
            name
        )  # the function, also where a package of its name is imported
        if isinstance(value, ModuleType):
            home = value.__name__
        elif hasattr(value, "__qualname__"):
            home = f"{value.__module__}.{value.__qualname__}"
        else:
            home = f"mech_absa.{mech_absa._HOME_OF[name]}.{name}"
        paragraph = " ".join((value.__doc__ or "").strip().split("\n\n")[0].split())
        # A plain value has its type's docstring; its own stands in its module.
        first = CONSTANTS.get(name) or paragraph.split(". ")[0].removesuffix(".")
        rows.append(f"| [`{name}`][{home}] | {first} |")
    return "\n".join(rows)


def filled(markdown: str) -> str:
    """Return a page with its comments replaced."""

    def replace(match: re.Match[str]) -> str:
        kind, arguments = match[1], match[2].split()
        if kind == "help":
            return f"```text\n{help_text(arguments[0])}\n```"
        if kind == "include":
            return included(arguments[0], arguments[1] if len(arguments) > 1 else None)
        if kind == "rest":
            return rest(arguments[0])
        if kind == "names":
            return names_table(arguments)
        return (ROOT / "docs" / "img" / f"{arguments[0]}.svg").read_text(encoding="utf-8")

    return MARK.sub(replace, markdown)


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook and its outputs as Markdown, and its pictures by their names."""
    from nbconvert import MarkdownExporter

    here = {"unique_key": path.stem, "output_files_dir": ""}
    text, resources = MarkdownExporter().from_filename(str(path), resources=here)

    def link(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        if target.endswith(".ipynb") and "/" not in target:
            target = target.removesuffix(".ipynb") + ".md"
        elif (path.parent / target).exists():
            if target not in PAGE_OF:
                return words  # a file of the project that is no page
            target = PAGE_OF[target]
        return f"[{words}]({target})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", link, text), resources["outputs"]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: the text of a page before it becomes HTML."""
    return filled(markdown)


def on_config(config: Any) -> Any:
    """mkdocs: the notebooks are a section of their own, each under its title."""
    section = []
    for path in NOTEBOOKS:
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
        title = "".join(first).splitlines()[0].removeprefix("# ")
        section.append({title: f"notebooks/{path.stem}.md"})
    at = next(i for i, part in enumerate(config["nav"]) if "Inside" in part)
    config["nav"].insert(at, {"Notebooks": section})
    return config


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: the pictures, schemas and notebooks that stand elsewhere in the project."""
    from mkdocs.structure.files import File

    for uri, path in PICTURES.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    from mech_absa.schemas import published

    for name, schema in published().items():
        text = json.dumps(schema, indent=2) + "\n"
        files.append(File.generated(config, f"schemas/{name}", content=text))
    for path in NOTEBOOKS:
        text, pictures = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


ITEM = re.compile(r"^( {4})(\w+(?:, \w+)+):((?:.*\n?)(?: {5,}.*\n?)*)", flags=re.MULTILINE)


def each(docstring: str) -> str:
    """Items that explain several names, `a, b: text`, as one item a name."""
    return ITEM.sub(
        lambda m: "".join(f"{m[1]}{name}:{m[3].rstrip()}\n" for name in m[2].split(", ")), docstring
    )


HEADING = re.compile(r"^Example:$", flags=re.MULTILINE)


def examples(docstring: str) -> str:
    """Return a docstring with its doctests in sections that Griffe shows as code.

    Griffe knows `Examples:`. It takes `Example:` for an admonition, and a doctest without a heading
    for a paragraph; Markdown then reads `>>>` as three nested quotations and brackets as links.
    """
    parts = HEADING.sub("Examples:", docstring).split("\n\n")
    return "\n\n".join(
        f"Examples:\n{textwrap.indent(part, '    ')}" if part.startswith(">>>") else part
        for part in parts
    )


with contextlib.suppress(ImportError):
    import griffe

    SHAPED = {"Float", "Int", "Bool", "Shaped", "Num"}

    def spelled(annotation: Any) -> Any:
        """Return the annotation, with the axes of every shape in it as a string again."""
        if isinstance(annotation, griffe.ExprSubscript):
            if str(annotation.left) in SHAPED and isinstance(annotation.slice, griffe.ExprTuple):
                first, *axes = annotation.slice.elements
                annotation.slice.elements = [
                    first,
                    *(a if str(a)[:1] in "'\"" else repr(str(a)) for a in axes),
                ]
            else:
                annotation.slice = spelled(annotation.slice)
        elif isinstance(annotation, griffe.ExprTuple):
            annotation.elements = [spelled(e) for e in annotation.elements]
        elif isinstance(annotation, griffe.ExprBinOp):
            annotation.left, annotation.right = spelled(annotation.left), spelled(annotation.right)
        return annotation

    def readable(thing: Any) -> None:
        if thing.docstring is not None:
            thing.docstring.value = examples(each(thing.docstring.value))

    class House(griffe.Extension):
        """The house style of docstrings, as Griffe needs it."""

        def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
            readable(mod)

        def on_function(self, *, func: griffe.Function, **_: Any) -> None:
            func.returns = spelled(func.returns)
            for parameter in func.parameters:
                parameter.annotation = spelled(parameter.annotation)
            readable(func)

        def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
            readable(cls)

        def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
            attr.annotation = spelled(attr.annotation)
            readable(attr)
