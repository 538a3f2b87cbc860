"""Random histories of a cluster: the core keeps its rules, whatever happens in whatever order.

The workers are small models that follow the protocol. Messages in flight are lost when a connection drops.
Kafka's part is modelled by numbers: the producer generation of each slot, which a fence increases, and the
committed offset of each shard. A commit by a worker that isn't fenced must continue exactly where the shard's
last commit ended, so two owners at a time, or an owner that starts too early, would be noticed at once.

The `ProtocolChecker` in the harness fails if the core breaks a rule.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.coordinator.core import events
from fcluster.coordinator.core.model import Phase
from fcluster.wire import messages
from tests.unit.coordinator.coordinator_harness import (
    STORE,
    VERSION,
    Harness,
    one_stage,
    one_stage_with_a_global_table,
    status,
    take_in,
)

Span = tuple[int, int]


class Kafka:
    """What the outcome of a commit depends on."""

    def __init__(self) -> None:
        self.generation: dict[int, int] = {}
        self.committed: dict[ShardId, int] = {}

    def fence(self, slot: int) -> int:
        """From now on, nobody who initialised before can commit. Initialising does the same."""
        self.generation[slot] = self.generation.get(slot, 0) + 1
        return self.generation[slot]


class ModelWorker:
    """A worker's process: its protocol state, and the messages in flight between it and the coordinator."""

    def __init__(
        self, name: str, wanted_slot: int, kafka: Kafka, host: str, luck: random.Random, topology: str
    ) -> None:
        self.name = name
        self.topology = topology
        self.host = host
        self.luck = luck
        self.peer = name.encode()
        self.kafka = kafka
        self.slot = wanted_slot
        self.to_worker: deque[messages.FromCoordinator] = deque()
        self.to_coordinator: deque[messages.ToCoordinator] = deque()
        self.connected = False
        self.ended = False
        self.epoch_seen = 0
        self.hello_ms = 0.0
        self.draining = False
        self.leaving = False
        self.gone = False
        """It has ended, but its last messages are still in flight."""
        self.forget()

    def forget(self) -> None:
        """The state of a worker without a session."""
        self.session = 0
        self.orders_heard = 0
        self.generation = 0
        self.position: dict[ShardId, int] = {}
        self.standbys: set[ShardId] = set()
        self.releasing: set[ShardId] = set()
        self.open: dict[ShardId, Span] = {}
        self.reported = False
        self.in_flight: dict[ShardId, Span] = {}
        self.in_flight_epoch = 0
        self.prepared = False
        self.committing = False

    def say(self, message: messages.ToCoordinator) -> None:
        self.to_coordinator.append(message)

    def hello(self) -> None:
        self.say(
            messages.Hello(
                worker=self.name,
                host=self.host,
                pid=1,
                slot=self.slot,
                session=self.session,
                owned=sorted(self.position),
                epoch=self.epoch_seen,
                prepared_epoch=self.in_flight_epoch if self.prepared and not self.committing else 0,
                dirty=bool(self.open),
                topology=self.topology,
                snapshot_store=STORE,
                version=VERSION,
                in_flight_epoch=self.in_flight_epoch,
                leaving=self.leaving,
            )
        )

    def connect(self) -> None:
        self.connected = True
        self.hello()

    def disconnect(self, outgoing_lost: bool) -> None:
        self.connected = False
        self.to_worker.clear()
        if outgoing_lost:
            self.to_coordinator.clear()

    def reset(self) -> None:
        self.forget()
        self.gone = self.leaving
        if self.connected and not self.gone:
            self.hello()

    # --- leaving ----------------------------------------------------------------------------------

    def leave(self) -> None:
        """Ask to leave: its shards move away first."""
        self.leaving = True
        self.gone = not self.session
        if self.session:
            self.say(messages.Leaving(self.session))
            self.leave_if_empty()

    def leave_at_once(self) -> None:
        """Commit what is processed, then leave."""
        self.leaving = self.draining = True
        self.finish_drain()

    def leave_if_empty(self) -> None:
        if self.leaving and not self.draining and not self.position and not self.in_flight_epoch:
            self.say(messages.Goodbye(self.session))
            self.gone = True

    # --- its own life -----------------------------------------------------------------------------

    def process(self) -> None:
        """Process one record of each shard."""
        if self.draining:
            return
        for shard, position in self.position.items():
            if shard not in self.releasing:
                start, _ = self.open.get(shard, (position, position))
                self.position[shard] = position + 1
                self.open[shard] = (start, position + 1)
        self.report_dirty()

    def report_dirty(self) -> None:
        if self.open and not self.reported:
            self.reported = True
            self.say(messages.Dirty(self.session, False))

    def prepare(self) -> None:
        if self.in_flight_epoch and not self.prepared:
            self.prepared = True
            self.say(messages.Prepared(self.session, self.in_flight_epoch, 1, 1.0, False))

    def commit(self) -> None:
        if not self.committing:
            return
        if self.kafka.generation[self.slot] != self.generation:
            self.reset()  # fenced
            return
        for shard, (start, end) in self.in_flight.items():
            committed = self.kafka.committed.get(shard, 0)
            assert committed == start, (
                f"{self.name} commits {shard} from {start}, but {committed} is committed"
            )
            self.kafka.committed[shard] = end
        epoch, self.in_flight_epoch, self.in_flight = self.in_flight_epoch, 0, {}
        self.prepared = self.committing = False
        statuses = [status(shard, end, end) for shard, end in self.position.items()]
        self.say(messages.Committed(self.session, epoch, 1.0, bool(self.open), statuses))
        self.release()
        self.finish_drain()

    def heartbeat(self, now_ms: float) -> None:
        """Send a heartbeat, or ask for a session again."""
        if self.session and self.leaving and self.luck.random() < 0.2:
            self.say(messages.Leaving(self.session))
        if self.session:
            standbys = [
                messages.StandbyStatus(shard, 1, self.luck.choice([-1, 0, 0, 10_000]))
                for shard in sorted(self.standbys)
            ]
            shards = [status(shard, end, end) for shard, end in self.position.items()]
            stats = messages.WorkerStats(standbys=standbys, shards=shards)
            self.say(messages.Heartbeat(self.session, stats, self.orders_heard))
        elif self.connected and now_ms - self.hello_ms >= 1000:
            self.hello_ms = now_ms
            self.hello()

    def release(self) -> None:
        free = [name for name in self.releasing if name not in self.open and name not in self.in_flight]
        for shard in free:
            self.releasing.discard(shard)
            del self.position[shard]
        if free:
            self.say_released(free)
        self.leave_if_empty()

    releases: int = 0

    def say_released(self, shards: list[ShardId]) -> None:
        self.releases += 1
        self.say(messages.Released(self.session, shards, self.releases))

    def finish_drain(self) -> None:
        if self.draining and not self.open and not self.in_flight_epoch and self.session:
            self.say(messages.Drained(self.session))
            if self.leaving:
                self.say(messages.Goodbye(self.session))
                self.gone = True

    # --- what it is told ------------------------------------------------------------------------------

    def receive(self, message: messages.FromCoordinator) -> None:
        session = getattr(message, "session", 0)
        if self.gone:
            return
        match message:
            case messages.Welcome() if message.adopted:
                if session == self.session:
                    self.reported = False
                    self.report_dirty()
            case messages.Welcome() if self.session == 0:
                self.session, self.slot = session, message.slot
                self.epoch_seen = max(self.epoch_seen, message.epoch)
                self.generation = self.kafka.fence(message.slot)
            case messages.Shutdown() if session in (0, self.session):
                self.ended = True
            case messages.Evicted() if session == self.session:
                self.reset()
            case _ if session == self.session:
                self.receive_in_session(message)
            case _:
                pass

    def receive_in_session(self, message: messages.FromCoordinator) -> None:
        match message:
            case messages.Assign(shards=shards, number=number):
                self.orders_heard = number
                for shard in shards:
                    self.position.setdefault(shard, self.kafka.committed.get(shard, 0))
                    self.standbys.discard(shard)
            case messages.Standby(shards=shards):
                assert not set(shards) & set(self.position), "a copy of a shard that it owns"
                self.standbys = set(shards)
            case messages.Revoke(shards=shards, number=number):
                self.orders_heard = number
                foreign = [shard for shard in shards if shard not in self.position]
                self.releasing |= set(shards) - set(foreign)
                if foreign:
                    self.say_released(foreign)
                self.release()
            case messages.Leave() if not self.leaving and not self.draining:
                self.leave()
            case messages.Dismiss():
                self.leave_at_once()
            case messages.Barrier(epoch=epoch) if epoch > self.epoch_seen and not self.in_flight_epoch:
                self.epoch_seen = epoch
                if self.open:
                    self.in_flight_epoch, self.in_flight = epoch, self.open
                    self.open, self.reported = {}, False
                else:
                    self.say(messages.Prepared(self.session, epoch, 0, 0.0, False))
            case messages.Complete(epoch=epoch):
                if epoch == self.in_flight_epoch and self.prepared:
                    self.committing = True
                elif not self.in_flight_epoch and epoch == self.epoch_seen:
                    self.say(messages.Committed(self.session, epoch, 0.0, bool(self.open), []))
            case messages.Drain():
                self.draining = True
                self.finish_drain()
            case _:
                pass


