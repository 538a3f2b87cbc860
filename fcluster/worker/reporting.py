"""What a worker reports about itself to the coordinator: the figures in its heartbeats.

Responsible for: collecting these figures from the worker's parts, and sending them. Heartbeats must not wait
for the main thread. So the main thread collects its own figures from time to time (`refresh`), and any thread
may send the newest of them, together with the figures that don't need the main thread (`send_heartbeat`).

Must not: decide anything from the figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from fcluster.common.clocks import monotonic_ms, wall_ms
from fcluster.common.failures import bounded_text
from fcluster.wire import messages
from fcluster.wire.messages import ShardStatus, WorkerStats
from fcluster.worker.core.state import CoreState
from fcluster.worker.core.worker import WorkerCore
from fcluster.worker.ending_inputs import has_ended
from fcluster.worker.epoch_pipeline import EpochPipeline
from fcluster.worker.epoch_trace import quantile
from fcluster.worker.health import WorkerHealth
from fcluster.worker.idle_inputs import Ahead, times_of
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.leader_link import LeaderLink
from fcluster.worker.processing import OutputPort, ShardRunner
from fcluster.worker.record_pump import RecordPump
from fcluster.worker.record_watch import RecordWatch, Running
from fcluster.worker.running_shards import RunningShards
from fcluster.worker.shards import ShardHost

LONG_RECORD_S = 0.2
"""A record that takes longer than this is reported."""


class Reporting:
    """See the module's docstring.

    Args:
        core: the core's state. It is only read.
        link: takes the heartbeats.
        health: gets the same figures.
        host: knows which shards are being restored and copied.
        shards: the shards that are read.
        pump: counts records.
        pipeline: counts epochs.
        port: counts outputs.
        kafka_waits: knows what waits for Kafka.
        record_watch: knows the record that is being processed.
    """

    def __init__(
        self,
        core: WorkerCore,
        link: LeaderLink,
        health: WorkerHealth,
        host: ShardHost,
        shards: RunningShards,
        pump: RecordPump,
        pipeline: EpochPipeline,
        port: OutputPort,
        kafka_waits: KafkaWaits,
        record_watch: RecordWatch,
    ) -> None:
        self._core = core
        self._link = link
        self._health = health
        self._host = host
        self._shards = shards
        self._pump = pump
        self._pipeline = pipeline
        self._port = port
        self._kafka_waits = kafka_waits
        self._record_watch = record_watch
        self._stats = WorkerStats()

    def refresh(self) -> None:
        """Collect the main thread's figures. Called by the main thread."""
        drift = self._pump.drift
        held = None if drift is None else drift.held
        latencies = self._pipeline.commit_latencies_ms()
        self._stats = WorkerStats(
            records_in=max(0, self._pump.records - self._port.watermarks_read),
            records_out=self._port.records,
            records_skipped=self._port.skipped,
            records_late=self._port.late,
            epochs_committed=self._pipeline.committed,
            commit_latency_ms_p50=quantile(latencies, 0.5),
            commit_latency_ms_p99=quantile(latencies, 0.99),
            epoch_phases=self._pipeline.traces.figures(),
            restoring=self._host.restoring,
            resident_bytes=_resident_bytes(),
            snapshot_epoch_min=self._host.snapshot_epoch_min,
            calls_wait=bounded_text(self._shards.calls.describe_wait(monotonic_ms()), 255),
            table_waits=self._pump.table_waits,
            shards=[
                status
                for runner in self._shards.runners.values()
                for status in statuses_of_runner(
                    self._core.state, runner, wall_ms(), held.get(runner.shard) if held else None
                )
            ],
            slowest=[] if drift is None else drift.slowest,
        )

    def send_heartbeat(self) -> None:
        """Send the newest figures, if there is a session. May be called from any thread."""
        read_bytes, left_bytes, left_ms = self._host.restore_progress()
        waits_for, waited_s = self._kafka_waits.longest()
        stats = msgspec.structs.replace(
            self._stats,
            restoring=self._host.restoring,
            restore_bytes=read_bytes,
            restore_bytes_left=left_bytes,
            restore_ms_left=left_ms,
            standbys=self._host.standby_statuses(),
            record=_long_record(self._record_watch.running),
            kafka_wait=waits_for,
            kafka_wait_ms=round(1000 * waited_s),
        )
        self._health.note_stats(stats)
        session = self._core.state.session
        if session and self._link.connected:
            self._link.send(messages.Heartbeat(session, stats, self._core.orders_heard))


def statuses_of_runner(
    state: CoreState, runner: ShardRunner, wall_ms: int, ahead: Ahead | None = None
) -> Iterator[ShardStatus]:
    """The status of a shard in each of its inputs.

    Args:
        state: the core's state.
        wall_ms: the time of the wall clock.
        ahead: why it isn't read on. None: it is.
    """
    shard = runner.shard
    owned = state.shards.get(shard)
    committed = owned.position if owned is not None and owned.position is not None else runner.position
    # An epoch that has failed isn't in flight any more. But its shard may not have been rewound yet.
    dirty = runner.is_touched or runner.position.epoch > committed.epoch
    ended = not dirty and not state.is_uncommitted(shard) and has_ended(runner)
    times = times_of(runner, wall_ms, ended, ahead)
    for one, at, event_time in zip(runner.inputs, committed.inputs, times, strict=True):
        position = max(one.read_position, one.next_offset)
        letters = "" if one.number else committed.letters
        yield ShardStatus(
            shard, position, at.offset, one.end, dirty, committed.epoch, one.number, event_time, letters
        )


def _long_record(running: Running | None) -> messages.RunningRecord | None:
    if running is None or running.running_s < LONG_RECORD_S:
        return None
    record = running.record
    where = record.topic() or "", record.partition() or 0, record.offset() or 0
    return messages.RunningRecord(*where, round(running.running_s * 1000))


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0  # not on Linux
