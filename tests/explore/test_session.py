"""One thread owns the model: jobs take turns, stop where they are asked to, and let short questions in."""

from __future__ import annotations

import queue
import threading

import pytest

from mech_absa.errors import ConfigError
from mech_absa.explore.session import MOST_WAITING, Session

pytestmark = pytest.mark.timeout(900)
SOON = 60
"""Seconds after which a test gives up; nothing is timed."""


class Told:
    """The events of one browser, as they come."""

    def __init__(self):
        self.events = queue.Queue()

    def __call__(self, name, data):
        self.events.put((name, data))

    def next(self):
        return self.events.get(timeout=SOON)

    def names(self):
        """Return the names of all events up to the end."""
        names = []
        while not names or names[-1] != "end":
            names.append(self.next()[0])
        return names


@pytest.fixture
def session():
    session = Session()
    yield session
    session.close()
    assert not session._thread.is_alive()


def endless(started):
    """Return a job that never ends by itself."""

    def work(job):
        started.set()
        while True:
            job.breathe()
            threading.Event().wait(0.001)

    return work


def test_a_job_tells_and_ends(session):
    told = Told()
    session.begin("a", lambda job: job.tell("half", {"n": 1}), told)
    assert told.next() == ("half", {"n": 1}) and told.next() == ("end", {})


def test_a_stopped_job_ends_and_frees_the_thread(session):
    started, told, other = threading.Event(), Told(), Told()
    job = session.begin("a", endless(started), told)
    assert started.wait(SOON)
    job.stop()
    assert told.names() == ["stopped", "end"]
    session.begin("b", lambda job: job.tell("ran", {}), other)
    assert "ran" in other.names()


def test_browsers_take_turns(session):
    started, first, second, third = threading.Event(), Told(), Told(), Told()
    order = []
    job = session.begin("a", endless(started), first)
    assert started.wait(SOON)
    session.begin("b", lambda job: order.append("b"), second)
    session.begin("c", lambda job: order.append("c"), third)
    assert second.next() == ("waiting", {"ahead": 1})
    assert third.next() == ("waiting", {"ahead": 2})
    assert session.waiting == 2
    job.stop()
    assert second.names()[-1] == third.names()[-1] == "end"
    assert order == ["b", "c"]


def test_a_browser_has_one_job(session):
    started, first, waits, last = threading.Event(), Told(), Told(), Told()
    session.begin("a", endless(started), first)
    assert started.wait(SOON)
    ran = []
    session.begin("b", lambda job: ran.append("old"), waits)
    session.begin("b", lambda job: ran.append("new"), last)
    assert "stopped" in waits.names()  # it waited, and its browser asked for something else
    session.begin("a", lambda job: None, Told())  # ends the running job of the same browser
    assert "stopped" in first.names() and "end" in last.names()
    assert ran == ["new"]


def test_a_job_that_left_the_line_never_begins(session):
    started, told, ran = threading.Event(), Told(), []
    job = session.begin("a", endless(started), Told())
    assert started.wait(SOON)
    waits = session.begin("b", lambda job: ran.append("b"), told)
    waits.stop()
    assert told.names()[-2:] == ["stopped", "end"] and session.waiting == 0
    job.stop()
    assert session.ask(lambda: 3).result(SOON) == 3 and ran == []


def test_short_questions_are_answered_while_a_job_has_its_turn(session):
    started = threading.Event()
    job = session.begin("a", endless(started), Told())
    assert started.wait(SOON)
    assert session.ask(threading.current_thread).result(SOON) is session._thread
    with pytest.raises(ConfigError, match="too much"):
        session.ask(lambda: (_ for _ in ()).throw(ConfigError("too much"))).result(SOON)
    assert not job.stopped


def test_errors_are_told_in_a_sentence(session, capfd):
    def ours(job):
        raise ConfigError("that is not accepted")

    def theirs(job):
        raise ZeroDivisionError("by zero")

    told = Told()
    session.begin("a", ours, told)
    assert told.next() == ("error", {"sentence": "that is not accepted"})
    assert told.next() == ("end", {})
    session.begin("a", theirs, told)
    assert told.next()[1]["sentence"] == "the explorer failed: ZeroDivisionError: by zero"
    assert told.next() == ("end", {})
    assert "Traceback" in capfd.readouterr().err  # whoever started it can see where


def test_the_line_has_an_end(session):
    started, told = threading.Event(), Told()
    session.begin("a", endless(started), Told())
    assert started.wait(SOON)
    for i in range(MOST_WAITING):
        session.begin(f"b{i}", lambda job: None, Told())
    session.begin("late", lambda job: None, told)
    assert told.next()[0] == "error" and told.next() == ("end", {})


def test_closing_ends_everything():
    session, started, told, waits = Session(), threading.Event(), Told(), Told()
    session.begin("a", endless(started), told)
    assert started.wait(SOON)
    session.begin("b", lambda job: None, waits)
    session.close()
    assert told.names() == ["stopped", "end"] and waits.names()[-2:] == ["stopped", "end"]
