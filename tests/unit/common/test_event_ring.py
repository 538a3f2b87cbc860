"""The ring of a core's last events: a replay of its file leads to the same decisions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from fcluster.common import event_ring
from fcluster.common.event_ring import EVENTS_KEPT, FILES_MAX, EventRing, read_ring
from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.wire import messages
from fcluster.worker.core import events
from fcluster.worker.core.model import Bounds, Identity
from fcluster.worker.core.worker import WorkerCore
from tests.simulation.replay import main, replay

IDENTITY = Identity("w", "h", 1, -1, "t", "s", "v")
BOUNDS = Bounds(epoch_records_max=1_000, coordinator_loss_ms=1_000, offset_refresh_ms=1_000)
SHARD = ShardId("flights", 0)
STORY = [
    events.Connected(),
    events.MessageReceived(messages.Welcome(1, 7, 0, 5, adopted=False, internal_topics={"a": "b"})),
    events.MessageReceived(messages.Assign(1, 7, [SHARD], 1, committed=[messages.CommittedOffset(SHARD, 3)])),
    events.ProducersOpened(7),
    events.ShardRestored(7, SHARD, CommittedPosition(offset=3, epoch=5, state_epoch=5, fingerprint="t")),
    events.RecordsProcessed(frozenset({SHARD}), 4, backlog=False),
    events.MessageReceived(messages.Barrier(1, 7, 6)),
    events.EpochFlushed(7, 6, 4, 1.5),
    events.MessageReceived(messages.Complete(1, 7, 6)),
    events.EpochCommitted(
        7, 6, 2.5, {SHARD: CommittedPosition(offset=7, epoch=6, state_epoch=6, fingerprint="t")}
    ),
    events.StopRecordReached(7, SHARD, 8, Failure.of_record("the key is 'Smith, 4711'", "mend it", "in/0@8")),
    events.Tick(),
]


def ring_of(directory: Path) -> EventRing:
    return EventRing("worker", "1", {"identity": IDENTITY, "bounds": BOUNDS, "now_ms": 0}, directory)


def played(directory: Path) -> EventRing:
    """The ring of a core that has handled the events."""
    ring, core = ring_of(directory), WorkerCore(IDENTITY, BOUNDS, 0)
    for now_ms, event in enumerate(STORY):
        ring.note(now_ms, event, core.handle(event, now_ms))
    return ring


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("events-worker-*.msgpack"))


def test_replay_of_a_file_makes_the_decisions_of_the_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    played(tmp_path).dump()
    (path,) = files(tmp_path)
    for _now_ms, _event, effects, before in replay(read_ring(path)):
        assert [type(effect).__name__ for effect in effects] == before
    assert main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "CommitEpoch(session=7, epoch=6)" in shown
    assert "0 events had other effects" in shown


def test_file_has_no_text_about_a_failure(tmp_path: Path) -> None:
    played(tmp_path).dump()
    (path,) = files(tmp_path)
    assert b"Smith" not in path.read_bytes()
    assert b"in/0@8" in path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0


def test_changed_decision_is_noticed(tmp_path: Path) -> None:
    ring = ring_of(tmp_path)
    ring.note(0, events.Connected(), [])
    ring.dump()
    assert main([str(files(tmp_path)[0])]) == 1


def test_ring_keeps_the_newest_events_and_marks_that_others_are_missing(tmp_path: Path) -> None:
    ring = ring_of(tmp_path)
    for now_ms in range(EVENTS_KEPT + 3):
        ring.note(now_ms, events.Tick(), [])
    ring.dump()
    found = read_ring(files(tmp_path)[0])
    assert not found.complete
    assert [now_ms for now_ms, *_rest in found.events] == list(range(3, EVENTS_KEPT + 3))
    assert main([str(files(tmp_path)[0])]) == 0


def test_failure_to_write_the_file_is_logged_and_no_process_fills_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = ring_of(tmp_path)
    with caplog.at_level(logging.WARNING, "fcluster.events"):
        ring.note(0, Unknown(), [])
        ring.dump()
    assert "can't be written" in caplog.text
    ring = ring_of(tmp_path)
    before = len(files(tmp_path))
    ring._numbers = iter(range(FILES_MAX - 1, 1_000))  # type: ignore[assignment]
    for _ in range(5):
        ring.dump()
    assert len(files(tmp_path)) == before + 2


def test_file_goes_to_the_systems_directory_if_the_clusters_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_ring.tempfile, "gettempdir", lambda: str(tmp_path))
    ring_of(tmp_path / "missing").dump()
    assert len(files(tmp_path)) == 1


class Unknown:
    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)
