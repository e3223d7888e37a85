"""What the explorer serves: the page, short answers as JSON, and long jobs as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import ConfigError, MechAbsaError
from ..examples import Example, Examples
from ..metrics import METRICS
from ..widgets import attention
from . import page
from .again import recipe
from .ask import Question, clean_example, look, pairs_of
from .edits import Trained, by_rule, train_edit
from .guard import MOST_BYTES, refused
from .live import sweep
from .session import Job, Session
from .state import KINDS, METRIC_WORDS, State

if TYPE_CHECKING:
    from ..edits import Edit

HEARTBEAT = 0.5
"""Seconds after which a silent stream looks whether its browser is still there."""
MOST_EDITS = 16
"""Browsers whose edit is kept."""
SHOWN = 200
"""Reviews that the page offers."""


@dataclass(frozen=True, eq=False)
class Routes:
    """What one server serves.

    Attributes:
        question: the model and how it is asked.
        session: the thread that owns it.
        train: examples that edits learn from.
        held: examples that are offered, and on which edits are tested.
        token: of the address.
        framed: pages that may hold this one in a frame.
        words: of the command that loads the same model.
        edits: what each browser has trained last.
    """

    question: Question
    session: Session
    train: Examples
    held: Examples
    token: str
    framed: str
    words: tuple[str, ...]
    edits: OrderedDict[str, Trained] = field(default_factory=OrderedDict)

    def application(self) -> Starlette:
        """Return the routes as an application, for whoever was let in."""
        posts = {
            "look": self.look, "trace": self.trace, "rule": self.rule, "train": self.learn,
            "again": self.again,
        }  # fmt: skip
        return Starlette(
            routes=[
                Route("/", self.start),
                Route("/attention", self.attention),
                *(Route(f"/api/{name}", f, methods=["POST"]) for name, f in posts.items()),
            ],
            exception_handlers={MechAbsaError: _refused},
        )

    # ---- pages ----------------------------------------------------------------------------------

    async def start(self, request: Request) -> Response:
        """Return the page."""
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
            "img-src data: blob:; connect-src 'self'; frame-src 'self'; base-uri 'none'; "
            f"form-action 'none'; frame-ancestors {self.framed}"
        )
        html = page.render(self.about(), nonce)
        return HTMLResponse(html, headers={"content-security-policy": policy})

    async def attention(self, request: Request) -> Response:
        """Return a page with the attention patterns of a layer, for a frame that can reach nothing."""
        state = State.from_link(request.query_params.get("state", ""))
        q = self.question

        def draw() -> str:
            layer = state.layer if state.layer >= 0 else None
            return attention(q.model, clean_example(q, state), layer, q.template).html

        html = await asyncio.wrap_future(self.session.ask(draw))
        parents = "'self'" if self.framed == "'none'" else f"'self' {self.framed}"
        policy = (
            "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
            f"style-src 'unsafe-inline'; img-src data:; frame-ancestors {parents}"
        )
        whole = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>attention</title>'
            f"<body>{html}"
        )
        return HTMLResponse(whole, headers={"content-security-policy": policy})

    def about(self) -> dict[str, Any]:
        """Return what the page knows from the start."""
        model, verbalizer = self.question.model, self.question.verbalizer
        return {
            "token": self.token, "model": model.name, "layers": model.n_layers, "heads": model.n_heads,
            "labels": [word for _, word in verbalizer.words], "polarities": [p.value for p in verbalizer.polarities],
            "kinds": list(KINDS), "metrics": {name: METRICS[name].unit for name in METRIC_WORDS},
            "reviews": [_offered(e) for e in self.held.sample(SHOWN)],
        }  # fmt: skip

    # ---- short answers --------------------------------------------------------------------------

    async def look(self, request: Request) -> Response:
        """Return the label probabilities of both runs."""
        state, client = await _message(request)
        trained = self.edits.get(client)
        edit: Edit | None = None if trained is None else trained.edit
        return await self._soon(lambda: look(self.question, state, edit))

    async def again(self, request: Request) -> Response:
        """Return what makes a map again."""
        state, _ = await _message(request)
        return await self._soon(lambda: recipe(self.question, state, self.words, self.train.source))

    async def _soon(self, question: Callable[[], Any]) -> Response:
        """Answer a short question as JSON."""
        return JSONResponse(await asyncio.wrap_future(self.session.ask(question)))

    # ---- long jobs ------------------------------------------------------------------------------

    async def trace(self, request: Request) -> Response:
        """Trace a review."""
        state, client = await _message(request)

        def work(job: Job) -> None:
            pairs = pairs_of(self.question, state)
            sweep(self.question.model, pairs, state, job.tell, job.breathe)

        return self._stream(request, client, work)

    async def rule(self, request: Request) -> Response:
        """Choose sites by the rule."""
        _, client = await _message(request)

        def work(job: Job) -> None:
            by_rule(self.question, self.train, job.tell, job.breathe)

        return self._stream(request, client, work)

    async def learn(self, request: Request) -> Response:
        """Train an edit."""
        state, client = await _message(request)

        def work(job: Job) -> None:
            trained = train_edit(self.question, state, self.train, self.held, job.tell, job.breathe)
            self.edits[client] = trained
            self.edits.move_to_end(client)
            while len(self.edits) > MOST_EDITS:
                self.edits.popitem(last=False)

        return self._stream(request, client, work)

    def _stream(
        self, request: Request, client: str, work: Callable[[Job], object]
    ) -> StreamingResponse:
        """Begin a long job and return its events as they come; the job ends when its browser goes."""

        async def events() -> AsyncIterator[str]:
            loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[str, dict[str, Any]]]()

            def tell(name: str, data: dict[str, Any]) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(queue.put_nowait, (name, data))

            job = self.session.begin(client, work, tell)
            try:
                name = ""
                while name != "end":
                    try:
                        name, data = await asyncio.wait_for(queue.get(), HEARTBEAT)
                    except asyncio.TimeoutError:
                        if await request.is_disconnected():
                            return
                        yield ": still there\n\n"
                        continue
                    yield f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n"
            finally:
                job.stop()

        return StreamingResponse(events(), media_type="text/event-stream")


async def _refused(request: Request, error: Exception) -> Response:
    return refused(request, 400, str(error))


async def _message(request: Request) -> tuple[State, str]:
    """Return the state of a message and the browser that sent it.

    Raises:
        ConfigError: it is no message of the page.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ConfigError(f"a message may have at most {MOST_BYTES:,} bytes")
    try:
        message = json.loads(body)
        client, state = message["client"], message["state"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError("the message is no JSON object with a client and a state") from None
    if not isinstance(client, str) or not 1 <= len(client) <= 64:
        raise ConfigError("the client of a message is a text of 1 to 64 characters")
    if isinstance(state, str):
        return State.from_link(state), client
    if not isinstance(state, dict):
        raise ConfigError("the state of a message is an object, or the text of a link")
    return State.of(state), client


def _offered(e: Example) -> dict[str, Any]:
    """Return a review for the list of the page."""
    other = e.counterfactuals[0].sentence if e.counterfactuals else ""
    start = -1 if e.span is None else e.span[0]
    return {
        "sentence": e.sentence,
        "aspect": e.aspect,
        "start": start,
        "gold": e.polarity.value,
        "edited": other,
    }


__all__ = ["Routes"]
