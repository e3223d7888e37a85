"""The explorer as an object: a server on this machine, started by the command or from a notebook.

It listens to this machine only, unless another host is asked for. `guard.py` says who may use it, and
`routes.py` what it serves.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from html import escape

import uvicorn

from ..errors import ConfigError
from ..examples import Examples
from ..model import Model
from ..prompts import PromptTemplate, Verbalizer
from ..words import expect
from .ask import Question
from .guard import LOOPBACK, Guard, allowed_hosts
from .routes import Routes
from .session import Session

NOTEBOOKS = "http://localhost:* http://127.0.0.1:* https://localhost:* vscode-webview:"
"""Pages that may hold the explorer in a frame, where a notebook started it."""
TRAIN, HELD = "builtin:restaurant/train", "builtin:restaurant/test"


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

    Example:
        >>> import mech_absa as ma
        >>> reviews = ma.load_examples("builtin:restaurant/test")
        >>> explorer = ma.Explorer(ma.load_model(), train=reviews, held=reviews).start()
        >>> explorer.url == f"http://127.0.0.1:{explorer.port}/?token={explorer.url[-32:]}"
        True
        >>> explorer.close()
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
        token = secrets.token_urlsafe(24)
        routes = Routes(question, self.session, train, held, token, framed, tuple(words))
        application = Guard(routes.application(), token, allowed_hosts(host, self.port))
        shown_host = LOOPBACK if host in ("0.0.0.0", "::") else host
        self.url = f"http://{shown_host}:{self.port}/?token={token}"
        config = uvicorn.Config(
            application, log_level="error", access_log=False,
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
        sock.listen()  # who opens the address at once waits, and is not refused
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


__all__ = ["Explorer", "explore"]
