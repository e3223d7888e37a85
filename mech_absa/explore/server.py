"""The explorer's server: who may use it, and the routes.

Only this machine, unless another host is asked for. The address that is printed holds a token, as
Jupyter's does; without it nothing is answered. Requests whose `Host` is another name than the server's
are refused, so that no web page can reach it through a name of its own. The page loads nothing from
anywhere else: a content security policy forbids it.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import json
import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import ConfigError, MechAbsaError
from ..examples import Example, Examples
from ..metrics import METRICS
from ..model import Model
from ..prompts import PromptTemplate, Verbalizer
from ..widgets import attention
from ..words import expect, shown
from . import page
from .again import recipe
from .ask import Question, clean_example, look, pairs_of
from .edits import Trained, by_rule, train_edit
from .live import sweep
from .session import Job, Session
from .state import KINDS, METRIC_WORDS, State

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ..edits import Edit

LOOPBACK = "127.0.0.1"
MOST_BYTES = 64 << 10
"""Of a request."""
HEARTBEAT = 0.5
"""Seconds after which a silent stream looks whether its browser is still there."""
NOTEBOOKS = "http://localhost:* http://127.0.0.1:* https://localhost:* vscode-webview:"
"""Pages that may hold the explorer in a frame, where a notebook started it."""
TRAIN, HELD = "builtin:restaurant/train", "builtin:restaurant/test"
MOST_EDITS = 16
"""Browsers whose edit is kept."""
SHOWN = 200
"""Reviews that the page offers."""


@dataclass(frozen=True, eq=False)
class Site:
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

    def edit(self, client: str) -> Edit | None:
        """Return the edit that a browser has trained last; None where it has none."""
        found = self.edits.get(client)
        return None if found is None else found.edit

    def remember(self, client: str, edit: Trained) -> None:
        """Keep the edit of a browser, and of the others the newest."""
        self.edits[client] = edit
        self.edits.move_to_end(client)
        while len(self.edits) > MOST_EDITS:
            self.edits.popitem(last=False)


# ---- who may use it -----------------------------------------------------------------------------------


class Guard:
    """Refuse other hosts, wrong tokens and large bodies, and set the headers of every answer."""

    def __init__(self, app: ASGIApp, token: str, hosts: Callable[[str], bool]):
        self.app, self.token, self.hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        refusal = self.refusal(request)
        if refusal is None:
            await self.app(scope, receive, _with_headers(send))
        else:
            status, sentence = refusal
            await _sentence(request, status, sentence)(scope, receive, _with_headers(send))

    def refusal(self, request: Request) -> tuple[int, str] | None:
        """Return the status and the sentence of a refusal; None where the request is let in."""
        host = request.headers.get("host", "")
        if not self.hosts(host):
            return (
                421,
                f"this explorer does not answer as {shown(host[:80])}; open the address that it printed",
            )
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        given = given if kind == "Bearer" else request.query_params.get("token", "")
        if not secrets.compare_digest(given.encode(), self.token.encode()):
            return (
                403,
                "the token is missing or wrong; open the whole address that the explorer printed",
            )
        length = request.headers.get("content-length", "0")
        if request.method == "POST" and not (length.isdecimal() and int(length) <= MOST_BYTES):
            return (
                413,
                f"a request may have at most {MOST_BYTES:,} bytes, and must say how many it has",
            )
        return None


def _with_headers(send: Send) -> Send:
    """Return a `send` that adds the headers of every answer."""
    more = [
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-store"),
        (b"cross-origin-resource-policy", b"same-origin"),
    ]

    async def wrapped(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            if not any(name == b"content-security-policy" for name, _ in headers):
                headers.append(
                    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
                )
            message = {**message, "headers": headers + more}
        await send(message)

    return wrapped


def _sentence(request: Request, status: int, sentence: str) -> Response:
    """Return an error as a page, or as JSON where a script asked."""
    if request.method == "GET":
        text = f'<!doctype html><html lang="en"><title>mech-absa explorer</title><p>{escape(sentence)}</p>'
        return HTMLResponse(text, status)
    return JSONResponse({"error": sentence}, status)


def allowed_hosts(host: str, port: int) -> Callable[[str], bool]:
    """Return a test of `Host` headers: the names of this server, and bare addresses where it listens to others.

    A page elsewhere can give its own name the address of this machine, but it cannot take away its name.
    """
    own = {f"{name}:{port}" for name in (host, LOOPBACK, "localhost")}
    everywhere = host in ("0.0.0.0", "::")

    def allowed(given: str) -> bool:
        if given in own:
            return True
        name, _, at = given.rpartition(":")
        if not everywhere or at != str(port):
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name == socket.gethostname()
        return True

    return allowed


# ---- routes -------------------------------------------------------------------------------------------


def application(site: Site, hosts: Callable[[str], bool]) -> ASGIApp:
    """Return the server of a site."""

    async def start(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
            "img-src data: blob:; connect-src 'self'; frame-src 'self'; base-uri 'none'; "
            f"form-action 'none'; frame-ancestors {site.framed}"
        )
        return HTMLResponse(
            page.render(about(site), nonce), headers={"content-security-policy": policy}
        )

    async def seen(request: Request) -> Response:
        state, client = await _message(request)
        return await _soon(site, lambda: look(site.question, state, site.edit(client)))

    async def trace(request: Request) -> Response:
        state, client = await _message(request)

        def work(job: Job) -> None:
            pairs = pairs_of(site.question, state)
            sweep(site.question.model, pairs, state, job.tell, job.breathe)

        return _stream(site, request, client, work)

    async def ruled(request: Request) -> Response:
        _, client = await _message(request)
        return _stream(
            site,
            request,
            client,
            lambda job: by_rule(site.question, site.train, job.tell, job.breathe),
        )

    async def trained(request: Request) -> Response:
        state, client = await _message(request)

        def work(job: Job) -> None:
            edit = train_edit(site.question, state, site.train, site.held, job.tell, job.breathe)
            site.remember(client, edit)

        return _stream(site, request, client, work)

    async def again(request: Request) -> Response:
        state, _ = await _message(request)
        return await _soon(
            site, lambda: recipe(site.question, state, site.words, site.train.source)
        )

    app = Starlette(
        routes=[
            Route("/", start),
            Route("/attention", functools.partial(_attention, site)),
            Route("/api/look", seen, methods=["POST"]),
            Route("/api/trace", trace, methods=["POST"]),
            Route("/api/rule", ruled, methods=["POST"]),
            Route("/api/train", trained, methods=["POST"]),
            Route("/api/again", again, methods=["POST"]),
        ],
        exception_handlers={MechAbsaError: _refused},
    )
    return Guard(app, site.token, hosts)


async def _attention(site: Site, request: Request) -> Response:
    """Return a page with the attention patterns of a layer, for a frame that can reach nothing."""
    state = State.from_link(request.query_params.get("state", ""))
    q = site.question

    def draw() -> str:
        layer = state.layer if state.layer >= 0 else None
        return attention(q.model, clean_example(q, state), layer, q.template).html

    html = await asyncio.wrap_future(site.session.ask(draw))
    parents = "'self'" if site.framed == "'none'" else f"'self' {site.framed}"
    policy = (
        "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        f"img-src data:; frame-ancestors {parents}"
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>attention</title><body>{html}'
    )
    return HTMLResponse(page, headers={"content-security-policy": policy})


async def _refused(request: Request, error: Exception) -> Response:
    return _sentence(request, 400, str(error))


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


async def _soon(site: Site, question: Callable[[], Any]) -> Response:
    """Answer a short question as JSON."""
    return JSONResponse(await asyncio.wrap_future(site.session.ask(question)))


def _stream(
    site: Site, request: Request, client: str, work: Callable[[Job], None]
) -> StreamingResponse:
    """Begin a long job and return its events as they come; the job ends when its browser goes."""

    async def events() -> AsyncIterator[str]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[str, dict[str, Any]]]()

        def tell(name: str, data: dict[str, Any]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, (name, data))

        job = site.session.begin(client, work, tell)
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


def about(site: Site) -> dict[str, Any]:
    """Return what the page knows from the start."""
    model, q = site.question.model, site.question
    return {
        "token": site.token, "model": model.name, "layers": model.n_layers, "heads": model.n_heads,
        "labels": [word for _, word in q.verbalizer.words], "polarities": [p.value for p in q.verbalizer.polarities],
        "kinds": list(KINDS), "metrics": {name: METRICS[name].unit for name in METRIC_WORDS},
        "reviews": [_offered(e) for e in site.held.sample(SHOWN)],
    }  # fmt: skip


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


# ---- the server as an object ----------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """A server that ends its streams before it waits for them."""

    closing: Callable[[], None]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.closing()
        await super().shutdown(sockets)


class Explorer:
    """A server of the explorer. In a notebook it shows the page in a frame.

    Args:
        model: what is explored.
        train: examples that edits learn from.
        held: examples that are offered and tested on.
        template, verbalizer: the question and its labels; the paper's where None.
        host: where it listens; other hosts than the loopback can be reached from elsewhere.
        port: 0 takes a free one.
        framed: pages that may hold it in a frame.
        words: flags of a command that loads the same model.

    Attributes:
        url: the address, with its token.

    Raises:
        ConfigError: the host or the port cannot be had.
    """

    def __init__(
        self,
        model: Model,
        train: Examples,
        held: Examples,
        *,
        template: PromptTemplate | None = None,
        verbalizer: Verbalizer | None = None,
        host: str = LOOPBACK,
        port: int = 0,
        framed: str = "'none'",
        words: Sequence[str] = (),
    ):
        self.model = model
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        self.session = Session()
        question = Question(model, template or PromptTemplate(), verbalizer or Verbalizer())
        site = Site(
            question, self.session, train, held, secrets.token_urlsafe(24), framed, tuple(words)
        )
        shown_host = LOOPBACK if host in ("0.0.0.0", "::") else host
        self.url = f"http://{shown_host}:{self.port}/?token={site.token}"
        config = uvicorn.Config(
            application(site, allowed_hosts(host, self.port)), log_level="error", access_log=False,
            lifespan="off", timeout_keep_alive=75, timeout_graceful_shutdown=2, server_header=False, date_header=False,
        )  # fmt: skip
        self._server = _Server(config)
        self._server.closing = self.session.close
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until Ctrl-C."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.session.close()

    def start(self) -> Explorer:
        """Serve in a thread of its own and return."""
        self._thread = threading.Thread(target=self.run, name="explorer server", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def close(self) -> None:
        """Stop serving, and what still runs."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(timeout=30)
        self._socket.close()

    def __repr__(self) -> str:
        return f"Explorer({self.model.name} at {self.url})"

    def _repr_html_(self) -> str:
        where = escape(self.url)
        return (
            f'<iframe src="{where}" title="explorer of {escape(self.model.name)}" '
            'style="width:100%;height:900px;border:1px solid #d0d4da;resize:vertical"></iframe>'
            f'<p><a href="{where}" target="_blank" rel="noopener">open in a window of its own</a></p>'
        )


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: the host or the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"the explorer cannot listen at {host}:{port} ({why}); port 0 takes a free one"
        ) from None
    return sock


