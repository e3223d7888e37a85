"""The house stands: imports go down, hooks have one home, nothing on disk is ever executed.

The table below is the one written truth about floors. The rules are checked on the syntax trees of the package's files, imports inside
functions included, and every rule is tried on a small package that breaks it, so that a rule that cannot fail is seen.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mech_absa"

FLOORS = {
    "errors": 0, "words": 0, "axes": 0,
    "examples": 1, "readers": 1, "world": 1, "sites": 1, "records": 1, "metrics": 1, "stats": 1,
    "progress": 1, "schemas": 1, "own": 1,
    "prompts": 2, "model": 2,
    "scoring": 3, "edits": 3, "widgets": 3, "plots": 3, "report": 3,
    "patch": 4, "train": 4, "evaluate": 4,
    "patching": 5, "explore": 5, "select": 5, "": 5,
    "commands": 6,
    "__main__": 7,
}  # fmt: skip
"""Room -> floor. A folder is one room; `""` is the package's own `__init__.py`; every `__main__.py` is a command, on the top floor."""

COMMANDS = {
    ("evaluate", "card"),
    ("verify",),
    ("generate",),
    ("models",),
    ("doctor",),
    ("compare",),
}
"""Modules that are commands without being called `__main__`."""
NEVER = {("patch", "train"), ("scoring", "pairs"), ("plots", "model")}
"""(room, what it must not import) although the floors alone would allow it."""
ONLY_LAZILY = {("evaluate", "edits")}
"""Downward imports that belong inside functions: scores of an unedited model need no edits."""

NO_TORCH = ("examples", "own", "readers", "world", "sites", "records", "schemas", "stats")
ADDS_HOOKS = {
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook",
    "register_module_forward_hook", "register_module_forward_pre_hook", "add_hook", "add_perma_hook", "add_caching_hooks",
    "run_with_hooks", "run_with_cache",
}  # fmt: skip
EXECUTES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


# ---- reading the package ------------------------------------------------------------------------------------------------------


def modules(root: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """(path inside the package, room, syntax tree) of every file; the room of a command is `folder.__main__`."""
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root).with_suffix("").parts
        room = inner[0] if inner != ("__init__",) else ""
        if inner[-1] == "__main__" or inner in COMMANDS:
            room = ".".join(inner)
        yield "/".join(inner) + ".py", room, parsed(path.read_text(encoding="utf-8"))


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def floor(room: str) -> int | None:
    return (
        FLOORS["__main__"]
        if room.endswith("__main__") or tuple(room.split(".")) in COMMANDS
        else FLOORS.get(room)
    )


