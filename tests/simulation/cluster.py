"""All that takes part in a run: Kafka, disks, coordinators, workers, and their supervisor.

Responsible for: putting a run together from its seed, what the supervisor does when a process ends, and the
points at which faults strike. A mutation is a set of classes that take the place of those of the shells or
the cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from fcluster.common.exit_codes import ExitCode
from fcluster.common.settings import Settings
from fcluster.engine.state import FlushLimits
from fcluster.graph.partitioner import partition_of
from tests.simulation.checks import Checks
from tests.simulation.coordinator_shell import SimCoordinator
from tests.simulation.jobs import SimJob, job_of
from tests.simulation.kafka_model import KafkaModel, Partition
from tests.simulation.storage import Disk, SimSnapshotStore
from tests.simulation.worker_shell import SimWorker
from tests.simulation.world import World

TRANSACTION_TIMEOUT_MS = 4000


@dataclass
class Strike:
    """A fault that waits for a certain step: the `countdown`-th time it comes, it happens."""

    step: str
    countdown: int
    kind: str
    duration_ms: int


@dataclass
class Cluster:
    """One run's cast.

    Attributes:
        expected_workers: what the supervisor starts, and the coordinator waits for.
        wanted: slots that shall have a worker, by name of the worker's place; a rescale changes it.
        strikes: faults that wait for their step.
        played: the job; None: the seed decides.
    """

    world: World
    worker_class: type[SimWorker] = SimWorker
    coordinator_class: type[SimCoordinator] = SimCoordinator
    strikes: list[Strike] = field(default_factory=list[Strike])
    harm_only: bool = False
    played: SimJob | None = None

    def __post_init__(self) -> None:
        world, random = self.world, self.world.random
        self.job = self.played or job_of(world.seed)
        self.topology = self.job.topology
        drawn = random.choice((1, 2, 2, 3))
        self.partitions = self.job.partitions or drawn
        self.partition_counts = {
            topic: self.partitions for topics in self.job.inputs.values() for topic in topics
        }
        self.expected_workers = random.choice((1, 2, 2, 3, 3, 4))
        self.settings = Settings(
            commit_interval_min_ms=random.choice((0, 10, 10, 40)),
            commit_interval_max_ms=100,
            checkpoint_timeout_ms=random.choice((800, 2500)),
            checkpoint_straggler_ms=random.choice((5, 30, 100)),
            snapshot_interval_ms=random.choice((150, 400)),
            heartbeat_interval_ms=random.choice((120, 200)),
            session_timeout_ms=random.choice((500, 900)),
            offset_refresh_interval_ms=random.choice((1000, 60_000)),
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            initial_rebalance_delay_ms=random.choice((0, 200)),
            coordinator_loss_bound_ms=random.choice((300, 30_000)),
            num_standby_replicas=random.choice((0, 0, 1, 2)),
            worker_leave_timeout_ms=(1500, 400, 0)[world.seed % 3],
            max_task_idle_ms=(0, 0, 40, -1)[world.seed % 4],
        )
        self.epoch_records_max = random.choice((5, 1000))
        self.cache_entries_max = random.choice((0, 2, 1000))
        self.flush_limits = random.choice(
            (FlushLimits(entries_max=1), FlushLimits(entries_max=6), FlushLimits(age_ms_max=150.0))
        )
        self.upload_damage_share = random.choice((0.0, 0.1))
        self.restore_ms_max = random.choice((5, 5, 50, 300))
        self.hosts = random.choice((1, 2, 4))
        self.misdirected_share = 0.0
        # Drawn apart, so that all else stays as it is. Fewer than really, so that more happens.
        self.fired_at_once_max = Random(f"timers {world.seed}").choice((0, 1, 1000))
        self.checks = Checks(world, self.partitions, self.job, harm_only=self.harm_only)
        self.snapshots = SimSnapshotStore()
        self.coordinators: list[SimCoordinator] = []
        self.workers: list[SimWorker] = []
        self.finished = False
        self.stop_wanted = False
        self.restart_workers = True
        self._pids = 0
        self._outputs = 0
        self._disks: dict[tuple[str, int], Disk] = {}
        self._readers: dict[Partition, list[Callable[[], None]]] = {}
        self.kafka = self.checks.kafka = KafkaModel(
            timeout_ms=TRANSACTION_TIMEOUT_MS,
            marker_delay_ms=self._marker_delay_ms,
            defer=lambda delay_ms, action: world.at(delay_ms, None, action),
            expire_later=lambda delay_ms, action: world.at(delay_ms, None, action),
            on_commit=self.checks.on_commit,
            on_stable=self._stable,
        )

    def begin(self) -> None:
        """Start a coordinator and the workers."""
        self.start_coordinator()
        for number in range(self.expected_workers):
            self.world.at(self.world.up_to(30), None, self.start_worker, number)

    def next_pid(self) -> int:
        """A number for a new process."""
        self._pids += 1
        return self._pids

    def next_output(self) -> int:
        """A number for an output that is made: they rise."""
        self._outputs += 1
        return self._outputs

    # --- Kafka ----------------------------------------------------------------------------------------

    def place(self, topic: str, key: bytes | None, value: bytes | None) -> Partition:
        """Where a producer puts a record. Without a key, a real one draws lots; here the value decides."""
        return topic, partition_of(value or b"" if key is None else key, self.partitions)

    def _marker_delay_ms(self) -> int:
        world = self.world
        if world.chance(world.timing.marker_delay_share):
            return 1 + world.up_to(world.timing.marker_delay_ms_max)
        return 0

    def when_stable(self, partition: Partition, action: Callable[[], None]) -> None:
        """Do something when there may be more to read."""
        self._readers.setdefault(partition, []).append(action)

    def _stable(self, partition: Partition) -> None:
        for action in self._readers.pop(partition, ()):
            action()

    # --- disks ----------------------------------------------------------------------------------------

    def disk(self, host: str, slot: int) -> Disk:
        """The directory of a slot on a host."""
        disk = self._disks.get((host, slot))
        if disk is None:
            disk = self._disks[host, slot] = Disk(self.checks.on_apply)
        return disk

    @property
    def disks(self) -> list[Disk]:
        """All there are."""
        return list(self._disks.values())

    # --- processes ------------------------------------------------------------------------------------

    def start_coordinator(self) -> SimCoordinator:
        """Start one more coordinator; it deposes the others."""
        coordinator = self.coordinator_class(self, f"coordinator-{len(self.coordinators) + 1}")
        self.coordinators.append(coordinator)
        return coordinator

    def leads(self, coordinator: SimCoordinator) -> None:
        """It has a term, and so knows more than those before it."""
        known = self.checks.leader
        if known is None or known.terms.term < coordinator.term:
            self.checks.leader = coordinator.core

    def find_leader(self) -> SimCoordinator | None:
        """Whom the journal names; a worker with a fixed address may find another one there."""
        listening = [other for other in self.coordinators if other.alive and other.router.listening]
        if listening and self.world.stormy and self.world.chance(self.misdirected_share):
            return self.world.random.choice(listening)
        leader = self.kafka.journal.leader
        return leader if leader is not None and leader.alive else None

    def coordinator_ended(self, coordinator: SimCoordinator) -> None:
        """The supervisor's part: there is always a coordinator, unless the job has ended."""
        if coordinator.exit_code == 0 and self.stop_wanted:
            self.finished = True
        if not self.finished and not self._has_leader():
            self.world.at(20 + self.world.up_to(200), None, self._replace_coordinator)

    def take_over_from(self, coordinator: SimCoordinator) -> None:
        """A standby was invited to lead."""
        if not self.finished and all(
            other is coordinator or self.is_deposed(other) for other in self.living_coordinators
        ):
            self.start_coordinator()

    def _replace_coordinator(self) -> None:
        if not self.finished and not self._has_leader():
            self.start_coordinator()

    def _has_leader(self) -> bool:
        """Whether somebody leads, or is about to; who is deposed doesn't count, though it may not know."""
        return any(not self.is_deposed(coordinator) for coordinator in self.living_coordinators)

    def is_deposed(self, coordinator: SimCoordinator) -> bool:
        """Whether another coordinator has taken a higher term since."""
        leader = self.kafka.journal.leader
        return leader is not None and 0 < coordinator.term < leader.term

    def start_worker(self, number: int, slot: int | None = None) -> SimWorker:
        """Start a worker in a place; it wants the slot of that number, or any."""
        host = f"host-{number % self.hosts}"
        wanted = number if slot is None else slot
        worker = self.worker_class(self, f"w{number}.{self._pids + 1}", host, wanted)
        self.workers.append(worker)
        return worker

    def worker_ended(self, worker: SimWorker) -> None:
        """The supervisor's part: a worker that wasn't asked to leave for good is started anew."""
        if worker.exit_code == 3:
            self.checks.fail(f"{worker.name} stopped as if the job had failed")
        if self.finished or not self.restart_workers:
            return
        if (worker.leaving or worker.exit_code == ExitCode.DRAINED) and not worker.returns:
            return
        if worker.exit_code in (0, ExitCode.JOB_ENDED) and self.stop_wanted:
            return
        number = int(worker.name[1:].partition(".")[0])
        slot = worker.wanted_slot if worker.slot < 0 else worker.slot
        self.world.at(5 + self.world.up_to(250), None, self._replace_worker, number, slot)

    def _replace_worker(self, number: int, slot: int) -> None:
        if not self.finished:
            self.start_worker(number, slot)

    @property
    def living_workers(self) -> list[SimWorker]:
        """Those that aren't dead; stopped ones count."""
        return [worker for worker in self.workers if worker.alive]

    @property
    def living_coordinators(self) -> list[SimCoordinator]:
        """Those that aren't dead; stopped and deposed ones count."""
        return [coordinator for coordinator in self.coordinators if coordinator.alive]

    # --- faults ---------------------------------------------------------------------------------------

    def step(self, process: Any, name: str) -> None:
        """A process has come to a step: whatever waits for it strikes."""
        if not self.world.stormy:
            return
        for strike in self.strikes:
            if strike.step == name:
                strike.countdown -= 1
                if strike.countdown == 0:
                    self.strikes.remove(strike)
                    self._strike(process, name, strike)
                    return

    def _strike(self, process: Any, name: str, strike: Strike) -> None:
        self.world.landed[f"{strike.kind} at {name}"] += 1
        if strike.kind == "crash":
            process.kill(f"at '{name}'")
        elif strike.kind == "stop":
            process.pause(strike.duration_ms)
        elif strike.kind == "cut from Kafka":
            process.note("## cut from Kafka for %d ms", strike.duration_ms)
            process.kafka_cut_until_ms = self.world.now_ms + strike.duration_ms

    def heal(self) -> None:
        """All faults end: everybody goes on, nobody is cut off, and only the last leader is left."""
        world = self.world
        world.note("world", "## all faults end")
        world.stormy = False
        world.timing = replace(world.timing, slow_request_share=0.0, request_failure_share=0.0)
        world.kafka_down_until_ms = 0
        self.strikes.clear()
        for disk in self.disks:
            disk.full = False
        if world.brokers is not None:
            world.brokers.heal()
        for coordinator in self.living_coordinators:
            coordinator.kafka_cut_until_ms = 0
            coordinator.resume()
            if world.seed % 2 and self.is_deposed(coordinator):
                coordinator.kill("deposed")  # else everybody has to find the right one beside it
        for worker in self.living_workers:
            worker.kafka_cut_until_ms = 0
            worker.dealer.heal()
            worker.resume()
        if not any(not worker.leaving for worker in self.living_workers):
            self.start_worker(0)
