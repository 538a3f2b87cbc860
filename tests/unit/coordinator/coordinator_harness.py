"""Drives the coordinator's core in tests: models workers, journal and fences, and checks what the core does.

`Harness` feeds events and carries out effects on a model, at once or when told. `ProtocolChecker` doesn't
look inside the core. It sees events and effects only, and fails if they break a rule of the protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.coordinator.core import events
from fcluster.coordinator.core.coordinator import Coordinator
from fcluster.coordinator.core.losses import document_of_deaths, document_of_overdue
from fcluster.coordinator.core.model import Terms
from fcluster.coordinator.core.outbox import LOSS_PREFIXES, deaths_key, overdue_key
from fcluster.coordinator.core.run_end import RunEnd
from fcluster.graph.operators import Broadcast, Process, TopicSpec
from fcluster.graph.stages import Chain, Input, Stage
from fcluster.graph.topology import Topology
from fcluster.wire import messages
from fcluster.wire.messages import ShardStatus, WorkerStats

VERSION = "1.2.3"
STORE = "store-1"


def topic(name: str) -> TopicSpec:
    return TopicSpec(name, "text", "json", "read-committed")


def handler(ctx: object, value: object) -> None: ...


def one_stage() -> Topology:
    chain = Chain("a", (Process("a", handler, "stop"),), None, topic("out"))
    return Topology("job", (Stage("in", (Input(topic("in")),), (chain,), ("a",), "job-in-changelog"),))


def one_stage_with_a_global_table() -> Topology:
    """Like `one_stage`, and it writes the rows of a global table."""
    topology = one_stage()
    (stage,) = topology.stages
    broadcast = Broadcast("rates", (("in", topic("job-rates-in-in-repartition")),))
    rows = Chain("rates", (broadcast,), None, None)
    return Topology("job", (replace(stage, chains=(*stage.chains, rows)),))


def two_stages() -> Topology:
    first = Chain("a", (Process("a", handler, "stop"),), "field", topic("job-b-repartition"))
    second = Chain("b", (Process("b", handler, "stop"),), None, topic("out"))
    return Topology(
        "job",
        (
            Stage("in", (Input(topic("in")),), (first,), ("a",), "job-in-changelog"),
            Stage("b", (Input(topic("job-b-repartition"), True, "b"),), (second,), ("b",), "job-b-changelog"),
        ),
    )


def merged_stages() -> Topology:
    """`in` feeds one of the two inputs of `more`."""
    first = Chain("a", (Process("a", handler, "stop"),), "field", topic("job-more-b-repartition"))
    process = Process("b", handler, "stop")
    inputs = (Input(topic("more"), name="more"), Input(topic("job-more-b-repartition"), True, "b"))
    chains = (
        Chain("b", (process,), None, topic("out")),
        Chain("b-2", (process,), None, topic("out"), input=1),
    )
    return Topology(
        "job",
        (
            Stage("in", (Input(topic("in")),), (first,), ("a",), "job-in-changelog"),
            Stage("more", inputs, chains, ("b",), "job-more-changelog"),
        ),
    )


class ProtocolChecker:
    """The rules that the core must keep, whatever events it gets."""

    def __init__(self) -> None:
        self.journal: dict[str, Any] = {}
        self.holders: dict[ShardId, set[int]] = {}
        self.slot_of: dict[int, int] = {}
        self.over: set[int] = set()
        self.unfenced: dict[int, set[int]] = {}
        """By slot: sessions that may have an open transaction."""
        self.being_fenced: dict[int, set[int]] = {}
        self.highest_barrier = 0
        self.barrier_of_former_leaders = 0
        self.barrier_of: dict[int, int] = {}
        """By session: its last barrier's epoch, unless that is known to have ended."""
        self.prepared: dict[int, set[int]] = {}
        self.draining = False
        self.linked: set[bytes] = set()

    def see_event(self, event: events.Event) -> None:
        match event:
            case events.MessageReceived(_, messages.Released() as released):
                for shard in released.shards:
                    self.holders.setdefault(shard, set()).discard(released.session)
            case events.MessageReceived(_, messages.Goodbye(session=session)):
                self.release_all(session)
                self.over.add(session)
                self.unfenced.get(self.slot_of.get(session, -1), set()).discard(session)
            case events.MessageReceived(_, messages.Prepared() as prepared):
                self.prepared.setdefault(prepared.session, set()).add(prepared.epoch)
            case events.MessageReceived(_, messages.Committed() as committed):
                # A worker with an epoch in flight ignores a later barrier.
                if self.barrier_of.get(committed.session, -1) >= committed.epoch:
                    del self.barrier_of[committed.session]
            case events.MessageReceived(_, messages.Drained(session=session)) if self.draining:
                self.release_all(session)  # it processes nothing more, even if its message is lost
                self.unfenced.get(self.slot_of.get(session, -1), set()).discard(session)
            case events.PeerDisconnected(peer):
                self.linked.discard(peer)
            case events.MessageReceived(peer, messages.Hello() as hello) if hello.session:
                if peer not in self.linked:
                    self.see_return(hello)
                self.linked.add(peer)
            case events.SlotFenced(slot):
                for session in self.being_fenced.pop(slot, set()):
                    self.release_all(session)
                    self.unfenced[slot].discard(session)
            case events.SlotFenceFailed(slot):
                self.being_fenced.pop(slot, None)
            case _:
                pass

    def see_return(self, hello: messages.Hello) -> None:
        """After a lost connection, the worker's Hello says which shards it owns and what it has prepared."""
        self.prepared.setdefault(hello.session, set()).add(hello.prepared_epoch)
        self.barrier_of.pop(hello.session, None)  # the core may have concluded that the barrier was lost
        for shard, holders in self.holders.items():
            if shard not in hello.owned:
                holders.discard(hello.session)

    def release_all(self, session: int) -> None:
        for holders in self.holders.values():
            holders.discard(session)

    def see_effect(self, effect: events.Effect) -> None:
        match effect:
            case events.SendMessage(peer, message):
                self.see_message(message)
                if isinstance(message, messages.Welcome):
                    self.linked.add(peer)
            case events.FenceSlot(slot):
                record = self.journal.get(f"slot/{slot}", {"session": 0})
                assert record["session"] == 0, (
                    f"slot {slot} is fenced before the end of its session is journalled"
                )
                sessions = {session for session, its in self.slot_of.items() if its == slot}
                self.over |= sessions
                assert slot not in self.being_fenced, f"slot {slot} is fenced twice at once"
                self.being_fenced[slot] = sessions
                self.unfenced.setdefault(slot, set())
            case _:
                pass

    def see_message(self, message: messages.FromCoordinator) -> None:
        match message:
            case messages.Welcome():
                self.see_welcome(message)
            case messages.Assign():
                self.check_alive(message.session)
                assert message.job_start == self.journal.get("start", {"number": 0})["number"], (
                    "told of another start than the journal has"
                )
                for shard in message.shards:
                    record = self.journal.get(f"assignment/{shard.stage}/{shard.partition}")
                    assert record == {"slot": self.slot_of[message.session]}, (
                        "assigned before it was journalled"
                    )
                    others = self.holders.setdefault(shard, set()) - {message.session}
                    assert not others, f"{shard} goes to {message.session}, but may be run by {others}"
                    self.holders[shard].add(message.session)
            case messages.Revoke():
                self.check_alive(message.session)
            case messages.Standby():
                self.check_alive(message.session)
                own = [shard for shard in message.shards if message.session in self.holders.get(shard, ())]
                assert not own, f"{message.session} gets an order to keep copies of its own shards {own}"
            case messages.Barrier():
                self.check_alive(message.session)
                assert message.epoch >= self.highest_barrier, "the epoch's number was used before"
                assert message.epoch > self.barrier_of_former_leaders, "the epoch belongs to a former leader"
                assert message.epoch < self.journal["epoch"]["reserved_until"], "the epoch isn't reserved"
                assert message.session not in self.barrier_of, (
                    "a barrier, although the session's last epoch isn't committed"
                )
                self.barrier_of[message.session] = message.epoch
                self.highest_barrier = message.epoch
            case messages.Complete():
                self.check_alive(message.session)
                assert message.epoch in self.prepared.get(message.session, ()), (
                    "complete, although it was never prepared"
                )
            case messages.Evicted(session=session):
                self.over.add(session)
            case messages.Drain() | messages.Shutdown():
                assert "ending" in self.journal, "the end of the job is sent before it is journalled"
            case _:
                pass

    def see_welcome(self, message: messages.Welcome) -> None:
        self.check_alive(message.session)
        record = self.journal[f"slot/{message.slot}"]
        assert record["session"] == message.session, "welcome before the session was journalled"
        if message.adopted:
            assert self.slot_of[message.session] == message.slot
            return
        assert message.session not in self.slot_of, "a session opened twice"
        strays = self.unfenced.get(message.slot, set())
        assert not strays, f"slot {message.slot} was not fenced after its sessions {strays}"
        self.slot_of[message.session] = message.slot
        self.unfenced[message.slot] = {message.session}

    def check_alive(self, session: int) -> None:
        assert session not in self.over, f"session {session} gets a message, although it is over"

    def new_leader(self, journal: Mapping[str, Any]) -> None:
        """Another coordinator takes over. Fences that the former one ordered may or may not happen."""
        self.being_fenced.clear()
        self.barrier_of.clear()
        self.linked.clear()
        self.draining = False
        self.barrier_of_former_leaders = self.highest_barrier
        self.journal = dict(journal)
        for session in self.slot_of:
            # If a former leader ended a session and nobody was told, the new leader may continue it.
            if journal.get(f"slot/{self.slot_of[session]}", {}).get("session") == session:
                self.over.discard(session)


