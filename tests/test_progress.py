"""Bars: where one is drawn by itself, what it says, and that it goes when the work is done."""

from __future__ import annotations

import sys
import types

import pytest

from mech_absa import progress


class Shown:
    """A notebook's outputs: every state of every cell output, in order."""

    def __init__(self):
        self.states = []

    def display(self, html, display_id):
        assert display_id is True
        self.states.append(html.data)
        return types.SimpleNamespace(update=lambda html: self.states.append(html.data))


@pytest.fixture
def notebook(monkeypatch):
    """A Jupyter kernel, as far as a bar sees one."""
    shown = Shown()
    shell = types.SimpleNamespace(kernel=object())
    display = types.SimpleNamespace(
        HTML=lambda text: types.SimpleNamespace(data=text), display=shown.display
    )
    python = types.SimpleNamespace(get_ipython=lambda: shell, display=display)
    monkeypatch.setitem(sys.modules, "IPython", python)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(progress, "REDRAW", 0.0)
    return shown


def test_a_bar_is_drawn_by_itself_in_a_terminal_and_a_notebook_only(monkeypatch, request):
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert not progress.wanted(None) and progress.wanted(True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert progress.wanted(None) and not progress.wanted(False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    request.getfixturevalue("notebook")
    assert progress.wanted(None) and not progress.wanted(False)


def test_a_notebook_has_a_bar_while_it_works_and_nothing_afterwards(notebook, capsys):
    with progress.bar("tracing <x>", 4) as advance:
        advance(1)
        assert '<progress value="1" max="4">' in notebook.states[-1]
        assert "tracing &lt;x&gt;: 1 of 4, " in notebook.states[-1]
        advance(3)
        assert notebook.states[-1].endswith("4 of 4, 0 s left</div>")
    assert notebook.states[0] == notebook.states[-1] == ""
    assert capsys.readouterr() == ("", "")


def test_the_bar_goes_when_the_work_fails(notebook):
    with pytest.raises(ZeroDivisionError), progress.bar("training", 2) as advance:
        advance(1)
        raise ZeroDivisionError
    assert notebook.states[-1] == ""


def test_a_log_file_gets_lines_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 16.0, 20.0])
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.bar("tracing", 10) as advance:
        for n in (1, 4, 5):
            advance(n)
    assert capsys.readouterr().err == "tracing: 5 of 10, 16 s left\n"


def test_quiet_draws_nothing(notebook, capsys):
    with progress.bar("tracing", 10, quiet=True) as advance:
        advance(10)
    assert notebook.states == [] and capsys.readouterr() == ("", "")