class World:
    """A cluster, and a source of faults."""

    def __init__(self, seed: int, kafka: Kafka | None = None) -> None:
        self.random = random.Random(seed)
        self.kafka = kafka or Kafka()
        self.topology = one_stage_with_a_global_table() if seed % 2 else one_stage()
        self.harness = Harness(
            self.topology,
            partitions={"in": 6},
            workers=3,
            settings=Settings(
                initial_rebalance_delay_ms=300,
                session_timeout_ms=1000,
                checkpoint_timeout_ms=2000,
                num_standby_replicas=seed % 3,
            ),
            auto_journal=False,
            auto_fence=False,
        )
        self.names = itertools.count()
        self.workers = [self.new_worker(slot) for slot in (0, 1, -1)]

    def new_worker(self, slot: int) -> ModelWorker:
        number = next(self.names)
        host, job = f"host-{number % 2}", self.topology.fingerprint
        worker = ModelWorker(f"w{number}", slot, self.kafka, host, self.random, job)
        worker.connect()
        return worker

    # --- steps ----------------------------------------------------------------------------------------

    def step(self) -> None:
        happenings: list[tuple[float, Callable[[], None]]] = [
            (60, self.deliver_to_coordinator),
            (60, self.deliver_to_worker),
            (60, self.work),
            (30, self.write_journal),
            (10, self.fence),
            (1, self.fail_fence),
            (20, self.pass_time),
            (1.5, self.drop_connection),
            (1, self.drop_connection_of_committer),
            (4, self.connect),
            (0.7, self.reset_worker),
            (0.7, self.kill_worker),
            (0.4, self.change_leader),
            (0.5, self.join_more),
            (0.6, self.ask_to_leave),
            (0.3, self.drain_worker),
            (0.3, self.hurry_leaver),
        ]
        weights = [weight for weight, _ in happenings]
        happening = self.random.choices([action for _, action in happenings], weights)[0]
        happening()
        self.collect()

    def collect(self) -> None:
        """Put the core's new messages in flight."""
        for peer, message in self.harness.sent:
            for worker in self.workers:
                if worker.peer == peer and worker.connected and not worker.ended:
                    worker.to_worker.append(message)
        self.harness.sent.clear()
        for worker in self.workers:
            if worker.gone and not worker.ended and not (worker.connected and worker.to_coordinator):
                worker.ended = True
                if worker.connected:
                    self.harness.feed(events.PeerDisconnected(worker.peer))

    def pick(self, condition: Callable[[ModelWorker], Any]) -> ModelWorker | None:
        candidates = [w for w in self.workers if not w.ended and condition(w)]
        return self.random.choice(candidates) if candidates else None

    def deliver_to_coordinator(self) -> None:
        worker = self.pick(lambda worker: worker.connected and worker.to_coordinator)
        if worker is not None:
            self.harness.say(worker.peer, worker.to_coordinator.popleft())

    def deliver_to_worker(self) -> None:
        worker = self.pick(lambda worker: worker.to_worker)
        if worker is not None:
            worker.receive(worker.to_worker.popleft())

    def work(self) -> None:
        worker = self.pick(lambda worker: not worker.gone)
        if worker is not None:
            self.random.choice([worker.process, worker.prepare, worker.commit, self.beat])()

    def beat(self) -> None:
        for worker in self.workers:
            if not worker.ended and not worker.gone:
                worker.heartbeat(self.harness.now_ms)

    def write_journal(self) -> None:
        if self.harness.unwritten:
            self.harness.write_journal()

    def fence(self) -> None:
        if self.harness.unfenced:
            self.kafka.fence(self.harness.unfenced[0])
            self.harness.fence()

    def fail_fence(self) -> None:
        if self.harness.unfenced:
            if self.random.random() < 0.5:
                self.kafka.fence(self.harness.unfenced[0])  # carried out, but the answer is lost
            self.harness.fail_fence()

    def pass_time(self) -> None:
        self.harness.pass_ms(self.random.choice([1, 1, 2, 5, 5, 10, 10, 20, 50, 160, 300]))

    def drop_connection(self) -> None:
        worker = self.pick(lambda worker: worker.connected)
        if worker is not None:
            worker.disconnect(self.random.random() < 0.5)
            self.harness.feed(events.PeerDisconnected(worker.peer))

    def drop_connection_of_committer(self) -> None:
        """Disconnect a worker that may still commit before it learns that its session is over."""
        worker = self.pick(lambda worker: worker.connected and worker.committing)
        if worker is not None:
            worker.disconnect(outgoing_lost=True)
            self.harness.feed(events.PeerDisconnected(worker.peer))

    def connect(self) -> None:
        worker = self.pick(lambda worker: not worker.connected and not worker.gone)
        if worker is not None:
            worker.connect()

    def reset_worker(self) -> None:
        worker = self.pick(lambda worker: worker.session and worker.connected and not worker.gone)
        if worker is not None:
            worker.reset()

    def ask_to_leave(self) -> None:
        worker = self.pick(lambda worker: not worker.leaving and not worker.draining)
        if worker is not None:
            worker.leave()

    def drain_worker(self) -> None:
        worker = self.pick(lambda worker: worker.session)
        if worker is not None:
            self.harness.say(b"admin", messages.DrainRequest(worker.name))

    def hurry_leaver(self) -> None:
        worker = self.pick(lambda worker: worker.leaving and worker.session and not worker.gone)
        if worker is not None:
            worker.leave_at_once()

    def kill_worker(self) -> None:
        worker = self.pick(lambda worker: True)
        if worker is not None and len(self.workers) < 12:
            worker.ended = True
            seen = self.random.choice(("before its connection closes", "after", "never"))
            if seen == "before its connection closes":
                self.harness.feed(events.ProcessEnded(worker.name))
            if worker.connected:
                self.harness.feed(events.PeerDisconnected(worker.peer))
            if seen == "after":
                self.harness.feed(events.ProcessEnded(worker.name))
            self.workers.append(self.new_worker(worker.slot))

    def change_leader(self) -> None:
        while self.harness.unwritten and self.random.random() < 0.5:
            write = self.harness.unwritten.pop(0)  # written, but the former leader never learns it
            take_in(self.harness.journal, write)
        for worker in self.workers:
            if not worker.ended:
                worker.disconnect(self.random.random() < 0.5)
        self.harness.lead()

    def join_more(self) -> None:
        if sum(not worker.ended for worker in self.workers) < 5 and len(self.workers) < 12:
            self.workers.append(self.new_worker(-1))

    # --- the end --------------------------------------------------------------------------------------

    def heal(self) -> None:
        """No more faults: everything arrives, all workers work, time passes."""
        for _ in range(400):
            # The last worker that stays may learn only now that it was told to leave.
            staying = [worker for worker in self.workers if not worker.ended and not self.is_leaving(worker)]
            if not staying and self.harness.core.phase is Phase.RUNNING:
                self.workers.append(self.new_worker(-1))
            for worker in self.workers:
                if worker.ended:
                    continue
                if not worker.gone:
                    self.let_work(worker)
                while worker.to_worker:
                    worker.receive(worker.to_worker.popleft())
                while worker.to_coordinator:
                    self.harness.say(worker.peer, worker.to_coordinator.popleft())
            while self.harness.unwritten:
                self.write_journal()
            while self.harness.unfenced:
                self.fence()
            self.collect()
            self.harness.pass_ms(50)
            self.collect()
            if self.is_well():
                return
        raise AssertionError(f"the cluster doesn't recover: {self.harness.core.status()}")

    def let_work(self, worker: ModelWorker) -> None:
        if not worker.connected:
            worker.connect()
        worker.prepare()
        worker.commit()
        worker.heartbeat(self.harness.now_ms)

    def is_leaving(self, worker: ModelWorker) -> bool:
        """Whether it knows that it has to leave, or will be told."""
        sessions = self.harness.core.sessions.values()
        return worker.leaving or any(s.leaving for s in sessions if s.worker == worker.name)

    def is_well(self) -> bool:
        """Each worker has a session, each shard has one owner, and everything is committed."""
        alive = [worker for worker in self.workers if not worker.ended]
        owned = [shard for worker in alive for shard in worker.position]
        loads = [len(worker.position) for worker in alive]
        under_way = [message for worker in alive for message in (*worker.to_worker, *worker.to_coordinator)]
        return (
            all(worker.session and not worker.open and not worker.in_flight_epoch for worker in alive)
            and not any(self.is_leaving(worker) for worker in alive)
            and sorted(owned) == sorted(self.harness.core.shards)
            and max(loads) - min(loads) <= 1
            and self.copies_are_in_place(alive)
            and all(isinstance(message, messages.HeartbeatAck) for message in under_way)
        )

    def copies_are_in_place(self, alive: list[ModelWorker]) -> bool:
        """Each shard has as many copies as wanted, or as there are other workers, according to the
        workers."""
        wanted = min(self.harness.settings.num_standby_replicas, len(alive) - 1)
        copies = [shard for worker in alive for shard in worker.standbys]
        return all(copies.count(shard) == wanted for shard in self.harness.core.shards)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), steps=st.integers(50, 1500))
