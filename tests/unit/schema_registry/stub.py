"""An HTTP server that answers as a schema registry does, or as one in trouble does."""

from __future__ import annotations

import json
import ssl
import threading
from collections import deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Answer = tuple[int, Any]
"""Status and body: bytes as they are, and what else there is as JSON."""


class RegistryServer:
    """Answers what `_answer` says. Use it in a `with` block.

    Args:
        tls: a context with a certificate.

    Attributes:
        url: where it listens.
        requests: method and path of what was asked.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[tuple[str, str]] = []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._respond(None)

            def do_POST(self) -> None:
                self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def handle(self) -> None:
                with suppress(ConnectionError):  # the client has waited long enough
                    super().handle()

            def _respond(self, document: Any) -> None:
                registry.requests.append((self.command, self.path))
                authorization = self.headers.get("Authorization")
                status, found = registry._answer(self.command, self.path, document, authorization)
                body = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://localhost:{self._server.server_port}"

    def _answer(self, method: str, path: str, document: Any, authorization: str | None) -> Answer:
        """The answer to a request, of which `document` is the body."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class StubRegistry(RegistryServer):
    """Answers each request with the next of `answers`, and with the last one from then on."""

    def __init__(self, *answers: Answer) -> None:
        super().__init__()
        self._waiting = deque(answers)

    def _answer(self, method: str, path: str, document: Any, authorization: str | None) -> Answer:
        return self._waiting.popleft() if len(self._waiting) > 1 else self._waiting[0]
