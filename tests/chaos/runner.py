"""The run of one job under load. It is disturbed while it runs, and judged afterwards.

Responsible for: topics, a generator that continues while faults happen, live readers of both isolation
levels, and a list of what was done and whether it hit. At the end it judges everything: the checker's verdict
(nothing lost, repeated or reordered, sums recomputed, the live reader agrees with the final one, state equals
a fold of the input), no transaction left open, and nothing left behind: processes, file descriptors,
transactional ids, snapshots (`leftovers`).

A fault counts only if it is shown to have hit an open epoch. Either it must have aborted something: around
it, a read_uncommitted reader has seen outputs that no read_committed reader ever sees. Or there is other
evidence, which is passed to `note`: transactions that were open during the fault (`open_epoch`), or the step
of an epoch at which a failpoint was passed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fcluster.common.failpoints import Arm
from fcluster.common.ids import changelog_topic, repartition_topic
from tests.chaos import leftovers, tally
from tests.chaos.cluster import ChaosCluster, Mark
from tests.chaos.state import check_state
from tests.chaos.tally import Fault
from tests.checker.check import check_regrouped, check_totals, wait_until_committed
from tests.checker.generate import Generator, create_topic
from tests.checker.live import LiveReader
from tests.checker.reading import (
    READ_COMMITTED,
    READ_UNCOMMITTED,
    end_offsets,
    partitions_of,
    read_input,
)
from tests.checker.torn import find_torn
from tests.checker.verdict import Verdict, judge_between, state_by_group, state_by_key
from tests.harness import COORDINATOR, held_back, wait_until, worker_name

JOBS = Path(__file__).parents[1] / "jobs"
PLAIN, REGROUPED = "running_totals.py", "regrouped_totals.py"
PARTITIONS = 8
GROUPS = 500
RATE = 800.0
"""Records per second: enough for open epochs on all shards all the time, and few enough for two busy
cores.
"""
CATCH_UP_S = 90.0
RECOVERY_S = 60.0
FAULT_BEFORE_S, FAULT_AFTER_S = 1.2, 0.3
LONG = bool(os.environ.get("FCLUSTER_TEST_LONG"))
"""Set by `make chaos`: the long version."""
KEYS = 20_000
HOT_KEYS = 200
"""These keys get every second record, so one epoch, and its replay, contains several records of one key."""
SETTINGS: Mapping[str, object] = {
    "session.timeout.ms": 1000,
    "heartbeat.interval.ms": 200,
    # An epoch is open all the time. More epochs per second would only be more work for two cores.
    "commit.interval.min.ms": 80,
    "commit.interval.max.ms": 200,
    "checkpoint.timeout.ms": 5000,
    "initial.rebalance.delay.ms": 500,
    # Unless a test is about snapshots: a whole changelog is better evidence.
    "snapshot.interval.ms": 3_600_000,
}


class Complaints:
    """What is wrong with a run. Used as a context, it keeps what one check objects to, so that the next check
    can follow.
    """

    def __init__(self) -> None:
        self._found: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if isinstance(error, AssertionError | TimeoutError):
            self._found.append(str(error))
            return True
        return False

    def finish(self) -> None:
        """Raises AssertionError with all complaints, if there are any."""
        assert not self._found, "\n".join(self._found)


@dataclass
class Chaos:
    """A run. Use it in a `with` block, which ends everything.

    Args:
        brokers: bootstrap servers.
        name: the prefix of all names in Kafka.
        data_dir: the cluster's data directory.
        job_file: PLAIN or REGROUPED.
        workers: how many workers to start with.
        slots: the highest number of slots that the run may use. 0: `workers`.
        rate: the rate of the load.
        replicas: how many warm copies each shard has.
        settings: settings in addition to SETTINGS.
        kafka_dir: a directory that contains the brokers' files. If it is given, markers are read, which show
            transactions that Kafka itself has torn.
    """

    brokers: str
    name: str
    data_dir: Path
    job_file: str = PLAIN
    workers: int = 3
    slots: int = 0
    rate: float = RATE
    replicas: int = 0
    settings: Mapping[str, object] = field(default_factory=dict)
    cluster_type: type[ChaosCluster] = ChaosCluster
    kafka_dir: Path | None = None
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
            settings={**SETTINGS, "num.standby.replicas": self.replicas, **self.settings},
        )
        self.readers: dict[str, LiveReader] = {}
        self._readers_between: dict[str, LiveReader] = {}
        self._generator: Generator | None = None
        self._descriptors = leftovers.Descriptors(self.cluster)

    # --- life --------------------------------------------------------------------------------------------

    def __enter__(self) -> Chaos:
        for topic in (self.source, self.output):
            create_topic(self.brokers, topic, PARTITIONS)
        try:
            self._start_readers()
            self._generator = Generator(
                self.brokers, self.source, rate=self.rate, keys=KEYS, hot_keys=HOT_KEYS
            ).start()
            self.cluster.start()
            self._read_between()
            self.await_flow()
            self.await_shards()
            self.await_copies()
        except BaseException:
            print(self.cluster.logs())
            self._close()
            raise
        self._descriptors.remember()
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
            self._stop_readers()

    def _stop_readers(self) -> None:
        for reader in [*self.readers.values(), *self._readers_between.values()]:
            reader.stop()

    def _start_readers(self) -> None:
        for isolation in (READ_COMMITTED, READ_UNCOMMITTED):
            self.readers[isolation] = LiveReader(self.brokers, self.output, isolation).start()

    def _read_between(self) -> None:
        """Live readers of the repartition topic, because it is truncated while the job runs. The coordinator
        creates it.
        """
        if self.job_file == PLAIN:
            return
        between = self.topics_read[1]
        wait_until(lambda: partitions_of(self.brokers, between), f"the topic {between}", RECOVERY_S)
        for isolation in self.readers:
            self._readers_between[isolation] = LiveReader(self.brokers, between, isolation).start()

    # --- waiting -----------------------------------------------------------------------------------------

    def await_flow(self, timeout_s: float = RECOVERY_S) -> float:
        """Wait until every output partition has a committed record that was produced after this call.

        Returns:
            How many seconds that took.
        """
        started_s, since_ns = time.monotonic(), time.time_ns()

        def flows() -> bool:
            self.cluster.assert_alive()
            newest = self.newest_ns()
            assert len(newest) == PARTITIONS, (
                f"the reader reads {sorted(newest)}, not {PARTITIONS} partitions"
            )
            return all(newest_ns > since_ns for newest_ns in newest.values())

        wait_until(flows, "committed output in all partitions", timeout_s, 0.05)
        return time.monotonic() - started_s

    def newest_ns(self) -> dict[int, int]:
        """By output partition: the producer's clock in the last record that is committed there. 0 if there is
        none.
        """
        return self.readers[READ_COMMITTED].newest_ns()

    def await_shards(self, workers: int | None = None, timeout_s: float = RECOVERY_S) -> None:
        """Wait until this many workers (default: those that were started) run all shards."""
        wanted = len(workers_of(self)) if workers is None else workers
        wait_until(
            lambda: self.cluster.shards_running(wanted), f"{wanted} workers run all shards", timeout_s, 0.1
        )

    def await_copies(self, timeout_s: float = RECOVERY_S) -> None:
        """Wait until each shard has its warm copies."""

        def warm() -> bool:
            status = self.cluster.status()
            shards = status["shards"] if status is not None else []
            copies = [shard["standbys"] for shard in shards if shard["stage"] == self.stage]
            return bool(copies) and all(
                len(found) >= self.replicas and all(copy["lag"] >= 0 for copy in found) for found in copies
            )

        if self.replicas and self.workers > self.replicas:
            wait_until(warm, f"{self.replicas} warm copies of each shard", timeout_s, 0.2)

    # --- faults ------------------------------------------------------------------------------------------

    def note(self, kind: str, what: str, time_ns: int | None = None, *, shown: str = "") -> Fault:
        """Remember a fault that has hit now, or at `time_ns`.

        Args:
            kind: one of the kinds in `tally`.
            shown: how it is known that it hit an open epoch. If empty, it must have aborted outputs, which is
                checked at the end.
        """
        fault = Fault(kind, what, time.time_ns() if time_ns is None else time_ns, shown)
        self.faults.append(fault)
        return fault

    def open_epoch(self, timeout_s: float = 10) -> str:
        """Wait until transactions of the job are open, and describe them: evidence for `note`."""
        topics = [self.output, *self.topics_read[1:]]
        held = wait_until(lambda: held_back(self.brokers, topics), "an open epoch", timeout_s, 0.01)
        return f"{sum(count for _, count in held.values())} records in open transactions"

    def kill_at(self, process: str, point: str, arm: Arm, *, kind: str = "", shown: str = "") -> Mark:
        """Arm `point`, wait until the process has died there, and note it."""
        self.cluster.arm(process, point, arm)
        return self.await_death_at(process, point, kind=kind, shown=shown)

    def await_death_at(self, process: str, point: str, *, kind: str = "", shown: str = "") -> Mark:
        """Wait until the process has died at the armed point, and note it."""
        mark = self.cluster.await_mark(process, point)
        self.cluster.await_death(process)
        chosen = kind or (tally.COORDINATOR_KILLED if process == COORDINATOR else tally.WORKER_KILLED)
        self.note(chosen, f"kill -9 {process} at {point} ({mark.detail})", mark.time_ns, shown=shown)
        return mark

    def kill(self, process: str, what: str = "") -> None:
        """`kill -9` at once, and note it."""
        shown, began_ns = self.open_epoch(), time.time_ns()
        self.cluster.kill(process)
        self.note(tally.WORKER_KILLED, what or f"kill -9 {process}", began_ns, shown=shown)

    def start(self, process: str) -> None:
        """Start a process that has died."""
        if process == COORDINATOR:
            self.cluster.start_coordinator()
        else:
            self.cluster.start_worker(int(process.rpartition("-")[2]))

    def told(self) -> str:
        """What has been done so far, for the report."""
        return "\n".join([f"{len(self.faults)} faults:", *(f"  {fault}" for fault in self.faults)])

    # --- the verdict -------------------------------------------------------------------------------------

    @property
    def topics_read(self) -> list[str]:
        """The topics that the job reads."""
        regrouped = self.job_file == REGROUPED
        return [self.source, repartition_topic(self.job, "totals")] if regrouped else [self.source]

    @property
    def stage(self) -> str:
        """The stage that keeps state."""
        return self.source if self.job_file == PLAIN else "totals"

    def finish(self, title: str) -> Verdict:
        """Stop the load, let the job catch up, end it cleanly, and judge everything.

        Raises:
            AssertionError: something is wrong. The message says what.
        """
        assert self._generator is not None
        complaints = Complaints()
        with complaints:
            if self.snapshots_often:
                leftovers.await_snapshots_collected(self.data_dir / "snapshots")
        written = self._generator.stop()
        wait_until_committed(self.brokers, self.job, self.topics_read, CATCH_UP_S)
        self.cluster.assert_alive()
        verdict = self._judge(title)
        with complaints:
            self._descriptors.judge()
        with complaints:
            codes = self.cluster.terminate()
            assert set(codes.values()) == {0}, f"exit codes {codes}"
        verdict.merge(self._judge_state())
        self._read_markers(verdict, complaints)
        print(verdict.report())
        with complaints:
            assert verdict.ok, verdict.report()
        with complaints:
            inputs = verdict.inputs - verdict.repeated_inputs
            assert inputs == written, f"{inputs} of {written} records were committed"
        with complaints:
            self._judge_landing()
        self._judge_leftovers(complaints)
        print(self.told())
        complaints.finish()
        tally.SESSION.extend(self.faults)
        return verdict

    reads_all_markers = True
    """Also the records of outputs, which takes memory. Otherwise only if something is wrong."""

    def _read_markers(self, verdict: Verdict, complaints: Complaints) -> None:
        """Note what Kafka did with the transactions: what Kafka has torn isn't the job's fault."""
        if self.kafka_dir is None:
            return
        whole = self.reads_all_markers or not verdict.ok
        markers = find_torn(
            self.kafka_dir,
            self.brokers,
            self.job,
            self.source,
            changelogs=[changelog_topic(self.job, self.stage)],
            outputs=[self.output] if whole else [],
            between=self.topics_read[1:] if whole else [],
        )
        verdict.notes.append(str(markers))
        with complaints:
            assert markers.whole, f"no transaction of the job was found in the files of {self.kafka_dir}"
        with complaints:
            assert not markers.torn, str(markers)

    def _judge_leftovers(self, complaints: Complaints) -> None:
        with complaints:
            leftovers.judge_processes(self.data_dir)
        with complaints:
            leftovers.judge_transactions(self.brokers, self.job, self.slots or self.workers)
        with complaints:
            leftovers.judge_files(self.data_dir)

    @property
    def snapshots_often(self) -> bool:
        """Whether snapshots are taken during the run."""
        return int(str(self.cluster.setting("snapshot.interval.ms"))) < 60_000

    def _judge(self, title: str) -> Verdict:
        readers = list(self.readers.values())
        if self.job_file == PLAIN:
            return check_totals(
                self.brokers, self.job, self.source, self.output, readers=readers, title=title
            )
        verdict = check_regrouped(
            self.brokers, self.job, self.source, self.output, GROUPS, readers=readers[:1], title=title
        )
        between = self._readers_between[READ_COMMITTED]
        ends = end_offsets(self.brokers, [between.topic], READ_COMMITTED)
        between.wait_for({partition: end for (_, partition), end in ends.items()}, timeout_s=30)
        return verdict.merge(judge_between(read_input(self.brokers, self.source), between.seen_inputs()))

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
        """Each fault has been shown to have hit, or outputs that were written around it were never
        committed.
        """
        everywhere = (self.readers, self._readers_between)
        aborted = [ns for readers in everywhere for ns in _aborted_ns(self.brokers, readers)]
        for fault in self.faults:
            begin_ns = fault.time_ns - FAULT_BEFORE_S * 1e9
            end_ns = fault.time_ns + FAULT_AFTER_S * 1e9
            fault.aborted = sum(begin_ns <= seen_ns <= end_ns for seen_ns in aborted)
        missed = [fault.what for fault in self.faults if not fault.shown and not fault.aborted]
        assert not missed, f"hit no open epoch: {missed}"


def _aborted_ns(brokers: str, readers: Mapping[str, LiveReader]) -> list[int]:
    """When a reader saw outputs that were never committed. Nothing may be written to the topic any more."""
    if not readers:
        return []
    for reader in readers.values():
        ends = end_offsets(brokers, [reader.topic], reader.isolation)
        reader.wait_for({partition: end for (_topic, partition), end in ends.items()}, timeout_s=30)
    committed = readers[READ_COMMITTED].times_ns()
    return [ns for at, ns in readers[READ_UNCOMMITTED].times_ns().items() if at not in committed]


def variants(short: Sequence[tuple[str, int]], long: Sequence[tuple[str, int]] = ()) -> list[Any]:
    """Parameters of a test: jobs, each with a number of warm copies. `long` is added in the long version."""
    chosen = [*short, *(long if LONG else ())]
    return [
        pytest.param(job_file, replicas, id=f"{job_file.partition('_')[0]}-{replicas}-copies")
        for job_file, replicas in chosen
    ]


def workers_of(run: Chaos) -> list[str]:
    """The names of the workers that run."""
    return [name for name in run.cluster.pids() if name.startswith("worker")]


@contextmanager
def chaos_run(brokers: str, name: str, data_dir: Path, title: str, **more: object) -> Iterator[Chaos]:
    """A run that is judged at the end of the block, if nothing failed in it."""
    with Chaos(brokers, name, data_dir, **more) as run:  # type: ignore[arg-type]
        yield run
        run.finish(title)


__all__ = [
    "GROUPS",
    "LONG",
    "PLAIN",
    "REGROUPED",
    "Chaos",
    "chaos_run",
    "variants",
    "worker_name",
    "workers_of",
]
