"""The pages of docs/ say what is true: their code runs and prints what stands there, their links lead somewhere, their commands parse, their
numbers are those of the results they quote, and the site builds and asks nothing of a network.

Comments in the pages mark what is checked; see `docs/build.py` for those that the build replaces.

    <!-- run -->            the Python block below is executed, after the others of its page, in a folder of its own
    <!-- output -->         ... and prints the block below, numbers up to rounding
    <!-- file: NAME -->     the block below is a file that the page's code reads
    12.3<!-- FILE KEY -->   the number before it stands in a results file, times 100 where `x100` follows, in 2**20 where `MiB` does

After a change that moves outputs, `python tests/test_docs.py` writes them anew into the pages: read the difference.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import importlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from html import unescape
from pathlib import Path

import pytest
import tyro
from support import fast

import mech_absa

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
FENCE = re.compile(
    r"^(?:<!-- (run|output|file: \S+) -->\n)?```(\w*)[^\n]*\n(.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
SCALES = {"": 1, "x100": 100, "MiB": 2**-20}
QUOTED = re.compile(r"([-+]?\d[\d,]*\.?\d*)\**<!-- (\S+\.(?:json|csv)) (.+?) ?(x100|MiB)? -->")
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path) -> list[tuple[str, str, str]]:
    """(mark, language, text) of every fenced block of a page."""
    return [
        (mark or "", language, text)
        for mark, language, text in FENCE.findall(path.read_text(encoding="utf-8"))
    ]


# ---- code ------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def inside(folder: Path):
    """In another working folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_page(path: Path, folder: Path) -> list[tuple[str, str]]:
    """(what stands there, what was printed) for every output of a page."""
    found, printed, namespace = [], "", {"__name__": f"docs.{path.stem}"}
    with inside(folder):
        for mark, _, text in blocks(path):
            if mark.startswith("file: "):
                Path(mark.removeprefix("file: ")).write_text(text, encoding="utf-8")
            elif mark == "run":
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(compile(text, name(path), "exec"), namespace)
                printed = out.getvalue()
            elif mark == "output":
                found.append((text, printed))
    return found


def same_but_rounding(said: str, printed: str) -> bool:
    a, b = NUMBER.findall(said), NUMBER.findall(printed)
    words = NUMBER.sub("#", said).split() == NUMBER.sub("#", printed).split()
    return words and all(
        math.isclose(float(x), float(y), rel_tol=0.02, abs_tol=0.002)
        for x, y in zip(a, b, strict=True)
    )


RUN = [p for p in PAGES if any(mark == "run" for mark, _, _ in blocks(p))]


LONG = {"quickstart.md", "reports.md", "editing.md", "data.md", "evaluation.md"}


@pytest.mark.parametrize("page", fast(RUN, [p for p in RUN if p.name not in LONG]), ids=name)
def test_code_runs_and_prints_what_stands_there(page, tmp_path):
    for said, printed in run_page(page, tmp_path):
        assert same_but_rounding(said, printed), (
            f"the page says\n{said}\nand the code prints\n{printed}"
        )


def test_enough_code_runs():
    marks = Counter(mark.split(":")[0] for p in RUN for mark, _, _ in blocks(p))
    assert marks["run"] >= 20 and marks["output"] >= 20 and marks["file"] >= 10


@pytest.mark.parametrize(
    "said, printed, same",
    [
        ("a 1.00", "a 1.01", True),
        ("a 1.0", "b 1.0", False),
        ("1.0", "1.1", False),
        ("40 rows", "41 rows", False),
    ],
)
def test_what_counts_as_the_same(said, printed, same):
    assert same_but_rounding(said, printed) is same


def imported(tree: ast.Module) -> list[tuple[str, str | None]]:
    """(module, name in it) of every import of this package."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(a.name, None) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", a.name) for a in node.names]
    return [(module, what) for module, what in found if module.startswith("mech_absa")]


@pytest.mark.parametrize("page", [*PAGES, README], ids=name)
def test_code_compiles_and_its_names_exist(page):
    for _, language, text in blocks(page):
        if language != "python":
            continue
        tree = ast.parse(text)
        for module, what in imported(tree):
            home = importlib.import_module(module)
            assert (
                what is None or hasattr(home, what) or importlib.util.find_spec(f"{module}.{what}")
            ), f"{module} has no {what}"
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "ma"
            ):
                assert node.attr in mech_absa.__all__, f"ma.{node.attr} is no public name"


def test_the_first_code_of_the_site_is_that_of_the_readme():
    assert next(t for _, lang, t in blocks(README) if lang == "python") == next(
        t for _, lang, t in blocks(DOCS / "index.md") if lang == "python"
    )


def constants(path: Path) -> set[str]:
    """The fixed parts of all texts in a module, f-strings in pieces."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        n.value.strip()
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }


