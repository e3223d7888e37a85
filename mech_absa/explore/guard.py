"""Who may use the explorer: a token, the names of this server, bounds on what is sent, and headers of every answer.

Without the token of the printed address nothing is answered. Requests whose `Host` is another name than
the server's are refused, so that no web page can reach it through a name of its own.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from ..words import shown

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = "127.0.0.1"
MOST_BYTES = 64 << 10
"""Of a request."""


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
            await refused(request, status, sentence)(scope, receive, _with_headers(send))

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


def refused(request: Request, status: int, sentence: str) -> Response:
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


__all__ = ["LOOPBACK", "MOST_BYTES", "Guard", "allowed_hosts", "refused"]
