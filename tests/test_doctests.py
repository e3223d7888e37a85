"""Every public name has an example in its docstring, and the examples print what stands there."""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect

import pytest
from support import fast

import mech_absa

VALUES = {"ROLES", "presets"}
"""A tuple and a module: they have no docstring of an object."""
TRACES = {"BothDirections", "Edit", "Effects", "ImportanceMap", "Scores", "Selection"}
"""Names whose examples trace or train as those of `trace` and `fit` do, and then go on."""
NAMES = sorted(set(mech_absa.__all__) - VALUES)
loaded_once = functools.cache(mech_absa.load_model)
"""Nearly every example loads the bundled model, and none changes it."""


@pytest.mark.parametrize("name", fast(NAMES, set(NAMES) - TRACES))
def test_the_example_runs(name, tmp_path, monkeypatch):
    # Once the room `evaluate` is imported, the package has the room under the name of the function.
    home = importlib.import_module(f"mech_absa.{mech_absa._HOME_OF[name]}")
    value = getattr(home, name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if name != "load_model":
        monkeypatch.setattr(mech_absa, "load_model", loaded_once)
    source = inspect.getdoc(value) or ""
    module = inspect.getmodule(value)
    assert module is not None
    namespace = dict(vars(module))  # as doctest itself does
    example = doctest.DocTestParser().get_doctest(source, namespace, name, None, 0)
    assert example.examples, f"{name} has no example in its docstring"
    printed: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
        example, out=printed.append
    )
    assert result.failed == 0, "".join(printed)
