from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from fcluster.wire import messages
from fcluster.wire.admin_client import AdminClient, CoordinatorSilent, RequestRefused
from fcluster.wire.transport import FrameReceived, RouterTransport

Answer = Callable[[messages.ToCoordinator], bytes | None]


class FakeCoordinator:
    """Answers each request in a thread, as `answer` says."""

    def __init__(self, answer: Answer, address: str = "tcp://127.0.0.1:0") -> None:
        self._answer = answer
        self._router = RouterTransport()
        self.address = self._router.bind(address)
        self.requests: list[messages.ToCoordinator] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing:
            for event in self._router.poll(None):
                if isinstance(event, FrameReceived):
                    request = messages.decode_for_coordinator(event.frame)
                    self.requests.append(request)
                    answer = self._answer(request)
                    if answer is not None:
                        self._router.send(event.peer, answer)

    def close(self) -> None:
        self._closing = True
        self._router.wake()
        self._thread.join()
        self._router.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeCoordinator]]:
    started: list[FakeCoordinator] = []

    def serve(answer: Answer, address: str = "tcp://127.0.0.1:0") -> FakeCoordinator:
        started.append(FakeCoordinator(answer, address))
        return started[-1]

    yield serve
    for coordinator in started:
        if not coordinator._closing:
            coordinator.close()


def status_of(document: object) -> bytes:
    return messages.encode(messages.StatusReply(term=1, status=msgspec.Raw(msgspec.msgpack.encode(document))))


def test_status_is_the_coordinators_document(serve: Callable[..., FakeCoordinator]) -> None:
    document = {"job": "j", "shards": [{"lag": 3, "rate": 0.5, "slot": None}]}
    coordinator = serve(lambda _request: status_of(document))
    with AdminClient(coordinator.address) as client:
        assert client.status() == document
        assert client.status() == document
    assert coordinator.requests == [messages.StatusRequest()] * 2


def test_stop_returns_when_the_coordinator_agrees(serve: Callable[..., FakeCoordinator]) -> None:
    coordinator = serve(lambda _request: messages.encode(messages.StopReply(term=1)))
    with AdminClient(coordinator.address) as client:
        client.stop()
    assert coordinator.requests == [messages.StopRequest()]


def test_refusal_names_its_reason(serve: Callable[..., FakeCoordinator]) -> None:
    coordinator = serve(
        lambda _request: messages.encode(messages.Refused(term=1, reason="deposed", retry=False))
    )
    with AdminClient(coordinator.address) as client, pytest.raises(RequestRefused, match="refused: deposed"):
        client.status()


def test_answer_of_another_kind_is_refused(serve: Callable[..., FakeCoordinator]) -> None:
    coordinator = serve(lambda _request: messages.encode(messages.StopReply(term=1)))
    with AdminClient(coordinator.address) as client, pytest.raises(RequestRefused, match="StopReply"):
        client.status()


def test_malformed_answer_is_an_error_for_users(serve: Callable[..., FakeCoordinator]) -> None:
    coordinator = serve(lambda _request: b"\x09nonsense")
    with (
        AdminClient(coordinator.address) as client,
        pytest.raises(CoordinatorSilent, match="protocol version"),
    ):
        client.status()


def test_status_that_is_not_a_document_is_refused(serve: Callable[..., FakeCoordinator]) -> None:
    coordinator = serve(lambda _request: status_of([1]))
    with AdminClient(coordinator.address) as client, pytest.raises(RequestRefused, match="not a document"):
        client.status()


def test_missing_answer_ends_at_the_timeout_and_names_the_address(
    serve: Callable[..., FakeCoordinator],
) -> None:
    coordinator = serve(lambda _request: None)
    with AdminClient(coordinator.address) as client, pytest.raises(CoordinatorSilent) as raised:
        client.status(timeout_ms=50)
    assert coordinator.address in raised.value.message
    assert "0.05 s" in raised.value.message


def test_late_answer_is_not_taken_for_the_next_request(serve: Callable[..., FakeCoordinator]) -> None:
    late = threading.Event()

    def answer(request: messages.ToCoordinator) -> bytes:
        if isinstance(request, messages.StatusRequest):
            assert late.wait(10)
            return status_of({"job": "late"})
        return messages.encode(messages.StopReply(term=1))

    coordinator = serve(answer)
    with AdminClient(coordinator.address) as client:
        with pytest.raises(CoordinatorSilent):
            client.status(timeout_ms=50)
        late.set()
        client.stop()


def test_client_finds_a_coordinator_that_was_restarted(serve: Callable[..., FakeCoordinator]) -> None:
    first = serve(lambda _request: status_of({"term": 1}))
    with AdminClient(first.address) as client:
        assert client.status() == {"term": 1}
        first.close()
        serve(lambda _request: status_of({"term": 2}), first.address)
        assert client.status() == {"term": 2}
