"""What a worker reports about itself over HTTP.

Responsible for: reporting whether the main loop and the heartbeats run, whether all shards run, and metrics.
The worker's main thread publishes what it knows as one immutable object, and the threads of the HTTP port
read it. Whether the *coordinator* answers isn't part of a worker's health: a worker that waits for the next
leader works as intended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from fcluster.common.ids import ShardId
from fcluster.wire.http_port import Pulse, Verdict
from fcluster.wire.messages import WorkerStats
from fcluster.worker.core.model import Phase, ShardPhase
from fcluster.worker.core.state import CoreState

STARTING_BOUND_S = 120.0
HEARTBEAT_SLACK_S = 10.0
SHARDS_NAMED_MAX = 10
_NOT_READY = {
    Phase.JOINING: "joining: it has no session yet",
    Phase.STARTING: "starting: its producers are being initialised",
    Phase.DRAINING: "draining: it processes no more records",
    Phase.DRAINED: "drained: it processes no more records",
    Phase.STOPPED: "it ends",
}


@dataclass(frozen=True, slots=True)
class _Known:
    phase: Phase
    session: int
    slot: int
    term: int
    connected: bool
    paused: bool
    epoch: int
    shards: tuple[tuple[ShardId, ShardPhase], ...]
    standbys: tuple[ShardId, ...]


class WorkerHealth:
    """See the module's docstring.

    Args:
        job: the name of the job that it works on.
        worker: the worker's name.
    """

    def __init__(self, job: str, worker: str) -> None:
        self._job = job
        self._worker = worker
        self._loop = Pulse("the main loop", STARTING_BOUND_S)
        self._heartbeats = Pulse("the thread that sends heartbeats", STARTING_BOUND_S)
        self._known = _Known(Phase.JOINING, 0, -1, 0, False, False, 0, (), ())
        self._stats = WorkerStats()

    # --- for the worker's threads -----------------------------------------------------------------------

    def turned(self, bound_s: float) -> None:
        """Note that the main loop has run once."""
        self._loop.beat(bound_s)

    def sent_heartbeat(self, interval_s: float) -> None:
        """Note that the heartbeat thread has run once."""
        self._heartbeats.beat(interval_s + HEARTBEAT_SLACK_S)

    def publish(self, core_state: CoreState) -> None:
        """Publish the core's changed state. Called in the main thread."""
        self._known = _Known(
            core_state.phase,
            core_state.session,
            core_state.slot,
            core_state.term,
            core_state.connected,
            core_state.paused,
            core_state.epoch_seen,
            tuple((shard, owned.phase) for shard, owned in core_state.shards.items()),
            tuple(core_state.standbys),
        )

    def note_stats(self, stats: WorkerStats) -> None:
        """Note the figures of the last heartbeat."""
        self._stats = stats

    # --- for the HTTP port ------------------------------------------------------------------------------

    def live(self) -> Verdict:
        trouble = self._loop.trouble() or self._heartbeats.trouble()
        return Verdict(not trouble, trouble or f"lives: {self._known.phase.value}")

    def ready(self) -> Verdict:
        known = self._known
        trouble = self._loop.trouble() or self._heartbeats.trouble()
        if trouble:
            return Verdict(False, trouble)
        if known.phase is not Phase.ACTIVE:
            return Verdict(False, _NOT_READY[known.phase])
        # A shard that is being released will soon run elsewhere.
        held = [
            f"{shard} is {phase.value}"
            for shard, phase in known.shards
            # A stopped shard waits for a person, and another worker's start should not wait for that.
            if phase not in (ShardPhase.RUNNING, ShardPhase.RELEASING, ShardPhase.STOPPED)
        ]
        if held:
            named = ", ".join(held[:SHARDS_NAMED_MAX])
            text = f"{len(held)} of {len(known.shards)} shards aren't running: {named}{self._restore_text()}"
            return Verdict(False, text)
        return Verdict(True, f"runs {len(known.shards)} shards as slot {known.slot}")

    def status(self) -> Mapping[str, Any]:
        known, stats = self._known, self._stats
        return {
            "role": "worker",
            "job": self._job,
            "worker": self._worker,
            "slot": known.slot,
            "session": known.session,
            "term": known.term,
            "phase": known.phase.value,
            "connected": known.connected,
            "paused": known.paused,
            "epoch": known.epoch,
            "shards": [
                {"stage": shard.stage, "partition": shard.partition, "phase": phase.value}
                for shard, phase in known.shards
            ],
            "standbys": [{"stage": shard.stage, "partition": shard.partition} for shard in known.standbys],
            "stats": msgspec.to_builtins(stats),
        }

    def _restore_text(self) -> str:
        stats = self._stats
        if not stats.restoring:
            return ""
        left = "" if stats.restore_ms_left < 0 else f", {stats.restore_ms_left / 1000:.1f} s left"
        return f"; restored {stats.restore_bytes} bytes{left}"