def take_in(journal: dict[str, Any], write: events.WriteJournal) -> None:
    """Apply a write to the journal's content. None removes an entry, as in a compacted topic."""
    for key, value in write.entries.items():
        if value is None:
            journal.pop(key, None)
        else:
            journal[key] = value


class ThoroughCoordinator(Coordinator):
    """Looks for all due work after each event, even after messages that make none of it possible."""

    def _is_calm(self) -> bool:
        return False


@dataclass
class Harness:
    """A coordinator with a model of everything around it.

    Beside it, a `ThoroughCoordinator` gets the same events, and has to decide the same.

    With `auto_journal` and `auto_fence`, those effects are carried out at once. Otherwise they wait for
    `write_journal` and `fence`.
    """

    topology: Topology = field(default_factory=one_stage)
    partitions: Mapping[str, int] = field(default_factory=lambda: {"in": 4})
    workers: int = 2
    settings: Settings = field(default_factory=Settings)
    until_caught_up: bool = False
    run_end: RunEnd | None = None
    highest_committed_epoch: int = 0
    auto_journal: bool = True
    auto_fence: bool = True
    now_ms: float = 1_000.0
    term: int = 0
    journal: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    topic_ids: Mapping[str, str] = field(default_factory=dict)
    sent: list[tuple[bytes, messages.FromCoordinator]] = field(default_factory=list)
    unwritten: list[events.WriteJournal] = field(default_factory=list)
    unfenced: list[int] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    stopped: events.StopCoordinator | None = None
    checker: ProtocolChecker = field(default_factory=ProtocolChecker)

    def __post_init__(self) -> None:
        self.lead()

    def lead(self) -> None:
        """Start a new coordinator that recovers from the journal."""
        self.term += 1
        self.unwritten.clear()
        self.unfenced.clear()
        self.unread.clear()
        self.stopped = None
        terms = Terms(
            term=self.term,
            topology=self.topology,
            partitions=self.partitions,
            settings=self.settings,
            expected_workers=self.workers,
            version=VERSION,
            until_caught_up=self.until_caught_up,
            run_end=self.run_end,
            highest_committed_epoch=self.highest_committed_epoch,
            topic_ids=self.topic_ids,
        )
        self.checker.new_leader(self.journal)
        self.core = Coordinator.recover(self.journal, terms, self.now_ms)
        self.thorough = ThoroughCoordinator.recover(self.journal, terms, self.now_ms)
        self.feed(events.Started())

    def feed(self, event: events.Event) -> None:
        """Pass an event to the core. Its effects are recorded, and carried out if that is automatic."""
        self.checker.see_event(event)
        self.checker.draining = self.core.phase.value == "draining"
        effects = self.core.handle(event, self.now_ms)
        assert self.thorough.handle(event, self.now_ms) == effects, "due work was overlooked"
        self.checker.draining = self.core.phase.value == "draining"
        self.core.invariants()
        deadline = self.core.next_deadline_ms()
        assert deadline is None or deadline > self.now_ms, "the shell would loop without end"
        for effect in effects:
            self.checker.see_effect(effect)
            self.take(effect)
        while self.auto_journal and self.unwritten:
            self.write_journal()
        while self.auto_fence and self.unfenced:
            self.fence()
        if not self.unwritten:
            self.check_counts()

    def check_counts(self) -> None:
        """A leader that took over now would know the same about records that end or hang workers."""
        cluster = self.core._cluster
        counted = {deaths_key(held): document_of_deaths(deaths) for held, deaths in cluster.deaths.items()}
        counted |= {overdue_key(held): document_of_overdue(hung) for held, hung in cluster.overdue.items()}
        assert counted == {key: value for key, value in self.journal.items() if key.startswith(LOSS_PREFIXES)}

    def take(self, effect: events.Effect) -> None:
        match effect:
            case events.SendMessage(peer, message):
                self.sent.append((peer, message))
                self.lines.append(f"{peer.decode()} <- {describe(message)}")
            case events.WriteJournal():
                self.unwritten.append(effect)
                keys = [key for key in effect.entries if key != "epoch" and not key.startswith(LOSS_PREFIXES)]
                if keys:
                    self.lines.append(f"journal {' '.join(keys)}")
            case events.FenceSlot(slot):
                self.unfenced.append(slot)
                self.lines.append(f"fence slot {slot}")
            case events.ReadEndOffsets(stage, number):
                self.unread.append(stage)
                self.lines.append(f"read end of {stage}" + (f" (input {number})" if number else ""))
            case events.StopCoordinator(exit_code, reason, _failure):
                self.stopped = effect
                self.lines.append(f"stop {exit_code}: {reason}")
            case events.MakeTopic(topic, partitions):
                self.lines.append(f"make topic {topic} with {partitions} partitions")
            case events.LogLine(level, text):
                self.log.append(f"{level}: {text}")
            case events.PrepareFence() | events.ForgetFence():
                pass

    def transcript(self) -> list[str]:
        """What happened since the last call, one line each."""
        lines, self.lines = self.lines, []
        return lines

    def write_journal(self) -> None:
        write = self.unwritten.pop(0)
        for target in (self.journal, self.checker.journal):
            take_in(target, write)
        self.feed(events.JournalWritten(write.sequence))

    def fence(self) -> None:
        self.feed(events.SlotFenced(self.unfenced.pop(0)))

    def fail_fence(self) -> None:
        self.feed(events.SlotFenceFailed(self.unfenced.pop(0), "brokers are down"))

    def pass_ms(self, duration_ms: float) -> None:
        """Let time pass. The core is called whenever it asked to be."""
        end_ms = self.now_ms + duration_ms
        while True:
            deadline = self.core.next_deadline_ms()
            if deadline is None or deadline > end_ms:
                break
            self.now_ms = deadline
            self.feed(events.Tick())
        self.now_ms = end_ms
        self.feed(events.Tick())

    def messages_to(self, peer: bytes, kind: type[Any]) -> list[Any]:
        return [message for to, message in self.sent if to == peer and isinstance(message, kind)]

    def say(self, peer: bytes, message: messages.ToCoordinator) -> None:
        self.feed(events.MessageReceived(peer, message))