def test_random_history_keeps_all_rules_and_recovers(seed: int, steps: int) -> None:
    world = World(seed)
    for _ in range(steps):
        world.step()
    world.heal()
    for worker in world.workers:
        if not worker.ended:
            worker.process()
    world.heal()


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), steps=st.integers(50, 800))
def test_random_history_can_be_drained(seed: int, steps: int) -> None:
    world = World(seed)
    for _ in range(steps):
        world.step()
    world.harness.feed(events.StopRequested())
    for _ in range(steps):
        world.step()
        if world.harness.core.phase is Phase.STOPPED:
            break
    deadline_ms = world.harness.now_ms + 30_000
    while world.harness.stopped is None:
        assert world.harness.now_ms < deadline_ms
        world.harness.feed(events.StopRequested())  # a new leader doesn't know of the request
        try:
            world.heal()
        except AssertionError:
            if world.harness.stopped is None:
                raise
    assert world.harness.stopped.exit_code == 0


class NoFences(Kafka):
    """A broker on which fencing does nothing."""

    def fence(self, slot: int) -> int:
        return self.generation.setdefault(slot, 1)


def live_many_lives(kafka: Callable[[], Kafka]) -> None:
    for seed in range(300):
        world = World(seed, kafka())
        for _ in range(1500):
            world.step()


