"""One explorer of the bundled model for all tests, and browsers that close behind themselves."""

from __future__ import annotations

import threading

import pytest
from support.explorer import Client

import mech_absa as ma
from mech_absa.explore import live


@pytest.fixture(scope="session")
def model():
    return ma.load_model()


@pytest.fixture(scope="session")
def explorer(model):
    explorer = ma.explore(model)
    yield explorer
    explorer.close()


@pytest.fixture
def browser():
    """Return a function that opens a browser at an address."""
    opened = []

    def open_at(url, name="test"):
        opened.append(Client(url, name))
        return opened[-1]

    yield open_at
    for one in opened:
        one.leave()


@pytest.fixture
def client(explorer, browser) -> Client:
    return browser(explorer.url)


@pytest.fixture
def held_back(monkeypatch):
    """Hold every sweep at its second part until it is stopped; an event says that it is there."""
    reached = threading.Event()
    take = live.Board.seen

    def slow(self, part):
        take(self, part)
        self.flush()
        reached.set()
        while True:
            self.breathe()
            threading.Event().wait(0.002)

    monkeypatch.setattr(live.Board, "seen", slow)
    return reached
