"""What sessions report about themselves and their shards.

Responsible for: storing reports for status, progress and moves. Rule: a report counts only for shards that
the session owns at present. Must not: decide about sessions. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.copies import Copies, learn
from fcluster.coordinator.core.drift import SlowestInputs
from fcluster.coordinator.core.letters import Letters
from fcluster.coordinator.core.losses import Losses
from fcluster.coordinator.core.model import Session, SessionPhase
from fcluster.coordinator.core.outbox import Outbox
from fcluster.coordinator.core.ownership import Ownership
from fcluster.coordinator.core.progress import Progress
from fcluster.coordinator.core.run_end import ends_of
from fcluster.wire import messages
from fcluster.wire.messages import WorkerStats


class Reports:
    """Notes what workers report."""

    def __init__(
        self,
        cluster: Cluster,
        outbox: Outbox,
        ownership: Ownership,
        copies: Copies,
        progress: Progress,
        losses: Losses,
        letters: Letters,
    ) -> None:
        self._cluster = cluster
        self._outbox = outbox
        self._ownership = ownership
        self._copies = copies
        self._progress = progress
        self._losses = losses
        self._slowest = SlowestInputs(cluster)
        self._letters = letters
        topology = cluster.terms.topology
        self._written_by_the_job = frozenset(
            source.topic.name
            for source in topology.inputs
            if not source.internal and topology.feeders(source.topic.name)
        )

    def heartbeat(self, session: Session, heartbeat: messages.Heartbeat) -> None:
        """A heartbeat, with metrics and the state of shards and copies."""
        heard = min(session.orders, heartbeat.orders_heard)
        session.orders_heard = max(session.orders_heard, heard)
        stats = heartbeat.stats
        if stats.record is not None:
            session.busy_ms = self._cluster.now_ms
        self._learn_rates(session, stats)
        learn(session, [status for status in stats.standbys if status.shard in self._cluster.shards])
        if session.standbys and session.standbys_told is None:
            self._copies.tell(self._cluster.shards, self._cluster.slots)
        for status in stats.shards:
            self.running(session, status)
        self._slowest.learn(session.number, stats.slowest)
        if session.phase is not SessionPhase.OPENING:
            ends = self._late_ends(session)
            slowest = self._slowest.elsewhere(session.number)
            ack = messages.HeartbeatAck(self._cluster.term, session.number, ends, slowest)
            self._outbox.send(session.peer, ack)

    def _late_ends(self, session: Session) -> list[messages.EndOffset]:
        """Ends that may have become known after the session's shards were assigned."""
        cluster = self._cluster
        if cluster.run_end is None or not self._written_by_the_job.intersection(cluster.run_end.offsets):
            return []
        shards = [shard.identity for shard in cluster.shards_of(session.slot)]
        return ends_of(cluster, shards, self._written_by_the_job)

    def _learn_rates(self, session: Session, stats: WorkerStats) -> None:
        former, seconds = session.stats, (self._cluster.now_ms - session.stats_ms) / 1000
        if former is None or seconds > 0.05:
            if former is not None:
                session.records_in_per_second = max(0.0, (stats.records_in - former.records_in) / seconds)
                session.records_out_per_second = max(0.0, (stats.records_out - former.records_out) / seconds)
            session.stats = msgspec.structs.replace(stats, shards=[], standbys=[], slowest=[])
            session.stats_ms = self._cluster.now_ms

    def running(self, session: Session, status: messages.ShardStatus) -> None:
        """The session runs the shard. The report says how far it has come."""
        shard = self._cluster.shards.get(status.shard)
        if shard is None or shard.session != session.number:
            return  # the session doesn't own it (any more)
        self._ownership.runs(shard)
        self._progress.learn(status)
        self._letters.learn(status)

    def torn(self, session: Session, report: messages.TornTransaction) -> None:
        """Kafka has torn a transaction of one of the session's shards."""
        shard = self._cluster.shards.get(report.shard)
        if shard is None or shard.session != session.number:
            return  # the session doesn't own it (any more)
        if not report.stopped:
            self._cluster.counters.torn_transactions += 1
            self._outbox.log("warning", str(report.failure))
        elif self._ownership.stops(shard, report.failure):
            self._cluster.counters.torn_transactions += 1
            self._outbox.log("error", f"shard {shard.identity} is stopped: {report.failure}")

    def committed(self, session: Session, statuses: Sequence[messages.ShardStatus], last_letter: str) -> None:
        """A session reports what it has committed for its shards, and its last dead letter."""
        committed = self._cluster.committed
        for status in statuses:
            shard = self._cluster.shards.get(status.shard)
            if shard is not None and shard.session == session.number:
                self._progress.learn_commit(status)
                known = committed.get(status.shard)
                if known is None:
                    known = committed[status.shard] = {}
                if status.committed > known.get(status.input, -1):
                    known[status.input] = status.committed
                self._losses.committed(status)
                self._letters.learn(status, last_letter)
