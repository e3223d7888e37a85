"""One explorer of the bundled model for all tests, and browsers that close behind themselves."""

from __future__ import annotations

import pytest
from support.explorer import Client

import mech_absa as ma


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
