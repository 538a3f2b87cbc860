"""What is sent over a worker's link to its coordinator, and which events the main thread gets from it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator

import pytest

from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.wire import messages
from fcluster.wire.transport import FrameReceived, RouterTransport
from fcluster.worker import leader_link
from fcluster.worker.core import events, model
from fcluster.worker.core.state import CoreState
from fcluster.worker.leader_link import LeaderLink
from tests.harness import wait_until

IDENTITY = model.Identity("worker-1", "host", 1, -1, "fingerprint", "store", "1")
BOUNDS = model.Bounds(epoch_records_max=100, coordinator_loss_ms=1_000, offset_refresh_ms=1_000)
PATIENCE_S = 20.0
SESSION, TERM = 7, 3


class Linked:
    """A link, with the coordinator at its other end."""

    def __init__(self) -> None:
        self.router = RouterTransport()
        address = self.router.bind("tcp://127.0.0.1:0")
        self.posted: queue.SimpleQueue[events.Event] = queue.SimpleQueue()
        self.job_over: list[int] = []  # how many events were posted before it
        self.state = CoreState(IDENTITY, BOUNDS, 0)
        self.link = LeaderLink(
            Settings(bootstrap_servers="127.0.0.1:1"),
            "job",
            address,
            self.state,
            self.posted.put,
            on_job_over=lambda: self.job_over.append(self.posted.qsize()),
        )
        self.link.start()
        assert self.next_event() == events.Connected()
        self.state.session, self.state.term = SESSION, TERM

    def next_event(self) -> events.Event:
        return self.posted.get(timeout=PATIENCE_S)

    def answer(self, message: messages.FromCoordinator) -> None:
        """Send it as the coordinator."""
        self.answer_frame(messages.encode(message))

    def answer_frame(self, frame: bytes) -> None:
        """Send any frame as the coordinator."""
        # The link may be connected before the coordinator's socket knows the worker's identity.
        wait_until(
            lambda: self.router.send(b"worker-1", frame), "the worker's identity is known", PATIENCE_S, 0.001
        )

    def heard(self) -> messages.ToCoordinator:
        """The next message that the coordinator receives."""
        for _ in range(100):
            for event in self.router.poll(PATIENCE_S * 1000):
                if isinstance(event, FrameReceived):
                    return messages.decode_for_coordinator(event.frame)
        raise AssertionError("nothing was received")


@pytest.fixture
def linked() -> Iterator[Linked]:
    linked = Linked()
    yield linked
    linked.link.close()
    linked.router.close()


def begun() -> messages.RecordBegun:
    return messages.RecordBegun(SESSION, ShardId("in", 0), 5, "step", "record in/0 at offset 5", 0)


def test_messages_arrive_as_events_in_order_and_are_sent(linked: Linked) -> None:
    linked.link.send(messages.RecordEnded(SESSION))
    assert linked.heard() == messages.RecordEnded(SESSION)
    drain, barrier = messages.Drain(TERM, SESSION), messages.Barrier(TERM, SESSION, 4)
    linked.answer(drain)
    linked.answer(barrier)
    assert [linked.next_event() for _ in range(2)] == [
        events.MessageReceived(drain),
        events.MessageReceived(barrier),
    ]


def test_announcement_waits_until_the_coordinator_has_noted_it_which_is_no_event(
    linked: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_link, "ANNOUNCEMENT_S", 3_600.0)
    announced = threading.Event()

    def announce() -> None:
        linked.link.announce(begun())
        announced.set()

    thread = threading.Thread(target=announce, daemon=True)
    thread.start()
    assert linked.heard() == begun()
    linked.answer(messages.RecordNoted(TERM, SESSION, ShardId("in", 0), 5))
    assert announced.wait(PATIENCE_S)
    thread.join()
    assert linked.posted.empty()


@pytest.mark.parametrize(
    ("session", "term", "is_over"),
    [(SESSION, TERM, True), (0, TERM + 1, True), (SESSION - 1, TERM, False), (SESSION, TERM - 1, False)],
)
def test_job_is_over_at_once_if_the_shutdown_concerns_this_worker(
    linked: Linked, session: int, term: int, is_over: bool
) -> None:
    shutdown = messages.Shutdown(term, session, "stopped")
    linked.answer(shutdown)
    assert linked.next_event() == events.MessageReceived(shutdown)
    assert linked.job_over == ([0] if is_over else []), "before the event, which may wait for a record"


def test_flood_of_malformed_frames_does_not_fill_the_log(
    linked: Linked, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(9):
            linked.answer_frame(b"\xc1")
        linked.answer(messages.Drain(TERM, SESSION))
        linked.next_event()
    told = [record.getMessage() for record in caplog.records if "malformed" in record.getMessage()]
    assert [text.partition(":")[0] for text in told] == [
        f"dropped a malformed frame, {count} so far" for count in (1, 2, 4, 8)
    ]


def test_trouble_is_logged_once_until_it_changes(linked: Linked, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for trouble in ("no route", "no route", "refused", "no route"):
            linked.link.say_trouble(trouble)
    assert [record.getMessage() for record in caplog.records] == ["no route", "refused", "no route"]
