"""The HTTP port of a process: whether it is alive, whether it is ready, and its status, for probes and for
people.

Responsible for: `GET /live`, `/ready` and `/status`, and nothing else. A `Health` object provides the
answers. Rules: no client can hinder the process's work: one daemon thread accepts, a few threads answer,
requests are small, each connection has a time limit, and all others are closed. Answers use what the process
published, never data that another thread changes.

Must not change anything, nor reveal secrets. To add a page (for example metrics), add an entry to `_PAGES`.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import TCPServer
from typing import Any, BinaryIO, Final, Protocol, cast

import msgspec

from fcluster.common.errors import SettingsError
from fcluster.wire.security import is_loopback

_log = logging.getLogger("fcluster")

CONNECTIONS_MAX: Final = 8
"""How many connections are served at a time. More are closed at once. A probe tries again."""
CONNECTION_S_MAX: Final = 5.0
READ_TIMEOUT_S: Final = 2.0
REQUEST_BYTES_MAX: Final = 8 * 1024
SWEEP_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer to a probe: whether all is well, and a line for people."""

    ok: bool
    text: str


class Health(Protocol):
    """What a process reports about itself.

    Its methods are called by threads of the port, and never wait for long.
    """

    def live(self) -> Verdict:
        """Whether the process works at all. If not, killing it is right."""
        ...

    def ready(self) -> Verdict:
        """Whether it fulfils its purpose."""
        ...

    def status(self) -> Mapping[str, Any] | None:
        """The whole status, as data for JSON, without secrets. None if it isn't available right now."""
        ...


class Pulse:
    """Shows that a loop runs: at each iteration, the loop says by when the next one will come.

    Args:
        what: the name of the loop.
        bound_s: until the first iteration.
    """

    def __init__(self, what: str, bound_s: float) -> None:
        self._what = what
        self._beaten = (0.0, 0.0)
        self.beat(bound_s)

    def beat(self, bound_s: float) -> None:
        """The loop has run once, and will run again within `bound_s` seconds. By one thread only."""
        now_s = time.monotonic()
        self._beaten = (now_s, now_s + bound_s)

    def trouble(self) -> str:
        """Why the loop seems to be stuck; empty if it runs. By any thread."""
        turned_s, due_s = self._beaten
        now_s = time.monotonic()
        if now_s <= due_s:
            return ""
        return f"{self._what} has been stuck for {now_s - turned_s:.1f} s"


class HealthServer:
    """An open port.

    Args:
        address: the host and port to listen on. Port 0 chooses a free one.
        health: provides the answers.
        status_told: whether `/status` is served. If not, that information needs an admin's key.

    Raises:
        OSError: the address can't be used.
    """

    def __init__(self, address: tuple[str, int], health: Health, *, status_told: bool = True) -> None:
        self._server = _Server(address, health, status_told)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": SWEEP_S}, name="http", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """The URL at which it listens."""
        host, port = self._server.server_address[:2]
        name = host if isinstance(host, str) else bytes(host).decode()
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def close(self) -> None:
        """Stop listening. Clients that are being answered get the rest of their answer."""
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def health_port(bind: str, health: Health, *, insecure: bool = False) -> Generator[HealthServer | None]:
    """The port that the setting `http.bind` asks for, while the block runs. None if it is empty.

    Beyond loopback it answers only probes, unless the network is trusted (`insecure`).

    Raises:
        SettingsError: the address can't be used.
    """
    if not bind:
        yield None
        return
    try:
        told = insecure or is_loopback(f"http://{bind}")
        server = HealthServer(split_address(bind), health, status_told=told)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"Can't open the HTTP port {bind}: {error}.",
            remedy="Choose a free address in the setting http.bind. Port 0 takes any free port, which the "
            "log names.",
        ) from error
    _log.info("health at %s (/live, /ready%s)", server.url, ", /status" if told else "")
    try:
        yield server
    finally:
        server.close()


def split_address(bind: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[v6]:port``.

    Raises:
        ValueError: it isn't one.
    """
    host, colon, port = bind.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or (":" in host) != bracketed or not port.isascii() or not port.isdigit():
        raise ValueError(f"{bind!r} is not of the form host:port")
    number = int(port)
    if number > 65_535:
        raise ValueError(f"there is no port {number}")
    return host, number


