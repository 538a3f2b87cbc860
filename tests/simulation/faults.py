"""Which faults a seed brings, and when.

Responsible for: drawing the faults of a run. Each run has a theme: some are about one kind of fault, some
about all kinds at once. Faults come at random times, or at a certain step of a worker or coordinator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from fcluster.coordinator.core import events
from fcluster.wire import messages
from tests.simulation.brokers import Brokers, takes_part
from tests.simulation.cluster import Cluster, FaultAtStep
from tests.simulation.jobs import KEYS, MORE, SOURCE, Written, source_record
from tests.simulation.kafka_model import ABORTED, Producer
from tests.simulation.worker_shell import SimWorker
from tests.simulation.world import Timing

FAULTS_MS_MIN = 1500
FAULTS_MS_SPREAD = 2500
HAND_OVER_SHARE = 0.15

THEMES = (
    "calm", "crashes", "steps", "steps", "pauses", "zombies", "network", "kafka", "coordinators",
    "deposed", "rescale", "disks", "everything", "everything", "everything",
)  # fmt: skip

WORKER_STEPS = (
    "Welcome received", "Assign received", "Revoke received", "Barrier received", "Complete received",
    "Evicted received", "producers opened", "positions read", "shard restored", "records processed",
    "layers frozen", "delta flushed", "offsets sent", "Send carried out", "PrepareEpoch carried out",
    "complete, before commit", "committed, before apply", "CloseShards carried out",
    "OpenProducers carried out", "snapshot uploaded", "manifest written", "changelog truncated",
)  # fmt: skip
COORDINATOR_STEPS = (
    "journal begun", "term written", "between two effects", "before a journal write", "after a journal write",
    "before a fence", "after a fence",
)  # fmt: skip


@dataclass(frozen=True)
class FaultPlan:
    """The faults of a run, for the report."""

    theme: str
    duration_ms: int
    inputs: int


def plan_faults(cluster: Cluster) -> FaultPlan:
    """Draw the faults of this run and schedule them."""
    return _FaultPlanner(cluster).plan()


class _FaultPlanner:
    """Draws from the world's generator, always in the same order."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.random = cluster.world.random
        self._inputs: Counter[str] = Counter()
        self.duration_ms = FAULTS_MS_MIN + self.random.randrange(FAULTS_MS_SPREAD)

    def plan(self) -> FaultPlan:
        theme = self.random.choice(THEMES)
        everything = theme == "everything"
        self._set_timing(requests_fail=theme == "kafka" or (everything and self.random.random() < 0.7))
        inputs = self._schedule_inputs()
        if self.cluster.run_end is not None:
            own = Random(f"filled up {self.world.seed}")
            self.world.at(own.randrange(self.duration_ms), None, self.cluster.fill_up)
        if theme in ("steps", "coordinators") or everything:
            self._schedule_faults_at_steps(theme)
        if theme == "zombies":
            self._schedule_zombies()
        if theme == "deposed":
            self._schedule_deposed()
        for name, count, fault in (
            ("crashes", 4, self._crash),
            ("pauses", 4, self._pause),
            ("network", 6, self._disturb_network),
            ("kafka", 2, self._cut_from_kafka),
            ("coordinators", 3, self._disturb_coordinator),
            ("rescale", 4, self._rescale),
            ("disks", 4, self._damage_disk),
        ):
            if theme == name:
                self._schedule(self.random.randint(1, count), fault)
            elif everything and self.random.random() < 0.6:
                self._schedule(self.random.randint(1, max(1, count - 1)), fault)
        if theme == "kafka":
            self._schedule(self.random.randint(0, 2), self._stop_kafka)
        self._schedule_hand_over()
        self._schedule_faults_at_timers()
        self._schedule_outage()
        if takes_part(self.world.seed):
            self.world.brokers = Brokers(self.world)
            self.world.brokers.schedule(
                self.duration_ms, lambda: {at: found[:2] for at, found in self.cluster.kafka.offsets.items()}
            )
        if theme in ("coordinators", "everything"):
            self.cluster.misdirected_share = self.random.choice((0.0, 0.0, 0.3))
        self.world.note("world", "theme %s, %d inputs, %s", theme, inputs, self.cluster.settings)
        return FaultPlan(theme, self.duration_ms, inputs)

    def _set_timing(self, *, requests_fail: bool) -> None:
        self.world.timing = Timing(
            network_ms_max=self.random.choice((1, 3, 20)),
            kafka_ms_max=self.random.choice((2, 4, 20)),
            marker_delay_share=self.random.choice((0.0, 0.1, 0.5)),
            marker_delay_ms_max=self.random.choice((10, 100)),
            request_timeout_ms=self.random.choice((400, 1500)),
            request_failure_share=self.random.choice((0.01, 0.04)) if requests_fail else 0.0,
            refusal_share=0.02 if requests_fail or takes_part(self.world.seed) else 0.0,
            slow_request_share=self.random.choice((0.0, 0.05)) if requests_fail else 0.0,
            duplicate_share=self.random.choice((0.0, 0.02, 0.1)),
            duplicate_ms_max=self.random.choice((3, 30, 300)),
        )

    def _schedule(self, count: int, fault: Callable[[], None]) -> None:
        for _ in range(count):
            self.world.at(self.random.randrange(self.duration_ms), None, self._unless_over, fault)

    def _unless_over(self, fault: Callable[[], None]) -> None:
        if not self.cluster.finished:
            fault()

    # --- inputs ---------------------------------------------------------------------------------------

    def _schedule_inputs(self) -> int:
        """Schedule bursts of records, or the records that were given. In some runs, bursts are
        transactions, and some of these abort."""
        given = self.cluster.job.given
        if given is not None:
            times_ms = sorted(self.random.randrange(self.duration_ms) for _ in given)
            times_ms[: self.cluster.job.there] = [0] * self.cluster.job.there
            for at_ms, (topic, record) in zip(times_ms, given, strict=True):
                self.world.at(at_ms, None, self._put_in, [record], False, topic)
            return len(given)
        transactional = self.random.random() < 0.3
        ident = 0
        bursts: list[tuple[int, list[Written], str]] = []
        for _ in range(self.random.randint(6, 14)):
            records = [
                source_record(KEYS[self.random.randrange(len(KEYS))], ident + n)
                for n in range(self.random.randint(1, 6))
            ]
            ident += len(records)
            at_ms = self.random.randrange(self.duration_ms)
            topic = MORE if MORE in self.cluster.job.sources and self.random.random() < 0.5 else SOURCE
            bursts.append((at_ms, records, topic))
        times_ms = [at_ms for at_ms, _, _ in bursts]
        if self.cluster.job.comes_in_order:
            self._sort_most_of(times_ms)
        for at_ms, (_, drawn, topic) in zip(times_ms, bursts, strict=True):
            records = [self.cluster.job.as_in(topic, record) for record in drawn]
            self.world.at(at_ms, None, self._put_in, records, transactional, topic)
        return ident

    def _sort_most_of(self, times_ms: list[int]) -> None:
        """Most bursts come in the order of their timestamps, so that most records aren't too late."""
        own = Random(f"order {self.world.seed}")  # so that the others stay as they are
        times_ms.sort()
        for at in range(len(times_ms)):
            if own.random() < 0.35:
                other = min(at + own.randint(1, 4), len(times_ms) - 1)
                times_ms[at], times_ms[other] = times_ms[other], times_ms[at]

    def _put_in(self, records: list[Written], transactional: bool, topic: str) -> None:
        kafka = self.cluster.kafka
        for record in records:
            record.put_at_ms = self.world.now_ms
        placed = [(self.cluster.place(topic, record.key, record.value), record) for record in records]
        if not transactional:
            for partition, record in placed:
                kafka.append_plain(partition, record)
            return
        name = f"input-{records[0].timestamp_ms}"
        self._inputs[name] += 1
        # Bursts may begin with the same time. Each has a producer of its own.
        again = f"-{self._inputs[name]}" if self._inputs[name] > 1 else ""
        producer = kafka.init_producer(name + again)
        kafka.append(producer, placed, self.world.now_ms)
        self.world.at(self.world.up_to(60), None, self._end_input, producer, self.world.chance(0.7))

    def _end_input(self, producer: Producer, committed: bool) -> None:
        if not committed:
            self.world.landed[f"input {ABORTED}"] += 1
        (self.cluster.kafka.commit if committed else self.cluster.kafka.abort)(producer)

    # --- faults that wait for a step ------------------------------------------------------------------

    def _schedule_faults_at_steps(self, theme: str) -> None:
        steps = [f"coordinator: {step}" for step in COORDINATOR_STEPS]
        if theme != "coordinators":
            steps += [f"worker: {step}" for step in WORKER_STEPS]
        for _ in range(self.random.randint(1, 5)):
            kind = self.random.choice(("crash", "crash", "stop", "cut from Kafka"))
            duration_ms = self.random.choice((40, 400, 1200))
            countdown = self.random.choice((1, 1, 2, 3, 5, 10))
            self.cluster.faults_at_steps.append(
                FaultAtStep(self.random.choice(steps), countdown, kind, duration_ms)
            )

    def _schedule_zombies(self) -> None:
        """Stop workers where they hold most, and make it hard for the coordinator to fence them."""
        steps = ("Complete received", "complete, before commit", "offsets sent", "PrepareEpoch carried out")
        for _ in range(self.random.randint(1, 3)):
            step, countdown = f"worker: {self.random.choice(steps)}", self.random.choice((1, 2, 4, 8))
            self.cluster.faults_at_steps.append(
                FaultAtStep(step, countdown, "stop", self.random.choice((800, 1200, 2000)))
            )
        for _ in range(self.random.randint(0, 3)):
            duration_ms = self.random.choice((100, 600, 1500))
            self.cluster.faults_at_steps.append(
                FaultAtStep("coordinator: before a fence", 1, "cut from Kafka", duration_ms)
            )

    def _schedule_deposed(self) -> None:
        """Depose coordinators that then continue, with workers that still connect to them."""
        self.cluster.misdirected_share = 0.5
        begin_ms = self.random.randrange(self.duration_ms // 2)
        for number in range(self.random.randint(1, 2)):
            self.world.at(begin_ms + 700 * number, None, self._depose)
        if self.random.random() < 0.5:
            # The coordinator is cut off while it decides something, so it is deposed before its journal knows
            # of it.
            countdown = self.random.randint(1, 6)
            self.cluster.faults_at_steps.append(
                FaultAtStep("coordinator: before a journal write", countdown, "cut from Kafka", 2500)
            )
        if self.random.random() < 0.5:
            self._schedule(1, self._crash)
        self._schedule(self.random.randint(2, 6), self._disturb_network)
        self._schedule(self.random.randint(0, 2), self._rescale)

    def _schedule_hand_over(self) -> None:
        """Ask the leader to leave, in some runs of every theme."""
        own = Random(f"hand over {self.world.seed}")  # so that the other choices stay the same
        if own.random() < HAND_OVER_SHARE:
            for _ in range(own.randint(1, 2)):
                self.world.at(own.randrange(self.duration_ms), None, self._hand_over)

    def _schedule_faults_at_timers(self) -> None:
        """Kill or stop a worker after timers have fired, in some runs of jobs with timers."""
        own = Random(f"strikes at timers {self.world.seed}")
        job = self.cluster.job
        has_timers = job.awaits_timers or any(model.has_timers for model in job.models.values())
        if has_timers and own.random() < 0.3:
            kind, countdown = own.choice(("crash", "crash", "stop")), own.choice((1, 2, 4, 8))
            self.cluster.faults_at_steps.append(FaultAtStep("worker: timers fired", countdown, kind, 1200))

    def _schedule_outage(self) -> None:
        own = Random(f"outage {self.world.seed}")
        if self.cluster.job.outage:
            self.world.at(own.randrange(self.duration_ms // 2, self.duration_ms), None, self._cut_power)

    def _cut_power(self) -> None:
        """All processes die. Their supervisors start them again."""
        self.world.landed["outage"] += 1
        for process in (*self.cluster.living_coordinators, *self.cluster.living_workers):
            process.kill("outage")
        for topic, record in self.cluster.job.outage:
            self._put_in([record], False, topic)

    def _hand_over(self) -> None:
        for coordinator in self.cluster.living_coordinators:
            if coordinator.core is not None and coordinator.leads and not coordinator.paused:
                self.world.landed["coordinator: hands over"] += 1
                coordinator.note("## asked to leave")
                coordinator.resign()
                return

    def _depose(self) -> None:
        coordinators = self.cluster.living_coordinators
        if coordinators and len(coordinators) < 3:
            self.world.landed["coordinator: deposed alive"] += 1
            if self.world.chance(0.5):
                self.random.choice(coordinators).pause(self.random.choice((60, 400, 1000)))
            self.cluster.start_coordinator()

    # --- faults at their time -------------------------------------------------------------------------

    def _crash(self) -> None:
        workers = self.cluster.living_workers
        if self.world.chance(0.1):
            self.world.landed["crash of all workers"] += 1
            for worker in workers:
                worker.kill("all workers crash")
        elif workers:
            self.world.landed["crash of a worker"] += 1
            self.random.choice(workers).kill("crash")

    def _pause(self) -> None:
        workers = [worker for worker in self.cluster.living_workers if not worker.paused]
        if not workers:
            return
        worker, duration_ms = self.random.choice(workers), self.random.choice((30, 300, 1200, 2500))
        if self.world.chance(0.3):
            self.world.landed["main thread hangs"] += 1
            worker.hang(duration_ms)
        else:
            self.world.landed["worker stopped"] += 1
            worker.pause(duration_ms)

    def _disturb_network(self) -> None:
        workers, coordinators = self.cluster.living_workers, self.cluster.living_coordinators
        if not workers or not coordinators:
            return
        worker = self.random.choice(workers)
        if self.world.chance(0.5):
            self._break_connection(worker)
            return
        duration_ms = self.random.choice((50, 400, 1500))
        directions = self.random.choice(((True, True), (True, False), (False, True)))
        for coordinator in coordinators:
            worker.dealer.cut(coordinator.router, self.world.now_ms + duration_ms, directions)
        self.world.landed["worker cut from coordinator" + (", one way" if sum(directions) == 1 else "")] += 1
        worker.note("## cut from the coordinator for %d ms, ways there and back: %s", duration_ms, directions)
        if self.world.chance(0.5):
            self._break_connection(worker)

    def _break_connection(self, worker: object) -> None:
        connection = worker.dealer.connection  # type: ignore[attr-defined]
        if connection is None:
            return
        self.world.landed["connection broken"] += 1
        worker.note("## connection breaks")  # type: ignore[attr-defined]
        delays = (0, 3, 3, 60, 400, None)
        connection.break_off(self.random.choice((0, 3, 60, 400)), self.random.choice(delays))

    def _cut_from_kafka(self) -> None:
        processes = [*self.cluster.living_workers, *self.cluster.living_coordinators]
        if processes:
            process, duration_ms = self.random.choice(processes), self.random.choice((50, 500, 2000))
            process.note("## cut from Kafka for %d ms", duration_ms)
            self.world.landed["cut from Kafka"] += 1
            process.kafka_cut_until_ms = max(process.kafka_cut_until_ms, self.world.now_ms + duration_ms)

    def _stop_kafka(self) -> None:
        duration_ms = self.random.choice((100, 700))
        self.world.note("world", "## Kafka is unavailable for %d ms", duration_ms)
        self.world.landed["Kafka away"] += 1
        self.world.kafka_down_until_ms = max(self.world.kafka_down_until_ms, self.world.now_ms + duration_ms)

    def _disturb_coordinator(self) -> None:
        coordinators = self.cluster.living_coordinators
        if not coordinators:
            return
        coordinator = self.random.choice(coordinators)
        kind = self.random.choice(("crash", "stop", "stop", "second", "stop and second"))
        self.world.landed[f"coordinator: {kind}"] += 1
        if kind == "crash":
            coordinator.kill("crash")
        if kind.startswith("stop"):
            coordinator.pause(self.random.choice((60, 700, 2000)))
        if kind.endswith("second") and len(coordinators) < 3:
            self.cluster.start_coordinator()

    def _rescale(self) -> None:
        workers = [
            worker for worker in self.cluster.living_workers if not worker.leaving and not worker.paused
        ]
        if len(workers) > 1 and self.world.chance(0.5):
            self._ask_to_leave(self.random.choice(workers))
        elif self.world.chance(0.3):
            self._restart_one_by_one(0)
        elif len(workers) < 6:
            self.world.landed["worker added"] += 1
            self.cluster.start_worker(self.cluster.next_pid() % 100 + 10, -1)

    def _ask_to_leave(self, worker: SimWorker) -> None:
        coordinators = self.cluster.living_coordinators
        if coordinators and self.world.chance(0.4):
            worker.note("## drained by an operator")
            self.world.landed["worker drained by an operator"] += 1
            worker.is_drained = True
            request = messages.DrainRequest(worker.name)
            self.random.choice(coordinators).feed(events.MessageReceived(b"admin", request))
            return
        worker.note("## asked to leave")
        self.world.landed["worker asked to leave"] += 1
        worker.terminate()
        if self.world.chance(0.2):
            self.world.landed["worker asked to leave twice"] += 1
            self.world.at(self.world.up_to(60), None, worker.terminate)

    def _restart_one_by_one(self, slot: int) -> None:
        """A rolling restart: the next worker is asked to leave when the one before has a successor."""
        workers = [worker for worker in self.cluster.living_workers if worker.slot >= slot]
        if workers and self.world.faults_on:
            worker = min(workers, key=lambda worker: worker.slot)
            worker.note("## asked to leave; its supervisor starts it again")
            self.world.landed["worker restarted in good order"] += 1
            worker.returns = True
            worker.terminate()
            self._await_successor(worker)

    def _await_successor(self, worker: SimWorker) -> None:
        if worker.alive:
            self.world.at(20, None, self._await_successor, worker)
        else:
            self.world.at(300, None, self._restart_one_by_one, worker.slot + 1)

    def _damage_disk(self) -> None:
        disks, snapshots = self.cluster.disks, self.cluster.snapshots
        kind = self.random.choice(("lost", "lost", "full", "rot"))
        if kind == "rot":
            # At most one for each shard: nothing is promised for two damaged snapshots and a lost disk.
            shards = [shard for shard in snapshots.manifests if shard not in snapshots.rotten]
            if shards and snapshots.rot(self.random, self.random.choice(shards)):
                self.world.landed["snapshot damaged"] += 1
        elif kind == "full" and disks:
            disk = self.random.choice(disks)
            disk.full = True
            self.world.note("world", "## the disk of %s is full", disk.owner)
            self.world.landed["disk full"] += 1
            self.world.at(self.random.choice((100, 600)), None, setattr, disk, "full", False)
        elif disks:
            disk = self.random.choice(disks)
            if disk.owner is not None:
                disk.owner.kill("its disk is gone")  # type: ignore[attr-defined]
            disk.lose()
            self.world.landed["disk lost"] += 1
