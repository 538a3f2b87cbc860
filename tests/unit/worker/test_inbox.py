"""The queue of a worker's main thread."""

from __future__ import annotations

from fcluster.worker.consuming import ReaderDied
from fcluster.worker.core import events
from fcluster.worker.inbox import Inbox


def test_order_is_kept_and_only_events_interrupt_a_chunk() -> None:
    inbox = Inbox()
    died, tick = ReaderDied("why"), events.Tick()
    inbox.put(died)
    assert not inbox.interrupts
    inbox.post(tick)
    assert inbox.interrupts
    taken = inbox.take(0)
    assert next(taken) is died
    assert not inbox.interrupts, "the chunk has ended"
    inbox.post(events.Connected())
    assert list(taken) == [tick, events.Connected()], "and what comes in the meantime"


def test_inbox_does_not_wait_unless_told_to() -> None:
    inbox = Inbox()
    assert list(inbox.take(0)) == []
    assert list(inbox.take(0.001)) == []
