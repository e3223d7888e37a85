"""Check the types and the shapes that the package promises while tests run.

Functions and methods whose annotations name a shape, such as `Float[Tensor, "batch pos"]`, are
checked by jaxtyping with beartype; all other annotated ones by beartype alone, and so are the
arguments of dataclasses. jaxtyping's own import hook (`--jaxtyping-packages`) checks everything the
first way and checks a function within a function anew each time the outer one runs. That took three
quarters of the CPU time of the tests. Here functions within functions are left to mypy, and the first
calls of each function in each test are checked, `MOST` of them: the ten-thousandth call of a loop is
made by the same line as the first.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, jaxtyped

PACKAGE = "mech_absa"
CHECK = beartype(conf=BeartypeConf(violation_type=TypeError))  # as jaxtyping raises

MOST = 20
"""Calls of a function that are checked in one test."""
_test = [0]
"""Number of the test that runs."""


def first_calls(plain: Callable[..., Any], checking: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that checks its first calls in each test, and then only works."""
    seen = [-1, 0]

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        if seen[0] != _test[0]:
            seen[:] = [_test[0], 0]
        if seen[1] == MOST:
            return plain(*args, **kwargs)
        seen[1] += 1
        return checking(*args, **kwargs)

    return call


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Count the calls of the next test from 0."""
    _test[0] += 1


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function as types, without those that are not defined yet."""
    found = {}
    for name, hint in function.__annotations__.items():
        holder = lambda: None  # noqa: E731
        holder.__annotations__ = {name: hint}
        scope = getattr(function, "__globals__", {})
        try:
            found |= typing.get_type_hints(holder, scope, include_extras=True)
        except Exception:  # a name that is imported for type checkers alone, or the class itself
            continue
    return found


def names_a_shape(hint: Any) -> bool:
    """Return whether a jaxtyping array is part of a type."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(names_a_shape(part) for part in typing.get_args(hint))


def checked(thing: Any) -> Any:
    """Return a function, or a class, that checks its types in its first calls of a test."""
    if isinstance(thing, type):
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = checked(thing.__init__)  # type: ignore[misc]
        return thing
    annotations = thing.__annotations__
    hints = hints_of(thing)
    if any(map(names_a_shape, hints.values())):
        return first_calls(thing, jaxtyped(thing, typechecker=CHECK))
    if not hints:
        return thing
    thing.__annotations__ = hints
    made = CHECK(thing)
    thing.__annotations__ = made.__annotations__ = annotations
    return first_calls(thing, made)


class _Decorated(ast.NodeTransformer):
    """Put `@checked` below the decorators of every outer function and above those of every class."""

    @staticmethod
    def mark(node: ast.AST) -> ast.expr:
        return ast.copy_location(ast.Name("__checked__", ast.Load()), node)

    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        after = [  # the docstring, and what has to come first
            isinstance(n, ast.Expr) or (isinstance(n, ast.ImportFrom) and n.module == "__future__")
            for n in node.body
        ]
        at = after.index(False) if False in after else len(after)
        checks = ast.alias("checked", "__checked__")
        node.body.insert(at, ast.ImportFrom("support.type_checks", [checks], 0))
        return ast.fix_missing_locations(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(self.mark(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.decorator_list.insert(0, self.mark(node))
        self.generic_visit(node)
        return node


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = _Decorated().visit(ast.parse(self.get_data(path), path))
        return compile(tree, path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    assert PACKAGE not in sys.modules, f"{PACKAGE} was imported before its types could be checked"
    sys.meta_path.insert(0, _Finder())
