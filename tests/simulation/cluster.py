"""Everything in a run: Kafka, disks, coordinators, workers, and their supervisor.

Responsible for: setting up a run from its seed, restarting processes that end, and the steps at which faults
happen. A mutation replaces classes of the shells or cores by broken ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from fcluster.common.exit_codes import ExitCode
from fcluster.common.settings import Settings
from fcluster.coordinator.core.run_end import RunEnd
from fcluster.engine.state import FlushLimits
from fcluster.graph.partitioner import partition_of
from tests.simulation.checks import Checks
from tests.simulation.coordinator_shell import SimCoordinator
from tests.simulation.job_mix import BOUNDED_SEEDS_FROM, DRIFT_SEEDS_FROM, job_of
from tests.simulation.jobs import KEYS, SimJob, source_record
from tests.simulation.kafka_model import KafkaModel, Partition
from tests.simulation.storage import Disk, SimSnapshotStore
from tests.simulation.worker_shell import SimWorker
from tests.simulation.world import World

TRANSACTION_TIMEOUT_MS = 4000
FILLED_UP_FROM = 200
"""The number of the first record that fills a source up to the end of the run. Others have smaller ones."""


@dataclass
class FaultAtStep:
    """A fault that happens when a step is reached for the `countdown`-th time."""

    step: str
    countdown: int
    kind: str
    duration_ms: int


@dataclass
class Cluster:
    """The processes of one run, and what they share.

    Attributes:
        faults_at_steps: faults that wait for their step.
        harm_only: judge by the recount alone, not by who may commit.
        played: the job to play. None: the seed decides.
    """

    world: World
    worker_class: type[SimWorker] = SimWorker
    coordinator_class: type[SimCoordinator] = SimCoordinator
    faults_at_steps: list[FaultAtStep] = field(default_factory=list[FaultAtStep])
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
            dead_letters_max=self.job.dead_letters_max,
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
        # A generator of its own, so that the other choices stay the same. Lower than in the product, so that
        # more happens.
        self.fired_at_once_max = Random(f"timers {world.seed}").choice((0, 1, 1000))
        self.checks = Checks(world, self.partitions, self.job, harm_only=self.harm_only)
        self.run_end = self._drawn_end()
        self.checks.run_end = self.run_end
        self.snapshots = SimSnapshotStore()
        self.coordinators: list[SimCoordinator] = []
        self.workers: list[SimWorker] = []
        self.finished = False
        self.stop_wanted = self.run_end is not None  # it stops by itself
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

    def _drawn_end(self) -> RunEnd | None:
        """Where the run ends, if the seed plays a bounded one. Records may be put in behind the end."""
        is_bounded = BOUNDED_SEEDS_FROM <= self.world.seed < DRIFT_SEEDS_FROM
        if not is_bounded or self.played is not None:
            return None
        own = Random(f"end {self.world.seed}")
        return RunEnd(
            "the end",
            {
                topic: {
                    number: own.choice((0, own.randint(1, 8), own.randint(1, 25)))
                    for number in range(self.partitions)
                    if self._keys_of(number)
                }
                for topic in self.job.sources
            },
        )

    def _keys_of(self, partition: int) -> list[str]:
        return [key for key in KEYS if partition_of(key.encode(), self.partitions) == partition]

    def fill_up(self) -> None:
        """Put in enough records for the run to end, and some behind its end."""
        if self.run_end is None:
            return
        ident = FILLED_UP_FROM
        for topic, ends in self.run_end.offsets.items():
            for number, end in ends.items():
                keys = self._keys_of(number)
                missing = end - self.kafka.end_offset((topic, number)) + self.world.up_to(5)
                for _ in range(missing):
                    record = source_record(keys[ident % len(keys)], ident)
                    record.put_at_ms = self.world.now_ms
                    self.kafka.append_plain((topic, number), record)
                    ident += 1

    def next_pid(self) -> int:
        """A process id that wasn't used before."""
        self._pids += 1
        return self._pids

    def next_output(self) -> int:
        """A number for a new output. They increase."""
        self._outputs += 1
        return self._outputs

    # --- Kafka ----------------------------------------------------------------------------------------

    def place(self, topic: str, key: bytes | None, value: bytes | None) -> Partition:
        """The partition of a record. Without a key, real producers choose at random; here the value
        decides."""
        return topic, partition_of(value or b"" if key is None else key, self.partitions)

    def _marker_delay_ms(self) -> int:
        world = self.world
        if world.chance(world.timing.marker_delay_share):
            return 1 + world.up_to(world.timing.marker_delay_ms_max)
        return 0

    def when_stable(self, partition: Partition, action: Callable[[], None]) -> None:
        """Run an action when the last stable offset may have moved."""
        self._readers.setdefault(partition, []).append(action)

    def _stable(self, partition: Partition) -> None:
        for action in self._readers.pop(partition, ()):
            action()

    # --- disks ----------------------------------------------------------------------------------------

    def disk(self, host: str, slot: int) -> Disk:
        """A slot's part of the state directory on a host."""
        disk = self._disks.get((host, slot))
        if disk is None:
            disk = self._disks[host, slot] = Disk(self.checks.on_apply)
        return disk

    @property
    def disks(self) -> list[Disk]:
        """All disks."""
        return list(self._disks.values())

    # --- processes ------------------------------------------------------------------------------------

    def start_coordinator(self) -> SimCoordinator:
        """Start another coordinator. It deposes the others."""
        coordinator = self.coordinator_class(self, f"coordinator-{len(self.coordinators) + 1}")
        self.coordinators.append(coordinator)
        return coordinator

    def leads(self, coordinator: SimCoordinator) -> None:
        """Whether the coordinator has a term. It then knows more than its predecessors."""
        known = self.checks.leader
        if known is None or known.terms.term < coordinator.term:
            self.checks.leader = coordinator.core

    def find_leader(self) -> SimCoordinator | None:
        """The leader according to the journal. A worker with a fixed address may find another coordinator
        there."""
        listening = [other for other in self.coordinators if other.alive and other.router.listening]
        if listening and self.world.faults_on and self.world.chance(self.misdirected_share):
            return self.world.random.choice(listening)
        leader = self.kafka.journal.leader
        return leader if leader is not None and leader.alive else None

    def coordinator_ended(self, coordinator: SimCoordinator) -> None:
        """Start a new coordinator if none is left, unless the job has ended (supervisor)."""
        if coordinator.exit_code == 0 and self.stop_wanted:
            self.finished = True
        if not self.finished and not self._has_leader():
            self.world.at(20 + self.world.up_to(200), None, self._replace_coordinator)

    def take_over_from(self, coordinator: SimCoordinator) -> None:
        """Start the standby that this coordinator invited to lead."""
        if not self.finished and all(
            other is coordinator or self.is_deposed(other) for other in self.living_coordinators
        ):
            self.start_coordinator()

    def _replace_coordinator(self) -> None:
        if not self.finished and not self._has_leader():
            self.start_coordinator()

    def _has_leader(self) -> bool:
        """Whether a coordinator leads or is about to. A deposed one doesn't count, even if it doesn't know
        yet."""
        return any(not self.is_deposed(coordinator) for coordinator in self.living_coordinators)

    def is_deposed(self, coordinator: SimCoordinator) -> bool:
        """Whether another coordinator has taken a later term."""
        leader = self.kafka.journal.leader
        return leader is not None and 0 < coordinator.term < leader.term

    def start_worker(self, number: int, slot: int | None = None) -> SimWorker:
        """Start a worker. It asks for this slot, or for any (-1)."""
        host = f"host-{number % self.hosts}"
        wanted = number if slot is None else slot
        worker = self.worker_class(self, f"w{number}.{self._pids + 1}", host, wanted)
        self.workers.append(worker)
        return worker

    def worker_ended(self, worker: SimWorker) -> None:
        """Restart a worker that wasn't asked to leave for good (supervisor)."""
        if worker.exit_code == 3:
            self.checks.fail(f"{worker.name} ended with the code for a failed job")
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
        """Workers that aren't dead, including stopped ones."""
        return [worker for worker in self.workers if worker.alive]

    @property
    def living_coordinators(self) -> list[SimCoordinator]:
        """Coordinators that aren't dead, including stopped and deposed ones."""
        return [coordinator for coordinator in self.coordinators if coordinator.alive]

    # --- faults ---------------------------------------------------------------------------------------

    def step(self, process: Any, name: str) -> None:
        """Called when a process reaches a step. A fault that waits for the step happens now."""
        if not self.world.faults_on:
            return
        for fault in self.faults_at_steps:
            if fault.step == name:
                fault.countdown -= 1
                if fault.countdown == 0:
                    self.faults_at_steps.remove(fault)
                    self._inject(process, name, fault)
                    return

    def _inject(self, process: Any, name: str, fault: FaultAtStep) -> None:
        self.world.landed[f"{fault.kind} at {name}"] += 1
        if fault.kind == "crash":
            process.kill(f"at '{name}'")
        elif fault.kind == "stop":
            process.pause(fault.duration_ms)
        elif fault.kind == "cut from Kafka":
            process.note("## cut from Kafka for %d ms", fault.duration_ms)
            process.kafka_cut_until_ms = self.world.now_ms + fault.duration_ms

    def heal(self) -> None:
        """End all faults: processes continue, cuts end, and (with odd seeds) deposed coordinators are
        killed."""
        world = self.world
        world.note("world", "## all faults end")
        world.faults_on = False
        world.timing = replace(world.timing, slow_request_share=0.0, request_failure_share=0.0)
        world.kafka_down_until_ms = 0
        self.faults_at_steps.clear()
        for disk in self.disks:
            disk.full = False
        if world.brokers is not None:
            world.brokers.heal()
        for coordinator in self.living_coordinators:
            coordinator.kafka_cut_until_ms = 0
            coordinator.resume()
            if world.seed % 2 and self.is_deposed(coordinator):
                coordinator.kill("deposed")  # otherwise every worker has to find the leader beside it
        for worker in self.living_workers:
            worker.kafka_cut_until_ms = 0
            worker.dealer.heal()
            worker.resume()
        self.fill_up()
        leaving = [worker.leaving or worker.is_drained for worker in self.living_workers]
        if not self.finished and all(leaving):
            self.start_worker(0)