def explore(
    model: Model,
    held: Examples | None = None,
    train: Examples | None = None,
    *,
    port: int = 0,
) -> Explorer:
    """Start the explorer of a model on this machine; a notebook shows it in a frame.

    Args:
        model: what is explored; the explorer's thread uses it until `close()`.
        held: examples that are offered, and on which edits are tested; built-in reviews where None.
        train: examples that edits learn from; built-in reviews where None.
        port: 0 takes a free one.

    Returns:
        the running server; `url` is its address, `close()` ends it.

    Raises:
        ConfigError: an argument of another type, or the port is taken.

    Example:
        >>> import mech_absa as ma
        >>> explorer = ma.explore(ma.load_model())
        >>> explorer.url.startswith("http://127.0.0.1:")
        True
        >>> explorer.close()
    """
    from ..readers import load_examples

    expect(model, Model, "explore(model=...)", "a Model, from load_model()")
    found = []
    for name, given, source in (("held", held, HELD), ("train", train, TRAIN)):
        if given is None:
            given = load_examples(source)
        expect(given, Examples, f"explore({name}=...)", "examples, from load_examples(...)")
        found.append(given)
    return Explorer(model, found[1], found[0], port=port, framed=NOTEBOOKS).start()


__all__ = ["Explorer", "Guard", "allowed_hosts", "application", "explore"]