def test_missing_fences_are_found() -> None:
    """The test must be able to fail."""
    with pytest.raises(AssertionError, match="is committed"):
        live_many_lives(NoFences)


INTEGERS, SESSIONS = st.integers(-1, 5), st.integers(0, 3)
SHARDS = st.lists(st.builds(ShardId, st.just("in"), st.integers(0, 6)))
NOISE = st.one_of(
    st.builds(messages.Dirty, SESSIONS, st.booleans()),
    st.builds(
        messages.Prepared, st.integers(0, 3), st.integers(-1, 5), st.just(1), st.just(1.0), st.booleans()
    ),
    st.builds(messages.Committed, SESSIONS, INTEGERS, st.just(1.0), st.booleans(), st.just([])),
    st.builds(
        messages.Released, st.integers(0, 3), st.lists(st.builds(ShardId, st.just("in"), st.integers(0, 6)))
    ),
    st.builds(messages.Drained, SESSIONS),
    st.builds(messages.Goodbye, SESSIONS),
    st.builds(messages.Leaving, SESSIONS),
    st.builds(messages.DrainRequest, st.sampled_from(["0", "1", "w0", "host-0:1", "-1", "nobody", ""])),
    st.builds(messages.WorkerFailed, SESSIONS, st.just(Failure.of_text("reason"))),
    st.builds(
        messages.RecordOverdue,
        SESSIONS,
        st.builds(ShardId, st.just("in"), st.integers(0, 6)),
        st.integers(0, 9),
        st.just("reason"),
    ),
    st.builds(
        messages.RecordBegun,
        SESSIONS,
        st.builds(ShardId, st.just("in"), st.integers(0, 6)),
        st.integers(0, 9),
    ),
    st.builds(messages.RecordEnded, SESSIONS),
    st.builds(messages.Heartbeat, SESSIONS, st.just(messages.WorkerStats()), st.integers(0, 5)),
    st.builds(
        messages.Heartbeat,
        SESSIONS,
        st.builds(
            messages.WorkerStats,
            standbys=st.lists(
                st.builds(
                    messages.StandbyStatus,
                    st.builds(ShardId, st.just("in"), st.integers(0, 6)),
                    st.just(1),
                    st.integers(-1, 5),
                )
            ),
        ),
        st.integers(0, 5),
    ),
    st.builds(messages.StatusRequest),
    st.builds(
        messages.AgentReport,
        st.sampled_from(["agent-1", "agent-2"]),
        st.sampled_from(["job", "another"]),
        st.just("host-0"),
        INTEGERS,
        SESSIONS,
        st.lists(INTEGERS, max_size=3),
        SESSIONS,
        SESSIONS,
        st.booleans(),
    ),
    st.builds(messages.ScaleRequest, INTEGERS, st.dictionaries(st.just("host-0"), SESSIONS)),
)


@given(st.lists(st.tuples(st.integers(0, 3), NOISE), max_size=30))
def test_senseless_messages_break_nothing(noise: list[tuple[int, messages.ToCoordinator]]) -> None:
    world = World(1)
    for _ in range(100):
        world.deliver_to_coordinator()
        world.write_journal()
        world.collect()
        world.deliver_to_worker()
    sessions = [worker.session for worker in world.workers]
    assert all(sessions)
    for speaker, message in noise:
        if world.harness.core.phase is not Phase.RUNNING:
            break
        number = getattr(message, "session", None)
        if number is not None:
            sessions_and_one_more = [*sessions, 4711]
            message = type(message)(**{**_fields(message), "session": sessions_and_one_more[number]})
        peer = [*(worker.peer for worker in world.workers), b"stranger"][speaker]
        world.harness.core.handle(events.MessageReceived(peer, message), world.harness.now_ms)
        world.harness.core.invariants()


def _fields(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}
