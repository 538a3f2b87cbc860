"""One job's run under load, hurt while it runs and judged afterwards.

Responsible for: topics, a generator that goes on while faults land, live readers of both isolation levels, a
list of what was done and whether it landed, and at the end the whole verdict: the checker's (nothing lost,
repeated or reordered, sums recomputed, the live reader agrees with the final one, state equals a fold of the
input), no transaction left open, and nothing left behind: processes, file descriptors, transactional ids,
half-made snapshots.

A fault before a commit counts only if it landed in an open epoch: then a read_uncommitted reader has seen,
just before it, outputs that no read_committed reader ever sees.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fcluster.common.failpoints import Arm
from fcluster.common.ids import transactional_ids
from tests.chaos.cluster import ChaosCluster, Mark
from tests.chaos.state import check_state
from tests.chaos.transactions_log import AT_REST, transactional_ids_of
from tests.checker.check import check_regrouped, check_totals, wait_until_committed
from tests.checker.generate import Generator, create_topic
from tests.checker.live import LiveReader
from tests.checker.reading import READ_COMMITTED, READ_UNCOMMITTED, end_offsets, read_input
from tests.checker.verdict import Verdict, state_by_group, state_by_key
from tests.harness import COORDINATOR, processes_with, wait_until, worker_name

JOBS = Path(__file__).parents[1] / "jobs"
PLAIN, REGROUPED = "running_totals.py", "regrouped_totals.py"
PARTITIONS = 8
GROUPS = 500
RATE = 1500.0
"""Records per second: enough for open epochs on all shards all the time, little enough for two busy cores."""
CATCH_UP_S = 90.0
RECOVERY_S = 60.0
DESCRIPTORS_SLACK = 16
"""Descriptors that may come and go: connections to brokers that are opened when they are first needed."""
FAULT_BEFORE_S, FAULT_AFTER_S = 1.2, 0.3
LONG = bool(os.environ.get("FCLUSTER_TEST_LONG"))
"""Set by `make chaos`: the long dose."""
KEYS = 20_000 if LONG else 4_000
SETTINGS: Mapping[str, object] = {
    "session.timeout.ms": 1000,
    "heartbeat.interval.ms": 200,
    "commit.interval.max.ms": 200,
    "checkpoint.timeout.ms": 5000,
    "initial.rebalance.delay.ms": 500,
    # Unless snapshots are the point: a whole changelog is a better witness.
    "snapshot.interval.ms": 3_600_000,
}


@dataclass
class Fault:
    """What was done. `in_open_epoch`: outputs must have been aborted by it."""

    what: str
    time_ns: int
    in_open_epoch: bool
    aborted: int = -1


@dataclass
class Chaos:
    """A run; use it in a `with` block, which ends everything.

    Args:
        brokers: bootstrap servers.
        name: prefix of all names in Kafka.
        data_dir: of the cluster.
        job_file: PLAIN or REGROUPED.
        workers: how many to start with.
        slots: highest number of slots that the run may use; `workers` if 0.
        rate: of the load.
        settings: on top of SETTINGS.
    """

    brokers: str
    name: str
    data_dir: Path
    job_file: str = PLAIN
    workers: int = 3
    slots: int = 0
    rate: float = RATE
    settings: Mapping[str, object] = field(default_factory=dict)
    cluster_type: type[ChaosCluster] = ChaosCluster
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.job = f"{self.name}job"
        self.source, self.output = f"{self.name}in", f"{self.name}out"
        env = {
            "FCLUSTER_TEST_JOB": self.job,
            "FCLUSTER_TEST_SOURCE": self.source,
            "FCLUSTER_TEST_OUTPUT": self.output,
            "FCLUSTER_TEST_GROUPS": str(GROUPS),
        }
        self.cluster = self.cluster_type(
            JOBS / self.job_file,
            self.brokers,
            self.data_dir,
            workers=self.workers,
            env=env,
            settings={**SETTINGS, **self.settings},
        )
        self.readers: dict[str, LiveReader] = {}
        self._readers_between: dict[str, LiveReader] = {}
        self._generator: Generator | None = None
        self._open_files: dict[int, tuple[str, list[str]]] = {}

    # --- life --------------------------------------------------------------------------------------------

    def __enter__(self) -> Chaos:
        for topic in (self.source, self.output):
            create_topic(self.brokers, topic, PARTITIONS)
        try:
            for isolation in (READ_COMMITTED, READ_UNCOMMITTED):
                self.readers[isolation] = LiveReader(self.brokers, self.output, isolation).start()
            self._generator = Generator(self.brokers, self.source, rate=self.rate, keys=KEYS).start()
            self.cluster.start()
            self.await_flow()
            self.await_shards()
            if self.job_file == REGROUPED:
                for isolation in self.readers:
                    reader = LiveReader(self.brokers, self.topics_read[1], isolation)
                    self._readers_between[isolation] = reader.start()
        except BaseException:
            print(self.cluster.logs())
            self._close()
            raise
        self._note_open_files()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            print(self.told())
            print(self.cluster.logs())
        self._close()

    def _close(self) -> None:
        try:
            if self._generator is not None:
                self._generator.stop()
        finally:
            self.cluster.close()
            for reader in [*self.readers.values(), *self._readers_between.values()]:
                reader.stop()

    # --- waiting -----------------------------------------------------------------------------------------

    def await_flow(self, timeout_s: float = RECOVERY_S) -> float:
        """Wait until every output partition shows a committed record that was produced after this call.

        Returns:
            The seconds that it took.
        """
        started_s, since_ns = time.monotonic(), time.time_ns()

        def flows() -> bool:
            self.cluster.assert_alive()
            return all(newest > since_ns for newest in self.readers[READ_COMMITTED].newest_ns().values())

        wait_until(flows, "committed output in all partitions", timeout_s, 0.05)
        return time.monotonic() - started_s

    def await_shards(self, workers: int | None = None, timeout_s: float = RECOVERY_S) -> None:
        """Wait until so many workers (default: those that were started) run all shards."""
        wanted = len(self.cluster.pids()) - 1 if workers is None else workers
        wait_until(
            lambda: self.cluster.shards_running(wanted), f"{wanted} workers run all shards", timeout_s, 0.1
        )

    # --- faults ------------------------------------------------------------------------------------------

    def note(self, what: str, time_ns: int | None = None, *, in_open_epoch: bool = True) -> None:
        """Remember a fault that has landed now, or at `time_ns`."""
        self.faults.append(Fault(what, time.time_ns() if time_ns is None else time_ns, in_open_epoch))

    def kill_at(self, process: str, point: str, arm: Arm, *, in_open_epoch: bool = True) -> Mark:
        """Arm `point`, wait until the process has died there, and note it."""
        self.cluster.arm(process, point, arm)
        mark = self.cluster.await_mark(process, point)
        self.cluster.await_death(process)
        self.note(f"kill -9 {process} at {point} ({mark.detail})", mark.time_ns, in_open_epoch=in_open_epoch)
        return mark

    def start(self, process: str) -> None:
        """Start a process that has died."""
        if process == COORDINATOR:
            self.cluster.start_coordinator()
        else:
            self.cluster.start_worker(int(process.rpartition("-")[2]))

    def told(self) -> str:
        """What was done so far, for the report."""
        lines = [
            f"  {fault.what}" + (f": {fault.aborted} outputs aborted" if fault.aborted >= 0 else "")
            for fault in self.faults
        ]
        return "\n".join([f"{len(self.faults)} faults:", *lines])

    # --- the verdict -------------------------------------------------------------------------------------

    @property
    def topics_read(self) -> list[str]:
        """What the job reads."""
        regrouped = self.job_file == REGROUPED
        return [self.source, f"{self.job}-totals-repartition"] if regrouped else [self.source]

    def finish(self, title: str) -> Verdict:
        """Stop the load, let the job catch up, end it in good order, and judge everything.

        Raises:
            AssertionError: something is wrong; the message says what.
        """
        assert self._generator is not None
        written = self._generator.stop()
        wait_until_committed(self.brokers, self.job, self.topics_read, CATCH_UP_S)
        self.cluster.assert_alive()
        verdict = self._judge(title)
        self._judge_open_files()
        codes = self.cluster.terminate()
        assert set(codes.values()) == {0}, f"exit codes {codes}"
        verdict.merge(self._judge_state())
        self._judge_landing()
        self._judge_leftovers()
        print(verdict.report())
        print(self.told())
        assert verdict.inputs == written, f"{verdict.inputs} of {written} records were committed"
        assert verdict.ok, verdict.report()
        return verdict

    def _judge(self, title: str) -> Verdict:
        readers = list(self.readers.values())
        if self.job_file == PLAIN:
            return check_totals(
                self.brokers, self.job, self.source, self.output, readers=readers, title=title
            )
        return check_regrouped(
            self.brokers, self.job, self.source, self.output, GROUPS, readers=readers[:1], title=title
        )

    def _judge_state(self) -> Verdict:
        inputs = read_input(self.brokers, self.source)
        if self.job_file == PLAIN:
            stage, expected = self.source, state_by_key(inputs)
        else:
            stage, expected = "totals", state_by_group(inputs, GROUPS)
        return check_state(
            self.brokers, self.job, stage, self.topics_read[-1], "totals", expected, self.data_dir
        )

    def _judge_landing(self) -> None:
        """Each fault in an open epoch has outputs that were written and never committed."""
        everywhere = (self.readers, self._readers_between)
        aborted = [ns for readers in everywhere for ns in _aborted_ns(self.brokers, readers)]
        for fault in self.faults:
            begin_ns = fault.time_ns - FAULT_BEFORE_S * 1e9
            end_ns = fault.time_ns + FAULT_AFTER_S * 1e9
            fault.aborted = sum(begin_ns <= seen_ns <= end_ns for seen_ns in aborted)
        missed = [fault.what for fault in self.faults if fault.in_open_epoch and not fault.aborted]
        assert not missed, f"landed in no open epoch: {missed}"

    # --- nothing is left behind --------------------------------------------------------------------------

    def _note_open_files(self) -> None:
        pids = self.cluster.pids()
        for name, kinds in self.cluster.open_files().items():
            self._open_files[pids[name]] = (name, kinds)

    def _judge_open_files(self) -> None:
        """The processes that have survived everything hold no more descriptors than before."""

        def leaking() -> dict[str, tuple[int, int]]:
            now, pids = self.cluster.open_files(), self.cluster.pids()
            return {
                name: (len(before), len(now[name]))
                for pid, (name, before) in self._open_files.items()
                if pids.get(name) == pid and len(now[name]) > len(before) + DESCRIPTORS_SLACK
            }

        wait_until(lambda: not leaking(), "descriptors are given back", 15, 0.5)

    def _judge_leftovers(self) -> None:
        processes = [pid for pid in processes_with(str(self.data_dir)) if pid != os.getpid()]
        assert not processes, f"processes are left: {processes}"
        slots = range(self.slots or self.workers)
        known = {identity for slot in slots for identity in transactional_ids(self.job, slot)}
        found = transactional_ids_of(self.brokers, f"{self.job}-")
        strange = set(found) - known - {f"{self.job}-coordinator"}
        assert not strange, f"transactional ids that no slot has: {strange}"
        restless = {identity: state for identity, state in found.items() if state not in AT_REST}
        assert not restless, f"transactions are left: {restless}"
        halves = [str(path) for path in half_made(self.data_dir)]
        assert not halves, f"left behind: {halves}"


def _aborted_ns(brokers: str, readers: Mapping[str, LiveReader]) -> list[int]:
    """When a reader saw what was never committed. The topic must have come to rest."""
    if not readers:
        return []
    for reader in readers.values():
        ends = end_offsets(brokers, [reader.topic], reader.isolation)
        reader.wait_for({partition: end for (_topic, partition), end in ends.items()}, timeout_s=30)
    committed = readers[READ_COMMITTED].times_ns()
    return [ns for at, ns in readers[READ_UNCOMMITTED].times_ns().items() if at not in committed]


def half_made(data_dir: Path) -> Iterator[Path]:
    """What a snapshot or restore leaves behind when it isn't cleaned up after."""
    for path in data_dir.rglob("*"):
        if path.name.startswith(("checkpoint-", "restoring-")) or path.name.endswith((".new", ".part")):
            yield path


def workers_of(run: Chaos) -> list[str]:
    """The names of the workers that run."""
    return [name for name in run.cluster.pids() if name != COORDINATOR]


@contextmanager
def chaos_run(brokers: str, name: str, data_dir: Path, title: str, **more: object) -> Iterator[Chaos]:
    """A run that is judged at the end of the block, if nothing failed in it."""
    with Chaos(brokers, name, data_dir, **more) as run:  # type: ignore[arg-type]
        yield run
        run.finish(title)


__all__ = ["GROUPS", "LONG", "PLAIN", "REGROUPED", "Chaos", "chaos_run", "worker_name", "workers_of"]