def as_in_kafka(journal: Mapping[str, Any]) -> dict[str, Any]:
    """A journal as it is read back after it was written."""
    return msgspec.json.decode(msgspec.json.encode(journal))


class FakeWorker:
    """A worker that sends what the test tells it to, and remembers its session."""

    def __init__(self, harness: Harness, name: str, slot: int = -1, host: str = "host-1") -> None:
        self.harness = harness
        self.name = name
        self.peer = name.encode()
        self.host = host
        self.slot = slot
        self.session = 0

    def hello(self, **changes: Any) -> None:
        """A new Hello, or with `session=` the Hello of a worker whose connection is back."""
        fields: dict[str, Any] = {
            "worker": self.name,
            "host": self.host,
            "pid": 1,
            "slot": self.slot,
            "session": 0,
            "owned": [],
            "epoch": 0,
            "prepared_epoch": 0,
            "dirty": False,
            "topology": self.harness.topology.fingerprint,
            "snapshot_store": STORE,
            "version": VERSION,
        }
        self.harness.say(self.peer, messages.Hello(**(fields | changes)))
        self.learn()

    def learn(self) -> None:
        for welcome in self.harness.messages_to(self.peer, messages.Welcome):
            self.session, self.slot = welcome.session, welcome.slot

    def disconnect(self) -> None:
        self.harness.feed(events.PeerDisconnected(self.peer))

    def process_ends(self) -> None:
        self.harness.feed(events.ProcessEnded(self.name))

    @property
    def assigned(self) -> list[ShardId]:
        """The shards that it was told to run in its present session, without those that it was told to
        release."""
        owned: list[ShardId] = []
        for peer, message in self.harness.sent:
            if peer == self.peer and isinstance(message, messages.Assign) and message.session == self.session:
                owned += message.shards
            if peer == self.peer and isinstance(message, messages.Revoke) and message.session == self.session:
                owned = [shard for shard in owned if shard not in message.shards]
        return sorted(set(owned))

    def running(self, shards: Iterable[ShardId] | None = None) -> None:
        statuses = [status(shard) for shard in (self.assigned if shards is None else shards)]
        self.harness.say(self.peer, messages.ShardsRunning(self.session, statuses))

    def heartbeat(self, *statuses: ShardStatus, records_in: int = 0) -> None:
        stats = WorkerStats(records_in=records_in, shards=list(statuses))
        self.harness.say(self.peer, messages.Heartbeat(self.session, stats, self.orders_heard))

    def warm(self, *shards: ShardId, lag: int = 0, epoch: int = 1) -> None:
        """A heartbeat that reports the progress of its copies of these shards."""
        standbys = [messages.StandbyStatus(shard, epoch, lag) for shard in shards]
        stats = WorkerStats(standbys=standbys)
        self.harness.say(self.peer, messages.Heartbeat(self.session, stats, self.orders_heard))

    @property
    def orders_heard(self) -> int:
        """The number of the last order to its session, as if no order was lost."""
        orders = [
            message.number
            for kind in (messages.Assign, messages.Revoke)
            for message in self.harness.messages_to(self.peer, kind)
            if message.session == self.session
        ]
        return max(orders, default=0)

    @property
    def standbys(self) -> list[ShardId]:
        """The shards of its last order to keep copies."""
        told = [m for m in self.harness.messages_to(self.peer, messages.Standby) if m.session == self.session]
        return told[-1].shards if told else []

    def dirty(self, backlog: bool = False) -> None:
        self.harness.say(self.peer, messages.Dirty(self.session, backlog))

    def prepared(self, epoch: int, backlog: bool = False) -> None:
        self.harness.say(self.peer, messages.Prepared(self.session, epoch, 10, 1.0, backlog))

    def committed(self, epoch: int, dirty: bool = False, *statuses: ShardStatus) -> None:
        self.harness.say(self.peer, messages.Committed(self.session, epoch, 1.0, dirty, list(statuses)))

    releases: int = 0

    def released(self, *shards: ShardId) -> None:
        self.releases += 1
        self.harness.say(self.peer, messages.Released(self.session, list(shards), self.releases))

    def drained(self) -> None:
        self.harness.say(self.peer, messages.Drained(self.session))

    def goodbye(self) -> None:
        self.harness.say(self.peer, messages.Goodbye(self.session))

    def failed(self, reason: str) -> None:
        self.harness.say(self.peer, messages.WorkerFailed(self.session, Failure.of_record(reason)))

    @property
    def barrier(self) -> int:
        """The epoch of its last barrier. 0 if it got none in this session."""
        barriers = self.harness.messages_to(self.peer, messages.Barrier)
        return max((barrier.epoch for barrier in barriers if barrier.session == self.session), default=0)