def imports(tree: ast.Module, path: str, rooms: set[str]) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether inside a function) of all that is imported; inside the package the name is `mech_absa.room`."""
    folder = path.split("/")[:-1]

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from walk(other, lazy)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, lazy
        elif isinstance(node, ast.ImportFrom):
            base = (
                [
                    *["mech_absa", *folder][: len(folder) + 2 - node.level],
                    *(node.module or "").split("."),
                ]
                if node.level
                else [node.module or ""]
            )
            base = [part for part in base if part]
            for alias in node.names:
                yield ".".join([*base, alias.name]), node.lineno, lazy
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    for name, line, lazy in walk(tree, False):
        parts = name.split(".")
        if parts[0] == "mech_absa":
            room = parts[1] if len(parts) > 1 and parts[1] in rooms else ""
            if len(parts) > 2 and parts[2] == "__main__":
                room += ".__main__"
            yield f"mech_absa.{room}", line, lazy
        else:
            yield name, line, lazy


def inner_imports(tree: ast.Module, path: str, files: set[str]) -> set[str]:
    """Return the files of the package that a file imports, imports inside functions included."""
    module = path.removesuffix(".py")
    folder = module.split("/")[:-1]
    found: set[str] = set()

    def file_of(parts: list[str]) -> str | None:
        names = ("/".join(parts) + ".py", "/".join([*parts, "__init__"]) + ".py")
        return next((name for name in names if name in files), None)

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                walk(other)
            return
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*folder[: len(folder) + 1 - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            for alias in node.names:
                found.add(file_of([*base, alias.name]) or file_of(base) or path)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(tree)
    return found - {path}


def calls(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, line) of every name and attribute that is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield (
                f"{node.value.id if isinstance(node.value, ast.Name) else ''}.{node.attr}",
                node.lineno,
            )
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno


def violations(root: Path) -> list[str]:
    """What the package at `root` breaks, a sentence each."""
    found: list[str] = []
    seen = list(modules(root))
    rooms = {
        p.stem if p.is_file() else p.name
        for p in root.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    graph: dict[str, set[str]] = {}
    files = {path for path, _, _ in seen}
    inner = {path: inner_imports(tree, path, files) for path, _, tree in seen}
    for path, room, tree in seen:
        mine = floor(room)
        if mine is None:
            found.append(
                f"mech_absa/{path} is in no room of the table FLOORS in tests/test_floors.py; write down its floor there"
            )
            continue
        for name, line, lazy in imports(tree, path, rooms):
            where = f"mech_absa/{path}:{line}"
            if name.split(".")[0] in EXECUTES:
                found.append(f"{where} imports {name}, which executes what it reads")
            if name.split(".")[0] == "torch" and room in NO_TORCH:
                found.append(f"{where} imports torch; {room} must do without")
            if not name.startswith("mech_absa."):
                continue
            other = name.removeprefix("mech_absa.")
            theirs = floor(other)
            if other == room or theirs is None:
                continue
            graph.setdefault(room, set()).add(other)
            if theirs > mine:
                found.append(
                    f"{where} (floor {mine}) imports {other or '__init__'} (floor {theirs}); imports only go down"
                )
            if (room.split(".")[0], other) in NEVER:
                found.append(f"{where} imports {other}, which {room} must never do")
            if (room, other) in ONLY_LAZILY and not lazy:
                found.append(
                    f"{where} imports {other} at the top; {room} may do so inside a function only"
                )
        for name, line in calls(tree):
            where, last = f"mech_absa/{path}:{line}", name.split(".")[-1]
            if last in ADDS_HOOKS and path != "model/hooks.py":
                found.append(
                    f"{where} adds a hook by {last}; model/hooks.py is the only place that does"
                )
            if last == "hooked" and "." in name and room != "model":
                found.append(f"{where} reads .hooked; only mech_absa/model knows the backend")
            if name in (
                "eval",
                "exec",
                "compile",
                "__import__",
                "torch.load",
                "torch.save",
            ) or last in ("read_pickle", "to_pickle"):
                found.append(
                    f"{where} uses {name}, which executes what it reads or writes what must be executed"
                )
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.keyword)
                and node.arg in ("trust_remote_code", "allow_pickle")
                and ast.unparse(node.value) != "False"
            ):
                found.append(
                    f"mech_absa/{path}:{node.lineno} sets {node.arg}={ast.unparse(node.value)}"
                )
    for what, between in (("rooms", graph), ("files", inner)):
        try:
            graphlib.TopologicalSorter(between).prepare()
        except graphlib.CycleError as error:
            circle = " -> ".join(r or "__init__" for r in error.args[1])
            found.append(f"{what} import each other in a circle: {circle}")
    return found


LONGEST, MOST_ARGUMENTS = 50, 6
AS_GIVEN = {("patching.py", "generic_activation_patch")}
"""Functions with the signature of another library."""


def oversized(root: Path) -> list[str]:
    """Functions with too many lines of code or too many positional arguments, a sentence each."""
    found = []
    for path, _, tree in modules(root):
        lines = (root / path).read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            documented = ast.get_docstring(node) is not None
            start = node.body[0].end_lineno if documented else node.lineno - 1
            head = range(node.lineno - 1, node.body[0].lineno - 1) if documented else ()
            code = [lines[i].strip() for i in (*head, *range(start or 0, node.end_lineno or 0))]
            length = sum(bool(line) and not line.startswith("#") for line in code)
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            arguments = len(names) - (names[:1] in (["self"], ["cls"]))
            where = f"mech_absa/{path}:{node.lineno} {node.name}"
            if length > LONGEST:
                found.append(f"{where} has {length} lines of code; at most {LONGEST} are allowed")
            if arguments > MOST_ARGUMENTS and (path, node.name) not in AS_GIVEN:
                found.append(f"{where} has {arguments} positional arguments")
    return found


# ---- the package keeps the rules ----------------------------------------------------------------------------------------------


def test_the_package_keeps_every_rule():
    assert len(list(modules(PACKAGE))) > 20, "the package was not found"
    assert violations(PACKAGE) == []


def test_functions_are_short():
    assert oversized(PACKAGE) == []


def test_a_long_function_is_seen(tmp_path):
    body = '    """Text.\n\n    More.\n    """\n    # why\n\n' + "    x = 1\n"
    (tmp_path / "a.py").write_text(f"def f(a, b, c, d, e, *, g):\n{body * 1}" + "    x = 1\n" * 48)
    assert oversized(tmp_path) == []
    (tmp_path / "a.py").write_text(
        f"class A:\n    def f(self, a, b, c, d, e, f, g): ...\ndef f():\n{body}"
        + "    x = 1\n" * 49
    )
    assert oversized(tmp_path) == [
        "mech_absa/a.py:3 f has 51 lines of code; at most 50 are allowed",
        "mech_absa/a.py:2 f has 7 positional arguments",
    ]


def test_the_table_is_no_longer_than_the_house():
    """A room cannot vanish unnoticed: its floor is taken out of the table with it."""
    built = {room.split(".")[0] for _, room, _ in modules(PACKAGE)}
    assert set(FLOORS) - built == set()


def test_the_page_shows_the_same_table():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Floors")[2].split("```")[1]
    lines = [line.split() for line in table.strip().splitlines()]
    shown = {room: int(number) for number, *rooms in lines for room in rooms}
    assert shown == {room: number for room, number in FLOORS.items() if room}


@pytest.mark.parametrize(
    ("path", "source", "sentence"),
    [
        ("attic.py", "", "mech_absa/attic.py is in no room"),
        (
            "sites.py",
            "from .prompts import encode",
            "sites.py:1 (floor 1) imports prompts (floor 2)",
        ),
        (
            "sites.py",
            "def f():\n    from . import prompts",
            "sites.py:2 (floor 1) imports prompts (floor 2)",
        ),
        ("sites.py", "import mech_absa.prompts", "sites.py:1 (floor 1) imports prompts (floor 2)"),
        (
            "sites.py",
            "from mech_absa import prompts as p",
            "sites.py:1 (floor 1) imports prompts (floor 2)",
        ),
        ("sites.py", "from . import anything", "sites.py:1 (floor 1) imports __init__ (floor 5)"),
        (
            "patch/loop.py",
            "from ..train.fit import fit",
            "loop.py:1 imports train, which patch must never do",
        ),
        (
            "patch/__main__.py",
            "def f():\n    from .. import train",
            "imports train, which patch.__main__ must never do",
        ),
        (
            "patch/loop.py",
            "from .__main__ import main",
            "(floor 4) imports patch.__main__ (floor 7)",
        ),
        (
            "evaluate/scores.py",
            "from ..edits import load_edit",
            "imports edits at the top; evaluate may",
        ),
        ("records.py", "import torch.nn", "records.py:1 imports torch; records must do without"),
        ("readers/rows.py", "def f():\n    from torch import Tensor", "rows.py:2 imports torch"),
        ("prompts.py", "from .model import x", "rooms import each other in a circle"),
        (
            "patch/loop.py",
            "def f():\n    from .job import g",
            "files import each other in a circle: patch/",
        ),
        (
            "model.py",
            "m.register_forward_hook(f)",
            "model.py:1 adds a hook by register_forward_hook",
        ),
        ("patch/loop.py", "model.hooked.add_hook('x', f)", "loop.py:1 adds a hook by add_hook"),
        ("patch/loop.py", "x = job.model.hooked.blocks", "loop.py:1 reads .hooked; only"),
        ("model.py", "import pickle", "imports pickle"),
        (
            "model.py",
            "def f():\n    import torch\n    return torch.load('x')",
            "model.py:3 uses torch.load",
        ),
        ("model.py", "eval('1')", "uses eval"),
        ("model.py", "f(trust_remote_code=True)", "sets trust_remote_code=True"),
    ],
)
def test_every_rule_can_fail(tmp_path, path, source, sentence):
    for name in (
        "__init__",
        "sites",
        "prompts",
        "model",
        "patch/__init__",
        "train/__init__",
        "evaluate/__init__",
        "edits/__init__",
        "readers/__init__",
    ):
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "model.py").write_text("from .prompts import adds_bos\n")
    (tmp_path / "patch" / "job.py").write_text("from . import loop\n")
    (tmp_path / "patch" / "loop.py").write_text("")
    assert violations(tmp_path) == []
    (tmp_path / path).write_text(source)
    if path == "prompts.py":
        (tmp_path / "model.py").write_text("from .prompts import adds_bos\n")
    found = violations(tmp_path)
    assert len(found) >= 1 and sentence in " | ".join(found)


def test_what_the_rules_let_pass(tmp_path):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "edits").mkdir()
    for name, source in {
        "__init__": "from .model import load_model",
        "prompts": "",
        "model/__init__": "from ..prompts import x\nmodel.eval()\nre.compile('x')\nf(trust_remote_code=False)",
        "model/hooks": "def f(m):\n    m.register_forward_hook(g)",
        "edits/__init__": "",
        "sites": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .model import Model",
        "evaluate/__init__": "from . import scores\ndef f():\n    from ..edits import load_edit",
        "evaluate/scores": "",
        "evaluate/__main__": "from . import scores\nfrom ..model import load_model",
    }.items():
        (tmp_path / f"{name}.py").write_text(source)
    assert violations(tmp_path) == []


# ---- floor 1 does without torch -------------------------------------------------------------------------------------------------

BLOCKED = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, NoTorch())
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not [m for m in sys.modules if m.split(".")[0] == "torch"]
print("imported", len(sys.argv) - 1)
"""


def import_without_torch(*names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *names],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=PACKAGE.parent,
    )


def test_floor_one_imports_without_torch():
    names = ["mech_absa", "mech_absa.errors"]
    for room in NO_TORCH:
        names.append(f"mech_absa.{room}")
        if (PACKAGE / room).is_dir():
            names += [
                f"mech_absa.{room}.{p.stem}"
                for p in sorted((PACKAGE / room).glob("*.py"))
                if p.stem != "__init__"
            ]
    done = import_without_torch(*names)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"imported {len(names)}"


@pytest.mark.parametrize("room", ["metrics", "axes"])
def test_the_block_is_real(room):
    done = import_without_torch(f"mech_absa.{room}")
    assert done.returncode == 1
    assert "blocked: torch" in done.stderr
