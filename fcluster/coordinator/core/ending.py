"""The end of the job: why it ends, draining the workers, and shutting them down.

Responsible for: the coordinator's phase, the reason for the end, and the exit code. Invariants:

- The decision is in the journal before any process is told (`Drain`, `Shutdown`; invariant 15). A new leader
  continues it.
- A worker that has committed all its work shuts down cleanly. A worker that hasn't in time is fenced.
- Every wait has a limit: for the workers, for the last fences, for the journal.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.coordinator.core import events
from fcluster.coordinator.core.agents import Agents
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.losses import Losses
from fcluster.coordinator.core.membership import Membership
from fcluster.coordinator.core.model import Phase, Session, SessionPhase, ShardPhase
from fcluster.coordinator.core.outbox import ENDING_KEY, Outbox
from fcluster.coordinator.core.progress import Progress
from fcluster.coordinator.core.rounds import Rounds
from fcluster.coordinator.core.run_end import RUN_END_KEY, RunEnd
from fcluster.wire import messages

FAILED_GRACE_MS = 2_000
"""How long a worker that reports a failed job has to commit its earlier work."""
STOP_GRACE_MS = 10_000
"""How long to wait for the last fences and journal writes. After that the coordinator exits without them."""
STOP_ASKERS_MAX = 100
ENDS_NAMED_MAX = 8


class Ending:
    """Ends the job."""

    def __init__(
        self,
        cluster: Cluster,
        outbox: Outbox,
        rounds: Rounds,
        progress: Progress,
        agents: Agents,
        membership: Membership,
        losses: Losses,
    ) -> None:
        self._cluster = cluster
        self._outbox = outbox
        self._rounds = rounds
        self._progress = progress
        self._agents = agents
        self._membership = membership
        self._losses = losses
        self._drain_began_ms = cluster.now_ms
        self._drain_deadline_ms = cluster.now_ms
        self._decided_sequence = 0
        self._stop_askers: list[bytes] = []
        self._next_end: RunEnd | None = None
        self._waiting_targets: list[tuple[str, Mapping[int, int], int]] = []

    def deadlines_ms(self) -> list[float | None]:
        """When something is due if nothing happens before that."""
        if self._cluster.phase is Phase.RUNNING:
            return []
        return [self._drain_deadline_ms, self._drain_began_ms + FAILED_GRACE_MS]

    # --- why ------------------------------------------------------------------------------------------

    def resume(self, decided: Mapping[str, Any]) -> None:
        """Continue an end that a previous leader decided and didn't complete."""
        if decided["failed"]:
            # An older version wrote only the text.
            self._cluster.failure = Failure.of_document(decided.get("failure") or decided["reason"])
        self.begin_drain(str(decided["reason"]))

    def follow_progress(self) -> None:
        """Drain once everything that belongs to the run is committed: with `until_caught_up`, the records
        that were in the sources at the start; in a bounded run, all that comes of its records.
        """
        if not self._progress.has_targets or self._cluster.phase is not Phase.RUNNING:
            return
        for stage, number in self._progress.inputs_to_read():
            self._outbox.add(events.ReadEndOffsets(stage, number))
        if self._progress.caught_up:
            self.begin_drain(self._complete())
            return
        stopped = self._stopped_shards()
        if self._progress.waits_only_for(stopped):
            first = min(stopped)
            cause = stopped[first]
            message = f"all records are committed except those of stopped shards: {first}: {cause.message}"
            self._cluster.failure = Failure(cause.kind, message, cause.remedy, cause.where).fitted()
            self.begin_drain(str(self._cluster.failure))

    def _stopped_shards(self) -> dict[ShardId, Failure]:
        """The shards that are stopped, and why."""
        if not self._cluster.counters.torn_transactions:
            return {}  # nothing else stops a shard; this is called at each event
        return {
            shard.identity: shard.stopped_by
            for shard in self._cluster.shards.values()
            if shard.phase is ShardPhase.STOPPED and shard.stopped_by is not None
        }

    def _complete(self) -> str:
        """Everything that belongs to the run is committed: the reason to end it."""
        run_end = self._cluster.run_end
        if run_end is None:
            return "all records that were in the sources at the start are committed"
        for topic, offsets in sorted(run_end.offsets.items()):
            self._outbox.log("info", f"{topic}: read to the end of the run, {_ranges(offsets)}")
        time_ends = self._cluster.terms.topology.keeps_time
        closed = "; event time has ended, and what waited for it is done" if time_ends else ""
        return f"the run has come to its end ({run_end.text}): all its records are committed{closed}"

    # --- the end of a bounded run ---------------------------------------------------------------------

    def end_offsets_read(self, stage: str, offsets: Mapping[int, int], number: int) -> None:
        """The present end of an input, all of whose writers in the job are done, becomes its target.

        In a bounded run, that of a user's topic is the end for its readers, too: others may still write to
        it. They are told once the journal holds it.
        """
        source = self._cluster.terms.topology.stage(stage).inputs[number]
        if self._cluster.run_end is None or source.internal:
            self._progress.set_target(stage, offsets, number)
            return
        known = self._cluster.run_end if self._next_end is None else self._next_end
        self._next_end = known.with_topic(source.topic.name, offsets)
        self._waiting_targets.append((stage, self._next_end.offsets[source.topic.name], number))
        sequence = self._outbox.journal(RUN_END_KEY, self._next_end.document())
        self._outbox.hold("end", sequence, 0)

    def end_written(self) -> None:
        """The journal holds the ends that were added."""
        self._cluster.run_end = self._next_end
        targets, self._waiting_targets = self._waiting_targets, []
        for stage, offsets, number in targets:
            self._progress.set_target(stage, offsets, number)

    # --- failures -------------------------------------------------------------------------------------

    def worker_failed(self, session: Session, failure: Failure) -> None:
        """A worker says that the job can't continue."""
        session.failed = True
        if not failure.message:
            failure = Failure(failure.kind, "a worker failed and gave no reason", failure.remedy)
        self._fail(failure.fitted())

    def fail(self, failure: Failure, grace_ms: float) -> None:
        """The job can't continue, whichever processes work on it.

        Args:
            failure: why, and what to do.
            grace_ms: how long to wait for uncommitted work. After that it is given up, because a worker may
                be unable to commit it.
        """
        cluster = self._cluster
        self._fail(failure)
        if cluster.phase is Phase.DRAINING:
            self._drain_deadline_ms = min(self._drain_deadline_ms, cluster.now_ms + grace_ms)

    def _fail(self, failure: Failure) -> None:
        """Only the first failure counts. The others usually follow from it."""
        cluster = self._cluster
        if cluster.failure is not None:
            return
        cluster.failure = failure
        self._outbox.log("error", f"the job can't continue: {failure}")
        if cluster.phase is Phase.DRAINING:
            cluster.stop_reason = str(failure)
            self._decide()  # the job ends in another way than was decided
        self.begin_drain(str(failure))

    def stop_asked(self, peer: bytes) -> None:
        """An admin client asks for the end of the job."""
        self.begin_drain("asked to stop by an admin client")
        if self._cluster.ending_told:
            self._outbox.send(peer, messages.StopReply(self._cluster.term))
        elif len(self._stop_askers) < STOP_ASKERS_MAX:
            self._stop_askers.append(peer)

    # --- the decision ---------------------------------------------------------------------------------

    def begin_drain(self, reason: str) -> None:
        """Decide that the job ends."""
        if self._cluster.phase is not Phase.RUNNING:
            return
        self._outbox.log("info", f"draining: {reason}")
        self._cluster.phase, self._cluster.stop_reason = Phase.DRAINING, reason
        self._decide()
        self._rounds.hurry()
        self._drain_began_ms = self._cluster.now_ms
        self._drain_deadline_ms = self._cluster.now_ms + 2 * self._cluster.settings.checkpoint_timeout_ms

    def _decide(self) -> None:
        """Journal the decision.

        A leader that can't write it was deposed, and must neither drain nor shut down any worker. A standby
        that takes over continues it.
        """
        failure = self._cluster.failure
        ending = {
            "reason": self._cluster.stop_reason,
            "failed": failure is not None,
            "failure": None if failure is None else failure.document(),
        }
        self._losses.forget()  # whoever starts the job again may have mended the handler
        self._decided_sequence = self._outbox.journal(ENDING_KEY, ending)
        self._outbox.hold("drain", self._decided_sequence, 0)

    def tell(self) -> None:
        """The journal holds the decision: carry it out."""
        self._cluster.ending_told = True
        for peer in self._stop_askers:
            self._outbox.send(peer, messages.StopReply(self._cluster.term))
        self._stop_askers.clear()
        for session in self._cluster.sessions.values():
            if session.phase is SessionPhase.LIVE:
                self._outbox.send(session.peer, messages.Drain(self._cluster.term, session.number))
        for joiner in self._cluster.joiners.values():
            self.turn_away(joiner.peer)
            if joiner.slot is not None:
                self._cluster.slots[joiner.slot].joiner = None
        self._cluster.joiners.clear()

    def turn_away(self, peer: bytes) -> None:
        """No process gets a session while the job ends. A worker that joins now is shut down.

        Nothing is sent before the journal holds the decision. The worker asks again in a second.
        """
        if self._cluster.ending_told:
            self._outbox.send(peer, self._cluster.shutdown())

    # --- carrying it out ------------------------------------------------------------------------------

    def follow_drain(self) -> None:
        """Shut the workers down once all have committed. Exit once the last fences and writes are done."""
        if self._cluster.phase is Phase.DRAINING:
            decided = self._cluster.ending_told and self._outbox.written_sequence >= self._decided_sequence
            undrained = [
                session for session in self._cluster.sessions.values() if not self._is_drained(session)
            ]
            if decided and (not undrained or self._cluster.now_ms >= self._drain_deadline_ms):
                self._shut_down()
        if self._cluster.phase is Phase.STOPPING:
            fencing = [slot.number for slot in self._cluster.slots.values() if not slot.fenced]
            if self._cluster.now_ms >= self._drain_deadline_ms:
                self._outbox.log(
                    "warning",
                    f"exiting although slots {fencing} are not fenced or the journal doesn't answer",
                )
            elif fencing or not self._outbox.is_all_written:
                return
            self.stop(
                ExitCode.JOB_FAILED if self._cluster.failure else ExitCode.DONE, self._cluster.stop_reason
            )

    def _is_drained(self, session: Session) -> bool:
        grace_over = self._cluster.now_ms >= self._drain_began_ms + FAILED_GRACE_MS
        return session.phase is SessionPhase.DRAINED or (session.failed and grace_over)

    def _shut_down(self) -> None:
        """Every worker has committed its work or has run out of time: shut them down, and fence the
        latter.
        """
        self._cluster.phase = Phase.STOPPING
        self._drain_deadline_ms = self._cluster.now_ms + STOP_GRACE_MS
        for session in list(self._cluster.sessions.values()):
            if session.peer:
                self._outbox.send(session.peer, self._cluster.shutdown(session.number))
            drained = session.phase is SessionPhase.DRAINED
            reason = "the job has stopped" if drained else "did not drain in time"
            self._membership.end(session, reason, clean=drained)
        for peer in self._agents.peers():
            self._outbox.send(peer, self._cluster.shutdown())

    def stop(self, exit_code: int, reason: str) -> None:
        """Stop the coordinator now."""
        self._cluster.phase = Phase.STOPPED
        failure = self._cluster.failure if exit_code == ExitCode.JOB_FAILED else None
        self._outbox.add(events.StopCoordinator(exit_code, reason, failure))


def _ranges(offsets: Mapping[int, int]) -> str:
    """The ends of a topic's partitions, in words."""
    named = [f"{partition} before {offset}" for partition, offset in sorted(offsets.items())[:ENDS_NAMED_MAX]]
    more = len(offsets) - len(named)
    return f"partition {', '.join(named)}" + (f" and {more} more" if more else "")
