"""The state that all parts of the worker's core share: session, shards, epochs, the clock, and the effects.

Responsible for: holding that state in one place, the effects of the current event in order, and the end of
the process. Each part changes only what it is responsible for; `WorkerCore.invariants` checks that everything
fits together. Must not decide anything else. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.engine.failure import Condemnation
from fcluster.wire import messages
from fcluster.worker.core import events
from fcluster.worker.core.events import Effect
from fcluster.worker.core.model import (
    Bounds,
    Condemned,
    Identity,
    InFlight,
    OpenEpoch,
    OwnedShard,
    Phase,
    RecordAt,
    ShardPhase,
)
from fcluster.worker.core.pieces import Pieces


class CoreState:
    """The worker's state.

    Attributes:
        now_ms: the time of the current event. `effects`: its effects so far.
        heard_ms: when a coordinator last sent a message.
        slot: the worker's slot. Before its first session, the wanted one.
        aborting: the session goes on, but its transactions have to be aborted first. What was processed comes
            again.
        epoch_seen: the highest epoch that the worker knows.
        standbys: the shards of other workers of which the worker keeps warm copies.
        open: the epoch after the one `in_flight`.
        paused: all shards are paused. `backlog`: more records were available than were read.
        condemned: records that fail when they come, by shard, in the order in which their failures were
            found. Kept after the session ends.
        suspects: what is known about records that end processes, by shard, until the shard runs.
        pieces: how large an epoch may be while a record is looked for. Kept after the session ends.
        stage_sizes: how many shards each stage has, if the job uses event time or global tables.
        job_start: the number of the job's start, if it has global tables.
        slowest_elsewhere: see `HeartbeatAck.slowest`.
        leaving: the worker is going to exit. `drained`: an operator has removed it for good.
    """

    def __init__(self, identity: Identity, bounds: Bounds, now_ms: int) -> None:
        self.identity = identity
        self.bounds = bounds
        self.now_ms = now_ms
        self.effects: list[Effect] = []
        self.phase = Phase.JOINING
        self.term = 0
        self.session = 0
        self.slot = identity.wanted_slot
        self.connected = False
        self.heard_ms = now_ms
        self.producers_ready = False
        self.aborting = False
        self.shards: dict[ShardId, OwnedShard] = {}
        self.standbys: set[ShardId] = set()
        self.epoch_seen = 0
        self.open = OpenEpoch()
        self.in_flight: InFlight | None = None
        self.paused = False
        self.backlog = False
        self.condemned: dict[ShardId, list[Condemned]] = {}
        self.suspects: dict[ShardId, messages.SuspectRecord] = {}
        self.pieces = Pieces()
        self.stage_sizes: dict[str, int] = {}
        self.job_start = 0
        self.ends: dict[ShardId, dict[int, int]] = {}
        self.slowest_elsewhere: Sequence[messages.SlowestInput] = ()
        self.leaving = False
        self.drained = False

    def begin(self, now_ms: int) -> None:
        """Start an event, without effects."""
        self.now_ms = now_ms
        self.effects = []

    def add(self, effect: Effect) -> None:
        """Append an effect."""
        self.effects.append(effect)

    def send(self, message: messages.FromWorker) -> None:
        """Send a message to the coordinator."""
        self.effects.append(events.Send(message))

    def log(self, level: str, text: str) -> None:
        """Log a line."""
        self.effects.append(events.Log(level, text))

    def works(self) -> bool:
        """Whether the worker has a session in which it takes shards."""
        return self.phase in (Phase.STARTING, Phase.ACTIVE)

    def waits_for_commit(self) -> bool:
        """Whether nothing more is processed before the commit, because a record is being looked for."""
        records_max = self.pieces.records_max
        return records_max is not None and (self.in_flight is not None or self.open.records >= records_max)

    def running(self, shards: Iterable[ShardId]) -> frozenset[ShardId]:
        """The shards among these that may take part in further epochs."""
        return frozenset(
            shard
            for shard in shards
            if (owned := self.shards.get(shard)) is not None and owned.phase is ShardPhase.RUNNING
        )

    def is_uncommitted(self, shard: ShardId) -> bool:
        """Whether the shard has changes that aren't committed yet."""
        return shard in self.open.shards or (self.in_flight is not None and shard in self.in_flight.shards)

    def condemn(self, record: RecordAt, condemnation: Condemnation) -> None:
        """Make a record fail when it comes."""
        condemned = Condemned(record.offset, condemnation, record.input)
        self.condemned.setdefault(record.shard, []).append(condemned)

    def stop(self, code: int, why: str | Failure) -> None:
        """End the process; because of a failure, if `why` is one."""
        self.phase = Phase.STOPPED
        self.add(events.StopReading(tuple(self.shards)))
        self.add(events.Exit(code, str(why), why if isinstance(why, Failure) else None))

    def stop_as_asked(self) -> None:
        """End the process because it was asked to."""
        self.stop(ExitCode.DRAINED if self.drained else 0, "asked to leave")
