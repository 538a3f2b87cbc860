"""A model of the coordinator's shell around the real core: journal, fences, socket, timer.

Responsible for: becoming the leader (the journal's writer is fenced, the journal is read, and gets the new
term), and carrying out what the core decides. Journal writes go out one after another. If Kafka refuses a
write, another coordinator leads. If the outcome of a write is unknown, the process ends, and its successor
reads what happened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fcluster.common.exit_codes import ExitCode
from fcluster.common.ids import transactional_ids
from fcluster.common.positions import decode_position
from fcluster.coordinator.core import events
from fcluster.coordinator.core.coordinator import Coordinator
from fcluster.coordinator.core.model import Terms
from fcluster.coordinator.core.run_end import RUN_END_KEY, RunEnd
from fcluster.wire import messages
from tests.simulation.brokers import GROUP
from tests.simulation.worker_shell import shown
from tests.simulation.world import Call, KafkaFailure, Process, Router, Sleep, Thread

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

STANDBY = b"standby"
JOURNAL = ("journal", 0)


class SimCoordinator(Process):
    """One coordinator process."""

    core_class: type[Coordinator] = Coordinator

    def __init__(self, cluster: Cluster, name: str) -> None:
        super().__init__(cluster.world, name)
        self.cluster = cluster
        self.kafka = cluster.kafka
        self.core: Coordinator | None = None
        self.term = 0
        self.exit_code: int | None = None
        self.router = Router(self, self._on_frame, lambda peer: self.feed(events.PeerDisconnected(peer)))
        self._writer = 0
        self._writes: deque[events.WriteJournal] = deque()
        self._writing = False
        self._timer_ms: float | None = None
        self.start(self._lead())

    # --- life -----------------------------------------------------------------------------------------

    def step(self, name: str) -> None:
        """A point at which faults are likely to happen."""
        self.cluster.step(self, f"coordinator: {name}")

    @property
    def leads(self) -> bool:
        """Whether the journal would accept a write from it."""
        return self.kafka.journal.is_current(self._writer)

    def died(self) -> None:
        self.router.close(self.world.up_to(5))
        self.cluster.coordinator_ended(self)

    def exit(self, code: int, reason: str) -> None:
        """End in any order."""
        self.note("exits with code %d: %s", code, reason)
        self.exit_code = code
        self.alive = False
        # Messages that were sent still arrive.
        self.world.at(self.world.timing.network_ms_max * 4 + 1, None, self.router.close, 1)
        self.cluster.coordinator_ended(self)

    def _lead(self) -> Thread:
        journal = self.kafka.journal
        try:
            self._writer = yield Call("journal: begin", journal.begin, place=JOURNAL)
            self.step("journal begun")
            found = yield Call("journal: read", lambda: dict(journal.entries), place=JOURNAL)
            run_end = self.run_end(found)
            self.term = found.get("term", {"number": 0})["number"] + 1
            yield Call("journal: term", lambda: self._write_term(run_end), place=JOURNAL)
            self.step("term written")
            epoch = yield Call("committed epoch", self._highest_committed_epoch, place=GROUP)
        except KafkaFailure as failure:
            self.exit(ExitCode.TEMPORARY, f"can't lead: {failure}")
            return
        cluster = self.cluster
        terms = Terms(
            term=self.term,
            topology=cluster.topology,
            partitions=cluster.partition_counts,
            settings=cluster.settings,
            expected_workers=cluster.expected_workers,
            version="1",
            run_end=run_end,
            highest_committed_epoch=epoch,
        )
        self.note("## leads in term %d", self.term)
        self.core = self.core_class.recover(found, terms, self.world.now_ms)
        self.cluster.leads(self)
        self.router.listening = True
        self.feed(events.Started())

    def run_end(self, found: Mapping[str, Any]) -> RunEnd | None:
        """Where the run ends: as the journal says, which the first leader writes."""
        document = found.get(RUN_END_KEY)
        return self.cluster.run_end if document is None else RunEnd.of_document(document)

    def _write_term(self, run_end: RunEnd | None) -> None:
        entries: dict[str, Any] = {"term": {"number": self.term}}
        if run_end is not None:
            entries[RUN_END_KEY] = run_end.document()
        self.kafka.journal.write(self._writer, entries)
        self.kafka.journal.leader = self

    def _highest_committed_epoch(self) -> int:
        found = (decode_position(offset, metadata) for offset, metadata, _ in self.kafka.offsets.values())
        return max((position.epoch for position in found), default=0)

    # --- events and effects ---------------------------------------------------------------------------

    def _on_frame(self, peer: bytes, frame: bytes) -> None:
        message = messages.decode_for_coordinator(frame)
        if self.world.transcript is not None and not isinstance(message, messages.Heartbeat):
            self.note("<- %s: %s", peer.decode(), shown(message))
        self.feed(events.MessageReceived(peer, message))

    def feed(self, event: events.Event) -> None:
        """Pass an event to the core, and carry out what it decides."""
        core = self.core
        if core is None or not self.alive:
            return
        if self.world.transcript is not None and not isinstance(event, events.MessageReceived | events.Tick):
            self.note("%s", shown(event))
        effects = core.handle(event, self.world.now_ms)
        core.invariants()
        if core.failure:
            self.cluster.checks.fail(f"the job failed: {core.failure}")
        for number, effect in enumerate(effects):
            if number:
                self.step("between two effects")
            if not self.alive:
                return
            self._carry_out(effect)
        if self.alive:
            self._set_timer()

    def _carry_out(self, effect: events.Effect) -> None:
        match effect:
            case events.SendMessage(peer, message):
                if self.world.transcript is not None and not isinstance(message, messages.HeartbeatAck):
                    self.note("-> %s: %s", peer.decode(), shown(message))
                if self.leads and self.core is not None:
                    self.cluster.checks.journal_first(self.kafka.journal.entries, self.core, message)
                if isinstance(message, messages.Complete):
                    self.cluster.checks.complete_sent(message.session, message.epoch)
                elif isinstance(message, messages.LeaderAlive):
                    self._ask_standby(message)
                elif isinstance(message, messages.Barrier):
                    self.cluster.checks.barrier_sent(self.term, message.session, message.epoch)
                self.router.send(peer, messages.encode(message))
            case events.WriteJournal():
                self._writes.append(effect)
                self._write_next()
            case events.PrepareFence() | events.ForgetFence():
                pass  # idle producers have no effect
            case events.FenceSlot(slot):
                self.start(self._fence(slot))
            case events.StopCoordinator(code, reason, _failure):
                self.exit(code, reason)
            case events.LogLine(level, text):
                if level != "debug":
                    self.note("log: %s", text)
            case events.MakeTopic():
                raise AssertionError("the simulated topics stay as they are")
            case events.ReadEndOffsets(stage, number):
                self.start(self._read_end_offsets(stage, number))

    def _read_end_offsets(self, stage: str, number: int) -> Thread:
        """Read the end of what the job has written. It is repeated until it is known."""
        topic = self.cluster.job.inputs[stage][number]
        ends: dict[int, int] = {}
        for partition in range(self.cluster.partitions):
            while partition not in ends:
                try:
                    ends[partition] = yield Call(
                        "end offset",
                        lambda place=(topic, partition): self.kafka.end_offset(place),
                        place=(topic, partition),
                    )
                except KafkaFailure:
                    yield Sleep(1 + self.world.up_to(50))
        self.feed(events.EndOffsetsRead(stage, ends, number))

    # --- handing over -----------------------------------------------------------------------------------

    def resign(self) -> None:
        """SIGTERM, with a standby that asks now and then, and is started when it is invited."""
        self.feed(events.MessageReceived(STANDBY, messages.LeaderCheck("standby")))
        self.feed(events.ResignRequested())
        self._check_leader()

    def _check_leader(self) -> None:
        if self.core is not None and self.core.resignation is not None:
            self.later(200, self._check_leader)
            self.feed(events.MessageReceived(STANDBY, messages.LeaderCheck("standby")))

    def _ask_standby(self, message: messages.LeaderAlive) -> None:
        if message.resigns and not self.world.chance(0.3):
            self.later(self.world.up_to(20), self.cluster.take_over_from, self)

    def _set_timer(self) -> None:
        assert self.core is not None
        deadline_ms = self.core.next_deadline_ms()
        if deadline_ms is not None and (self._timer_ms is None or deadline_ms < self._timer_ms):
            self._timer_ms = deadline_ms
            self.later(max(1, -(-(deadline_ms - self.world.now_ms) // 1)), self._tick, deadline_ms)

    def _tick(self, deadline_ms: float) -> None:
        if self._timer_ms == deadline_ms:
            self._timer_ms = None
            self.feed(events.Tick())

    def _write_next(self) -> None:
        if self._writes and not self._writing:
            self._writing = True
            self.start(self._write(list(self._writes)))
            self._writes.clear()

    def _write(self, writes: list[events.WriteJournal]) -> Thread:
        entries: dict[str, Any] = {}
        for write in writes:
            entries.update(write.entries)
        self.step("before a journal write")
        try:
            yield Call(
                "journal: write",
                lambda: self.kafka.journal.write(self._writer, entries),
                place=JOURNAL,
            )
        except KafkaFailure as failure:
            if "journal writer" in str(failure):
                if self.core is not None and self.core.resignation is not None:
                    yield Sleep(
                        self.world.up_to(300)
                    )  # until the journal names the successor; nothing is written
                self.feed(events.Deposed(str(failure)))
            else:
                self.exit(ExitCode.TEMPORARY, f"a journal write: {failure}")
            return
        self.step("after a journal write")
        self._writing = False
        self.feed(events.JournalWritten(writes[-1].sequence))
        if self.alive:
            self._write_next()

    def _fence(self, slot: int) -> Thread:
        self.step("before a fence")
        try:
            yield from self.fence_ids(slot)
        except KafkaFailure as failure:
            self.feed(events.SlotFenceFailed(slot, str(failure)))
            return
        self.step("after a fence")
        self.feed(events.SlotFenced(slot))

    def fence_ids(self, slot: int) -> Thread:
        """Fence both ids of the slot."""
        for transactional_id in transactional_ids(self.cluster.topology.job, slot):
            yield Call(
                "fence",
                lambda name=transactional_id: self.kafka.init_producer(name),
                place=transactional_id,
            )
