"""The HTTP port: what it answers, and that no client can block it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from fcluster.common.errors import SettingsError
from fcluster.wire import http_port as port
from fcluster.wire.http_port import HealthServer, Pulse, Verdict, health_port, split_address
from tests.harness import wait_until, wait_until_equal

LOCAL = ("127.0.0.1", 0)


class Told:
    """Reports what the test tells it to."""

    def __init__(self) -> None:
        self.live_verdict = Verdict(True, "lives")
        self.ready_verdict = Verdict(False, "restoring")
        self.document: Mapping[str, Any] | None = {"role": "test"}
        self.hold = threading.Event()
        self.hold.set()

    def live(self) -> Verdict:
        self.hold.wait(10)
        return self.live_verdict

    def ready(self) -> Verdict:
        return self.ready_verdict

    def status(self) -> Mapping[str, Any] | None:
        return self.document


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def server(told: Told) -> Iterator[HealthServer]:
    server = HealthServer(LOCAL, told)
    yield server
    told.hold.set()
    server.close()


def address_of(server: HealthServer) -> tuple[str, int]:
    return split_address(server.url.removeprefix("http://"))


def ask(
    server: HealthServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, Mapping[str, str], str]:
    connection = http.client.HTTPConnection(*address_of(server), timeout=5)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read().decode()
    finally:
        connection.close()


def raw(server: HealthServer, request: bytes) -> bytes:
    with socket.create_connection(address_of(server), 5) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(4096):
            received += chunk
        return received


def test_probes_get_a_code_and_the_reason(server: HealthServer, told: Told) -> None:
    assert ask(server, "/live")[::2] == (200, "lives\n")
    assert ask(server, "/ready")[::2] == (503, "restoring\n")
    told.ready_verdict = Verdict(True, "runs")
    assert ask(server, "/ready?verbose=1")[::2] == (200, "runs\n")


def test_status_is_json(server: HealthServer, told: Told) -> None:
    code, headers, body = ask(server, "/status")
    assert (code, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body) == {"role": "test"}
    told.document = None
    assert ask(server, "/status")[0] == 503


def test_head_has_the_same_headers_and_no_body(server: HealthServer) -> None:
    code, headers, body = ask(server, "/status", "HEAD")
    assert (code, body) == (200, "")
    assert int(headers["Content-Length"]) > 0


def test_nothing_else_is_answered(server: HealthServer) -> None:
    code, _, body = ask(server, "/etc/passwd")
    assert code == 404
    assert "/status" in body
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        code, headers, _ = ask(server, "/live", method)
        assert (code, headers["Allow"]) == (405, "GET, HEAD")
    assert ask(server, "/live", "GET", **{"Content-Length": "5"})[0] == 413
    assert b" 400 " in raw(server, b"GET /live HTTP/9.9.9\r\n\r\n")


def test_answers_contain_no_versions(server: HealthServer) -> None:
    assert ask(server, "/live")[1]["Server"].strip() == "fcluster"


def test_request_that_is_too_large_is_refused(server: HealthServer) -> None:
    headers = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 500) for number in range(40))
    answer = raw(server, b"GET /live HTTP/1.0\r\n" + headers[: 2 * port.REQUEST_BYTES_MAX])
    assert answer.split(b" ")[1] in (b"431", b"400")
    line = raw(server, b"GET /" + b"x" * (port.REQUEST_BYTES_MAX + 10))
    assert line.split(b" ")[1:2] != [b"200"]
    assert ask(server, "/live")[0] == 200


def test_too_many_connections_are_closed_and_probes_are_answered_afterwards(
    server: HealthServer, told: Told
) -> None:
    told.hold.clear()
    crowd = [socket.create_connection(address_of(server), 5) for _ in range(port.CONNECTIONS_MAX)]
    for connection in crowd:
        connection.sendall(b"GET /live HTTP/1.0\r\n\r\n")
    wait_until_equal(_answering, port.CONNECTIONS_MAX, "all are being answered", 5)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(server, "/live")
    assert _answering() == port.CONNECTIONS_MAX, "the number of threads is limited"
    told.hold.set()
    for connection in crowd:
        connection.close()
    wait_until_equal(_answering, 0, "all are answered", 5)
    assert ask(server, "/live")[0] == 200


def _answering() -> int:
    return sum(thread.name == "http-answer" for thread in threading.enumerate())


def test_slow_connection_is_closed(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "CONNECTION_S_MAX", 1.0)
    with socket.create_connection(address_of(server), 5) as connection:
        connection.settimeout(10)
        began_s = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
            while time.monotonic() - began_s < 8:
                connection.sendall(b"X")  # a byte now and then, so that reading never times out
                time.sleep(0.1)
        assert time.monotonic() - began_s < 5
    wait_until_equal(_answering, 0, "its thread has ended", 5)


def test_silent_connection_is_closed(server: HealthServer) -> None:
    with socket.create_connection(address_of(server), 5) as connection:
        connection.settimeout(10)
        assert connection.recv(1) == b""


def test_port_is_off_by_default_and_a_taken_one_is_named(told: Told) -> None:
    with health_port("", told) as none:
        assert none is None
    with health_port("127.0.0.1:0", told) as server:
        assert server is not None
        taken = server.url.removeprefix("http://")
        with pytest.raises(SettingsError, match="http"), health_port(taken, told):
            pass
    with health_port(taken, told):
        pass  # it was closed


def test_status_is_shown_beyond_loopback_only_in_a_trusted_network(told: Told) -> None:
    """Otherwise an admin's key is needed."""
    for bind, insecure, code in (
        ("0.0.0.0:0", False, 403),
        ("0.0.0.0:0", True, 200),
        ("127.0.0.1:0", False, 200),
    ):
        with health_port(bind, told, insecure=insecure) as server:
            assert server is not None
            port = server.url.rpartition(":")[2]
            for page, expected in (("/status", code), ("/live", 200)):
                with socket.create_connection(("127.0.0.1", int(port)), 5) as connection:
                    connection.sendall(f"GET {page} HTTP/1.0\r\n\r\n".encode())
                    answer = connection.makefile("rb").read()
                assert answer.startswith(f"HTTP/1.0 {expected} ".encode()), (bind, page, answer)
            if code == 403:
                assert b"settings" not in answer


@pytest.mark.parametrize("bind", ["", "8080", "host", "host:", "host:x", "host:70000", "::1:80", "host:-1"])
def test_bad_address_is_refused(bind: str) -> None:
    with pytest.raises(ValueError, match=r"host:port|port 70000"):
        split_address(bind)


def test_pulse_names_what_stopped_and_since_when() -> None:
    pulse = Pulse("the loop", 60)
    assert not pulse.trouble()
    pulse.beat(0.01)
    wait_until(lambda: "the loop has been stuck for" in pulse.trouble(), "the missing pulse is noticed", 5)
    pulse.beat(60)
    assert not pulse.trouble()