# --- the server -------------------------------------------------------------------------------------------


class _Server(HTTPServer):
    """Accepts connections in one thread, and answers them in a few others."""

    request_queue_size = 16

    def __init__(self, address: tuple[str, int], health: Health, status_told: bool) -> None:
        self.health = health
        self.status_told = status_told
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._permits = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._lock = threading.Lock()
        self._deadlines_s: dict[socket.socket, float] = {}
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own method asks a name server for our name, which can take long.
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._permits.acquire(blocking=False):
            self.shutdown_request(request)
            return
        with self._lock:
            self._deadlines_s[request] = time.monotonic() + CONNECTION_S_MAX
        try:
            threading.Thread(
                target=self._answer, args=(request, client_address), name="http-answer", daemon=True
            ).start()
        except RuntimeError:  # no more threads can be started
            self._done(request)

    def service_actions(self) -> None:
        """Close connections that have been open for too long. Called twice a second, and after a request."""
        now_s = time.monotonic()
        with self._lock:
            for request, deadline_s in self._deadlines_s.items():
                if now_s >= deadline_s:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        _log.debug("an HTTP request failed", exc_info=True)

    def _answer(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:  # noqa: BLE001  a client may send anything
            self.handle_error(request, client_address)
        finally:
            self._done(request)

    def _done(self, request: socket.socket) -> None:
        with self._lock:
            del self._deadlines_s[request]
        self.shutdown_request(request)
        self._permits.release()


class _Short:
    """A request's bytes, up to the limit."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.left_bytes = REQUEST_BYTES_MAX

    def readline(self, size: int = -1) -> bytes:
        line = self._file.readline(self.left_bytes if size < 0 else min(size, self.left_bytes))
        self.left_bytes -= len(line)
        return line

    def close(self) -> None:
        self._file.close()


class _Handler(BaseHTTPRequestHandler):
    """One request; HTTP/1.0, so the connection ends with it."""

    server_version = "fcluster"
    sys_version = ""
    timeout = READ_TIMEOUT_S

    def setup(self) -> None:
        super().setup()
        self.rfile = cast("Any", _Short(cast("BinaryIO", self.rfile)))

    def do_GET(self) -> None:
        if cast("_Short", self.rfile).left_bytes <= 0:
            self._answer(431, "the request is too large")
        elif self.headers.get("Transfer-Encoding") or self.headers.get("Content-Length", "0") != "0":
            self._answer(413, "requests must have no body")
        else:
            page = _PAGES.get(self.path.partition("?")[0])
            if page is None:
                self._answer(404, f"there are {', '.join(_PAGES)}")
            else:
                page(self, cast("_Server", self.server).health)

    do_HEAD = do_GET  # noqa: N815  the name that http.server looks for

    def _refuse(self) -> None:
        self._answer(405, "only GET and HEAD are supported", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def answer_verdict(self, verdict: Verdict) -> None:
        self._answer(200 if verdict.ok else 503, verdict.text)

    def answer_document(self, ask: Callable[[], Mapping[str, Any] | None]) -> None:
        if not cast("_Server", self.server).status_told:
            self._answer(
                403, "the status is served over loopback only; use `fcluster status` with an admin's key"
            )
            return
        document = ask()
        if document is None:
            self._answer(503, "the status isn't available right now")
        else:
            self._send(200, "application/json", msgspec.json.encode(document) + b"\n", {})

    def _answer(self, code: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(code, "text/plain; charset=utf-8", text.encode() + b"\n", headers or {})

    def _send(self, code: int, kind: str, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class's signature
        """Probes come every few seconds, so they aren't logged."""


_PAGES: Final[Mapping[str, Callable[[_Handler, Health], None]]] = {
    "/live": lambda handler, health: handler.answer_verdict(health.live()),
    "/ready": lambda handler, health: handler.answer_verdict(health.ready()),
    "/status": lambda handler, health: handler.answer_document(health.status),
}
