"""One thread owns the model. Long jobs run one at a time; short questions are answered between their parts.

Every browser has at most one long job, so that browsers take turns: a new one takes the place of the old.
A job ends where it is when its browser stops it or goes away.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from ..errors import MechAbsaError
from .live import Tell

MOST_WAITING = 32
"""Long jobs that may wait; more browsers are asked to come back."""


class Stopped(Exception):
    """The job was stopped."""


class Job:
    """A long piece of work for one browser.

    Args:
        client: whose.
        work: is given the job; calls `breathe` now and then.
        tell: given its events, from the session's thread.
        session: that runs it.
    """

    def __init__(self, client: str, work: Callable[[Job], object], tell: Tell, session: Session):
        self.client, self.work, self.tell, self.session = client, work, tell, session
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the job at its next breath; one that waits never begins."""
        self._stop.set()
        self.session.wake()

    @property
    def stopped(self) -> bool:
        """Return whether it was asked to end."""
        return self._stop.is_set()

    def breathe(self) -> None:
        """Answer short questions, and end here if the job was stopped.

        Raises:
            Stopped: it was.
        """
        if self.stopped:
            raise Stopped
        self.session.answer()


class Session:
    """The thread that owns a model, and what waits for it. Close it at the end.

    Attributes:
        running: the long job that has its turn; None between turns.
    """

    def __init__(self) -> None:
        self.running: Job | None = None
        self._jobs: deque[Job] = deque()
        self._short: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="explorer", daemon=True)
        self._thread.start()

    # ---- called from any thread -----------------------------------------------------------------

    def ask(self, question: Callable[[], Any]) -> Future[Any]:
        """Answer a short question soon, even while a long job has its turn."""
        future: Future[Any] = Future()
        with self._changed:
            self._short.append((question, future))
            self._changed.notify()
        return future

    def begin(self, client: str, work: Callable[[Job], object], tell: Tell) -> Job:
        """Put a long job at the end of the line, in the place of the client's last one."""
        job = Job(client, work, tell, self)
        with self._changed:
            for other in (*self._jobs, self.running):
                if other is not None and other.client == client:
                    other._stop.set()
        self.wake()
        with self._changed:
            full = self._closed or len(self._jobs) >= MOST_WAITING
            if not full:
                self._jobs.append(job)
            self._changed.notify()
        if full:
            tell(
                "error",
                {"sentence": f"{MOST_WAITING} browsers are waiting already; try again later"},
            )
            tell("end", {})
        else:
            self._tell_places()
        return job

    def wake(self) -> None:
        """Take stopped jobs out of the line."""
        with self._changed:
            gone = [j for j in self._jobs if j.stopped]
            self._jobs = deque(j for j in self._jobs if not j.stopped)
        for job in gone:
            job.tell("stopped", {})
            job.tell("end", {})

    def close(self) -> None:
        """Stop everything and wait for the thread."""
        with self._changed:
            self._closed = True
            for job in (*self._jobs, self.running):
                if job is not None:
                    job._stop.set()
            for _, future in self._short:
                future.cancel()
            self._short.clear()
            self._changed.notify()
        self.wake()
        self._thread.join(timeout=30)

    @property
    def waiting(self) -> int:
        """Return how many long jobs wait for their turn."""
        return len(self._jobs)

    # ---- the thread -----------------------------------------------------------------------------

    def answer(self) -> None:
        """Answer all short questions that wait. Only the session's thread calls this."""
        while True:
            with self._changed:
                if not self._short:
                    return
                question, future = self._short.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(question())
            except BaseException as error:
                future.set_exception(error)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP counts them by thread
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._jobs or self._short)
                if self._closed:
                    return
                self.running = self._jobs.popleft() if self._jobs else None
            self.answer()
            if self.running is not None:
                self._tell_places()
                self._do(self.running)
                self.running = None

    def _do(self, job: Job) -> None:
        try:
            job.breathe()
            job.work(job)
        except Stopped:
            job.tell("stopped", {})
        except MechAbsaError as error:
            job.tell("error", {"sentence": str(error)})
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            job.tell("error", {"sentence": f"the explorer failed: {type(error).__name__}: {error}"})
        job.tell("end", {})

    def _tell_places(self) -> None:
        """Tell every waiting job how many have their turn before it."""
        with self._changed:
            jobs, busy = tuple(self._jobs), self.running is not None
        for i, job in enumerate(jobs):
            if ahead := i + busy:
                job.tell("waiting", {"ahead": ahead})


__all__ = ["Job", "Session", "Stopped"]
