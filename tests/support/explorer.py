"""A browser without a screen: what the explorer's page sends, and the events that it gets."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

REVIEW = {
    "sentence": "The food was great but the waiter was rude.",
    "aspect": "food",
    "edited": "The food was awful but the waiter was rude.",
}


class Client:
    """One browser: what its page sends, and the events it gets."""

    def __init__(self, url: str, name: str = "test"):
        parts = urlsplit(url)
        self.host, self.port, self.name = parts.hostname, parts.port, name
        self.token = parts.query.partition("token=")[2]
        self.connections: list[http.client.HTTPConnection] = []

    def request(self, method, path, body=None, headers=None, **more):
        """Return the response of a request with the token, or with other headers."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        self.connections.append(connection)
        headers = {"authorization": f"Bearer {self.token}"} if headers is None else headers
        connection.request(method, path, body, headers, **more)
        return connection.getresponse()

    def post(self, path, state=None, **more):
        """Return the response to a message of the page."""
        message = {"client": self.name, "state": REVIEW if state is None else state, **more}
        return self.request("POST", path, json.dumps(message))

    def ask(self, path, state=None, **more):
        """Return (status, JSON)."""
        answer = self.post(path, state, **more)
        return answer.status, json.loads(answer.read())

    def follow(self, path, state=None, **more) -> Iterator[tuple[str, dict]]:
        """Yield the events of a stream."""
        answer = self.post(path, state, **more)
        assert answer.status == 200 and answer.getheader("content-type").startswith("text/event")
        name = ""
        for raw in answer:
            line = raw.decode().rstrip("\n")
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])

    def leave(self):
        """Close every connection, as a closed window does."""
        for connection in self.connections:
            if connection.sock is not None:
                with contextlib.suppress(OSError):  # the server was faster
                    connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
