"""What a worker reports in its heartbeats, and what happens when a record has taken too long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fcluster.common.exit_codes import ExitCode
from fcluster.common.settings import Settings
from fcluster.wire import messages
from fcluster.worker.consuming import ReadUpTo
from fcluster.worker.core import model
from fcluster.worker.core.worker import WorkerCore
from fcluster.worker.health import WorkerHealth
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.pulse import PulseThread
from fcluster.worker.reporting import Reporting
from fcluster.worker.watchdog import Watchdog
from tests.unit.worker.worker_parts import (
    BOUNDS,
    IDENTITY,
    SESSION,
    Message,
    Pumping,
    counting_topology,
    shard_of,
)

TOPOLOGY = counting_topology(on_error="skip")
SHARD = shard_of(TOPOLOGY)


class FakeHost:
    """Restores one shard, of which half is read."""

    restoring = 1
    snapshot_epoch_min = 3

    def restore_progress(self) -> tuple[int, int, int]:
        return 10, 10, 500

    def standby_statuses(self) -> list[messages.StandbyStatus]:
        return []


class Bench:
    """The reporting of a worker with one shard."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fcluster.worker.pulse.LAST_WORD_S", 0)
        self.pumping = Pumping(TOPOLOGY)
        core = WorkerCore(IDENTITY, BOUNDS, 0)
        core.state = self.pumping.core_state
        self.core_state = core.state
        self.link = self.pumping.link
        waits, health = KafkaWaits(Watchdog()), WorkerHealth("j", "worker-1")
        host: Any = FakeHost()
        link: Any = self.link
        self.reporting = Reporting(
            core,
            link,
            health,
            host,
            self.pumping.shards,
            self.pumping.pump,
            self.pumping.pipeline,
            self.pumping.port,
            waits,
            self.pumping.record_watch,
        )
        self.ended: list[tuple[str, int]] = []
        self.pulse = PulseThread(
            Settings(record_timeout_ms=1_000),
            self.core_state,
            self.reporting,
            self.pumping.inbox,
            link,
            self.pumping.shards,
            self.pumping.record_watch,
            Watchdog(),
            waits,
            health,
            lambda reason, code: self.ended.append((reason, code)),
        )


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench(monkeypatch)
    yield bench
    bench.pumping.close()


def test_heartbeat_contains_the_newest_figures_of_all_parts(bench: Bench) -> None:
    bench.pumping.start()
    bench.pumping.read(Message(0), Message(1, b'"bad"'))
    bench.pumping.run()
    bench.reporting.send_heartbeat()
    bench.reporting.refresh()
    bench.reporting.send_heartbeat()
    before, after = bench.link.sent
    assert before.stats.records_in == 0, "figures that only the main thread may collect"
    stats = after.stats
    assert after.session == SESSION
    assert (stats.records_in, stats.records_out, stats.records_skipped) == (2, 1, 1)
    assert (stats.restoring, stats.restore_bytes, stats.restore_bytes_left) == (1, 10, 10)
    assert stats.snapshot_epoch_min == 3
    (shard,) = stats.shards
    assert shard == messages.ShardStatus(SHARD, 2, 0, -1, True, 0, 0), "read to 2, nothing is committed"


def test_lag_is_known_while_a_backlog_is_processed(bench: Bench) -> None:
    bench.pumping.start()
    bench.pumping.read(Message(0), full=True)
    reader: Any = bench.pumping.reader
    told = ReadUpTo(reader, reader.newest_generation, {("in", 0): 500}, {("in", 0): 700})
    bench.pumping.pump.add_told(told)  # while the batch before it waits
    bench.reporting.refresh()
    bench.reporting.send_heartbeat()
    (shard,) = bench.link.sent[-1].stats.shards
    assert (shard.position, shard.end) == (0, 700)


def test_shard_is_dirty_until_what_it_froze_is_committed_even_if_that_epoch_has_failed(bench: Bench) -> None:
    runner = bench.pumping.start()
    owned = bench.core_state.shards[SHARD]
    owned.position = runner.position
    bench.pumping.read(Message(0))
    bench.pumping.run()
    runner.freeze(4, "fingerprint")
    flight = model.InFlight(4, model.EpochPhase.PREPARING, frozenset({SHARD}))
    failed = None, owned.position
    for in_flight, position, dirty in (
        (flight, owned.position, True),
        (*failed, True),
        (None, runner.position, False),
    ):
        bench.core_state.in_flight, owned.position = in_flight, position
        bench.reporting.refresh()
        bench.reporting.send_heartbeat()
        (shard,) = bench.link.sent[-1].stats.shards
        assert shard.dirty is dirty


@pytest.mark.parametrize(("session", "connected"), [(0, True), (SESSION, False)])
def test_no_heartbeat_without_a_session_or_a_connection(bench: Bench, session: int, connected: bool) -> None:
    bench.core_state.session, bench.link.connected = session, connected
    bench.reporting.send_heartbeat()
    assert bench.link.sent == []


def test_long_record_is_reported_and_ends_its_chunk(bench: Bench) -> None:
    bench.pulse.watch_record(0.0)
    assert not bench.pumping.inbox.interrupts, "nothing runs"
    bench.pumping.record_watch.record = Message(5)  # type: ignore[assignment]
    bench.pulse.watch_record(1.0)
    assert bench.pumping.inbox.interrupts
    bench.reporting.send_heartbeat()
    bench.pulse.watch_record(1.5)
    bench.reporting.send_heartbeat()
    first, second = bench.link.sent
    assert first.stats.record is None
    assert second.stats.record == messages.RunningRecord("in", 0, 5, 500)
    assert bench.ended == []


def test_record_that_takes_too_long_ends_the_process_and_is_reported_to_the_coordinator(bench: Bench) -> None:
    bench.pumping.start()
    bench.pumping.record_watch.record = Message(5)  # type: ignore[assignment]
    bench.pulse.watch_record(1.0)
    bench.pulse.watch_record(2.0)
    (overdue,) = bench.link.sent
    assert isinstance(overdue, messages.RecordOverdue)
    assert (overdue.session, overdue.shard, overdue.offset) == (SESSION, SHARD, 5)
    ((reason, code),) = bench.ended
    assert "record in/0 at offset 5 has been processed for 1.0 s" in reason
    assert code == ExitCode.RECORD_OVERDUE


def test_record_of_a_released_shard_ends_the_process_as_well(bench: Bench) -> None:
    bench.pumping.record_watch.record = Message(5)  # type: ignore[assignment]
    bench.pulse.watch_record(1.0)
    bench.pulse.watch_record(2.0)
    assert bench.link.sent == []
    assert len(bench.ended) == 1