def test_the_messages_that_are_explained_exist():
    """Every message quoted in a question holds a fixed part, several words long, of a text in the code."""
    known = {
        t
        for p in (ROOT / "mech_absa").rglob("*.py")
        for t in constants(p)
        if len(t) >= 12 and " " in t
    }
    titles = re.findall(
        r'^\?\?\? question "(.+)"$',
        (DOCS / "faq.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    quoted = [q for title in titles for q in re.findall(r"`([^`]+)`", title) if q.count(" ") >= 4]
    assert len(quoted) >= 15
    for message in quoted:
        assert any(t in message or message in t for t in known), (
            f"no message of the code reads like {message!r}"
        )


# ---- commands --------------------------------------------------------------------------------------------------------------------


def commands(path: Path) -> list[str]:
    """Every command line of this package in a page's blocks."""
    lines = [
        line
        for _, language, text in blocks(path)
        if language in ("", "sh", "bash", "console")
        for line in text.splitlines()
    ]
    return [
        line.removeprefix("$ ")
        for line in lines
        if re.match(r"(\$ )?(python -m mech_absa|mech-absa|accelerate launch .*-m mech_absa)", line)
    ]


def parse(line: str) -> object:
    """What the command of a line would run with, by its own parser."""
    words = shlex.split(line, comments=True)
    if words[0] == "mech-absa":
        words = ["-m", f"mech_absa.{words[1]}", *words[2:]]
    at = words.index("-m")
    module, argv = words[at + 1], words[at + 2 :]
    command = {"train.matrix": "matrix", "evaluate.card": "card"}
    name_ = module.removeprefix("mech_absa.")
    home = importlib.import_module(f"mech_absa.commands.{command.get(name_, name_)}")
    if module.endswith(".generate"):
        assert {a for a in argv if a.startswith("-")} <= {"--out", "--seed"}
        return argv
    return tyro.cli(home.Config, args=argv)


LINES = [(p, line) for p in [*PAGES, README] for line in commands(p)]


@pytest.mark.parametrize(
    "page, line", LINES, ids=[f"{name(p)}-{i}" for i, (p, _) in enumerate(LINES)]
)
def test_commands_parse(page, line, capsys):
    try:
        parse(line)
    except SystemExit:
        pytest.fail(f"{name(page)}: {line}\n{capsys.readouterr()}")


def test_a_command_with_an_unknown_flag_does_not_parse(capsys):
    with pytest.raises(SystemExit):
        parse("python -m mech_absa.patch --lmit 3")


def runnable_modules() -> set[str]:
    """Modules that `python -m` runs."""
    found = set()
    for path in (ROOT / "mech_absa").rglob("*.py"):
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
            found.add(
                ".".join(path.relative_to(ROOT / "mech_absa").with_suffix("").parts).removesuffix(
                    ".__main__"
                )
            )
    return found - {"__main__"}


def test_every_command_is_documented():
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- help: (\S+) -->", page)) == runnable_modules()
    assert {
        line.split("-m mech_absa.")[1].split()[0] for line in commands(DOCS / "commands.md")
    } == runnable_modules()


def built():
    """`docs/build.py` as a module."""
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_help_is_that_of_the_command():
    module = built()
    text = module.help_text("verify")
    assert "--model" in text and "Hugging Face" in text and max(map(len, text.splitlines())) <= 110
    assert "--out" in module.filled("x\n<!-- help: generate -->\ny")
    assert "GPT-2 small" in module.filled("<!-- include: benchmarks/README.md sweep -->")
    with pytest.raises(ValueError, match="has no part nothing"):
        module.filled("<!-- include: benchmarks/README.md nothing -->")


def test_doctests_become_code_of_the_reference():
    before = "Return a.\n\nExample:\n    >>> a\n    [1]\n\n>>> b\n[2]\n\nMore."
    after = "Return a.\n\nExamples:\n    >>> a\n    [1]\n\nExamples:\n    >>> b\n    [2]\n\nMore."
    assert built().examples(before) == after == built().examples(after)


# ---- links -----------------------------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that Markdown's table of contents gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def anchors(path: Path) -> set[str]:
    text = re.sub(
        r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    if (
        included := re.search(r"^<!-- include: (\S+\.md) -->$", text, flags=re.MULTILINE)
    ) is not None:
        text += (ROOT / included[1]).read_text(encoding="utf-8")
    headings = re.findall(r"^#{1,6} (.+?)(?:\s*\{[^}]*\})?$", text, flags=re.MULTILINE)
    return {slug(h) for h in headings} | set(re.findall(r"\{[^}]*#([\w.-]+)[^}]*\}", text))


@pytest.mark.parametrize("page", [*PAGES, README], ids=name)
def test_internal_links_and_anchors_lead_somewhere(page):
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), f"{name(page)} links to {target}"
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file) if file else page
        assert there.exists() or target == "img/heatmap.png", (
            f"{name(page)} links to {file}, which is not there"
        )
        assert not anchor or anchor in anchors(there), (
            f"{name(page)} links to {target}; {file or name(page)} has {sorted(anchors(there))}"
        )


def test_every_page_can_be_reached():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [p for p in PAGES if f" {p.relative_to(DOCS).as_posix()}\n" not in nav]
    assert not missing


def test_the_pages_speak_of_the_project_alone():
    """Inlined parts of other files come from elsewhere and are held to it there."""
    for page in [*PAGES, README, ROOT / "CITATION.cff", ROOT / "mkdocs.yml"]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(work|tmp|root|opt)/|\.library|\bTODO\b", text), name(
            page
        )


# ---- numbers ---------------------------------------------------------------------------------------------------------------------


def looked_up(file: str, key: str) -> float:
    """A number of a results file: `a.b.c` of a JSON, `column=value,... column` of a CSV (`%c` for a comma in a value)."""
    path = ROOT / file
    if path.suffix == ".json":
        value = json.loads(path.read_text(encoding="utf-8"))
        for part in key.split("."):
            value = value[part]
        return float(value)
    where, _, column = key.rpartition(" ")
    equal = {k: v.replace("%c", ",") for k, v in (pair.split("=") for pair in where.split(","))}
    with path.open(encoding="utf-8", newline="") as handle:
        rows = [r for r in csv.DictReader(handle) if all(r[k] == v for k, v in equal.items())]
    assert len(rows) == 1, f"{len(rows)} rows of {file} have {where}"
    return float(rows[0][column])


QUOTES = [(p, q) for p in [*PAGES, README] for q in QUOTED.findall(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    "page, quote", QUOTES, ids=[f"{name(p)}-{q[0]}-{i}" for i, (p, q) in enumerate(QUOTES)]
)
def test_numbers_are_those_of_the_results(page, quote):
    said, file, key, unit = quote
    value = looked_up(file, key) * SCALES[unit]
    digits = len(said.partition(".")[2])
    assert abs(float(said.replace(",", "")) - value) <= 0.5 * 10**-digits + 1e-9, (
        f"{name(page)} says {said}; {file} has {value}"
    )


def test_numbers_are_quoted():
    assert len(QUOTES) >= 15


def test_every_correction_names_tests_that_exist():
    page = (DOCS / "corrections.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(line.split("|")[1]) for line in rows] == list(range(1, 15))
    for line in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", line)
        assert named, line
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)


# ---- the reference ---------------------------------------------------------------------------------------------------------------


def test_every_public_name_has_its_place_in_the_reference():
    pages = {p: p.read_text(encoding="utf-8") for p in (DOCS / "api").glob("*.md")}
    pages = {p: built().filled(text) for p, text in pages.items()}
    shown = {
        m for text in pages.values() for m in re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    }
    listed = dict(
        re.findall(
            r"^\| \[`(\w+)`\]\[([\w.]+)\]", pages[DOCS / "api" / "index.md"], flags=re.MULTILINE
        )
    )
    assert set(listed) == set(mech_absa.__all__)
    for public, home in listed.items():
        module, _, attribute = home.rpartition(".")
        assert home in shown or (
            module in shown and hasattr(importlib.import_module(module), attribute)
        ), f"{public} is at {home}, which no page shows"
    own = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in (ROOT / "mech_absa").rglob("*.py")
        if not p.stem.startswith("_")
    }
    assert own <= shown, f"no page of the reference shows {sorted(own - shown)}"


def test_every_public_thing_is_explained():
    """What has no docstring is left out of the reference without a word."""
    for public in mech_absa.__all__:
        value = getattr(mech_absa, public)
        assert public == "ROLES" or (value.__doc__ or "").strip(), f"{public} has no docstring"


# ---- the site --------------------------------------------------------------------------------------------------------------------

FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc\s*=\s*["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon|modulepreload))[^>]*\bhref\s*=\s*["']?(?:https?:)?//[^"'\s>]+""",
    flags=re.IGNORECASE,
)


def test_what_counts_as_fetched():
    assert FETCHED.search('<script async src="https://x.org/a.js">') and FETCHED.search(
        "<link href=//fonts.x rel=stylesheet>"
    )
    assert not FETCHED.search('<a href="https://x.org">') and not FETCHED.search(
        '<script src="a.js">'
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built pages; a warning of the build is an error."""
    for name in ("mkdocs", "mkdocstrings", "material", "nbconvert"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_site_is_whole_and_asks_nothing_of_a_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not (found := FETCHED.search(text)), f"{page.name} fetches {found[0]}"
        assert not re.search(r"<!-- (help|include|rest|svg): ", text), page.name
    for style in site.rglob("*.css"):
        assert not re.search(
            r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")
        ), style.name
    reference = "".join(p.read_text(encoding="utf-8") for p in pages if p.parent.name == "api")
    assert "batch pos d_model" in re.sub(
        r"<[^>]+>", "", reference
    )  # axes are shown as they are written
    assert "&gt;&gt;&gt; " in reference and not re.search(r"(<blockquote>\s*){3}", reference)


def test_every_notebook_is_a_page_with_its_outputs(site):
    """The code, the printed numbers and the pictures of a notebook; its links stay in the site."""
    for path in sorted((ROOT / "analyses").glob("[0-9]_*.ipynb")):
        html = (site / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        said = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", html)))
        pictures = 0
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                printed = " ".join("".join(output.get("text", "")).split())
                assert printed in said, f"{path.name} prints {printed[:60]}"
                pictures += "image/png" in output.get("data", {})
        shown = re.findall(rf'src="({path.stem}[^"]*\.png)"', html)
        assert len(shown) == pictures and all((site / "notebooks" / p).exists() for p in shown)
        for target in re.findall(r'href="([^":#]+)"', html):
            assert (site / "notebooks" / target).exists(), f"{path.name} links to {target}"


def test_search_works_from_disk(site, tmp_path):
    browser = next(
        (
            b
            for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
            if b
        ),
        None,
    )
    if browser is None:
        pytest.skip("no Chromium is installed, so the search cannot be tried")
    log = tmp_path / "net.json"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
             "--proxy-server=127.0.0.1:9", "--enable-logging=stderr", "--virtual-time-budget=8000"]  # fmt: skip
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--dump-dom", f"file://{site}/index.html?q=counterfactual"],
        capture_output=True, text=True, timeout=240, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert re.search(r"\d+ matching documents", done.stdout), done.stdout[-500:]
    assert not [
        line for line in done.stderr.splitlines() if "CONSOLE" in line and "error" in line.lower()
    ]
    asked = re.findall(
        r'"initiator":"(?:file://|null)".*?"url":"([^"]+)"', log.read_text(encoding="utf-8")
    )
    assert not [url for url in asked if not url.startswith(("data:", "file:", "blob:"))]


@pytest.mark.slow
def test_the_quick_start(tmp_path):
    """In its order, in one folder."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    for line in commands(DOCS / "quickstart.md"):
        argv = [sys.executable, *shlex.split(line)[1:]]
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


def rewrite(page: Path, folder: Path) -> None:
    """Write what the code prints into the page."""
    printed = iter([p for _, p in run_page(page, folder)])

    def replace(match: re.Match[str]) -> str:
        return (
            f"<!-- output -->\n```{match[2]}\n{next(printed)}```"
            if match[1] == "output"
            else match[0]
        )

    page.write_text(FENCE.sub(replace, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    for path in RUN if len(sys.argv) < 2 else map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as scratch:
            rewrite(path.resolve(), Path(scratch))
