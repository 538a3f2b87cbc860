"""An HTTP server that answers as a schema registry does, or as one in trouble does."""

from __future__ import annotations

import json
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, Any] | bytes]
"""Status and body: JSON, or as it is."""


class StubRegistry:
    """Answers each request with the next of `answers`, and with the last one from then on. Use it in a
    `with` block.

    Attributes:
        url: where it listens.
        requests: method and path of what was asked.
    """

    def __init__(self, *answers: Answer) -> None:
        waiting, self.requests = deque(answers), []
        requests: list[tuple[str, str]] = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self._answer()

            def _answer(self) -> None:
                requests.append((self.command, self.path))
                status, document = waiting.popleft() if len(waiting) > 1 else waiting[0]
                body = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StubRegistry:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