def join_all(harness: Harness) -> list[FakeWorker]:
    """As many workers as the cluster expects. All of them join, then they run their shards."""
    joined = [FakeWorker(harness, f"w{number}", slot=number) for number in range(harness.workers)]
    for worker in joined:
        worker.hello()
    for worker in joined:
        worker.running()
    return joined


def status(
    shard: ShardId,
    position: int = 0,
    committed: int = 0,
    end: int = -1,
    dirty: bool = False,
    number: int = 0,
) -> ShardStatus:
    return ShardStatus(shard, position, committed, end, dirty, 0, number)


def shard(partition: int, stage: str = "in") -> ShardId:
    return ShardId(stage, partition)


def describe(message: messages.FromCoordinator) -> str:
    """A message as a short text, without numbers that don't matter to tests."""
    match message:
        case messages.Welcome():
            return f"Welcome slot {message.slot}" + (" adopted" if message.adopted else "")
        case messages.Assign() | messages.Revoke() | messages.Standby():
            return f"{type(message).__name__} {' '.join(map(str, message.shards))}".rstrip()
        case messages.Barrier() | messages.Complete():
            return f"{type(message).__name__} {message.epoch}"
        case messages.Shutdown():
            return f"Shutdown{' failed' if message.failure else ''}: {message.reason}"
        case messages.Refused():
            return f"Refused: {message.reason}"
        case _:
            return type(message).__name__
