"""Exactly once, with real processes and a real broker: processes die in open epochs.

A test fails unless each fault is shown to have hit an open epoch: the worker's transaction was open and
contained records (see `Cluster.stop_mid_epoch`). Each run is judged by the checker, which knows only what is
in Kafka.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fcluster.common.ids import repartition_topic
from tests.checker.check import check_regrouped, check_totals, wait_until_committed
from tests.checker.generate import Generator, create_topic, write_records
from tests.checker.live import LiveReader, percentile
from tests.checker.reading import (
    READ_COMMITTED,
    READ_UNCOMMITTED,
    committed_offsets,
    end_offsets,
    read_input,
)
from tests.checker.records import generate_records
from tests.checker.state import check_state
from tests.checker.verdict import state_by_group, state_by_key
from tests.harness import (
    COORDINATOR,
    Cluster,
    Slowness,
    held_back,
    process_state,
    wait_until,
    wait_until_equal,
    worker_name,
)

JOBS = Path(__file__).parents[1] / "jobs"
PARTITIONS = 8
KEYS = 20_000
GROUPS = 500
ENDLESS = 1_000_000_000
CATCH_UP_S = 120
SETTINGS: dict[str, object] = {
    # Well below the time for which a stopped worker is observed, so that only its own transaction stays open.
    "commit.interval.max.ms": 200,
    "session.timeout.ms": 3000,
}

pytestmark = pytest.mark.timeout(300)


@dataclass
class Run:
    """A run of one job: names, cluster and readers."""

    brokers: str
    job: str
    source: str
    output: str
    cluster: Cluster
    data_dir: Path
    readers: list[LiveReader]

    def committed(self) -> int:
        """The number of committed source records."""
        offsets = committed_offsets(self.brokers, self.job)
        return sum(offset for (topic, _), offset in offsets.items() if topic == self.source)

    def wait_committed(self, records: int, timeout_s: float = 60) -> None:
        """Wait until this many source records are committed."""

        def enough() -> bool:
            self.cluster.assert_alive()
            return self.committed() >= records

        wait_until(enough, f"{records} committed records", timeout_s, 0.1)

    def catch_up(self, topics: list[str] | None = None) -> None:
        """Wait until everything that was written is committed."""
        wait_until_committed(self.brokers, self.job, topics or [self.source], CATCH_UP_S)

    def aborted(self) -> int:
        """How many output records a read_uncommitted reader saw that no read_committed reader will ever
        see."""
        by_isolation = {reader.isolation: reader for reader in self.readers}
        return by_isolation[READ_UNCOMMITTED].count() - by_isolation[READ_COMMITTED].count()


@pytest.fixture
def start(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Creates runs of the test jobs: topics, readers and a started cluster. All are ended afterwards."""
    runs: list[Run] = []

    def make(
        job_file: str = "running_totals.py",
        *,
        workers: int = 3,
        partitions: int = PARTITIONS,
        **settings: object,
    ) -> Run:
        number = len(runs)
        job = f"{topic_prefix}job{number}"
        source, output = f"{topic_prefix}in{number}", f"{topic_prefix}out{number}"
        create_topic(kafka, source, partitions)
        create_topic(kafka, output, partitions)
        env = {
            "FCLUSTER_TEST_JOB": job,
            "FCLUSTER_TEST_SOURCE": source,
            "FCLUSTER_TEST_OUTPUT": output,
            "FCLUSTER_TEST_GROUPS": str(GROUPS),
        }
        chosen = SETTINGS | {name.replace("_", "."): value for name, value in settings.items()}
        data_dir = tmp_path / f"data{number}"
        cluster = Cluster(JOBS / job_file, kafka, data_dir, workers=workers, env=env, settings=chosen)
        readers = [
            LiveReader(kafka, output, isolation).start() for isolation in (READ_COMMITTED, READ_UNCOMMITTED)
        ]
        run = Run(kafka, job, source, output, cluster, data_dir, readers)
        runs.append(run)
        return run

    failed = True
    try:
        yield make
        failed = False
    finally:
        for run in runs:
            if failed:
                print(run.cluster.logs())
            run.cluster.close()
            for reader in run.readers:
                reader.stop()


@contextmanager
def failing_with_logs(run: Run) -> Iterator[None]:
    """Show the logs of all processes if the block fails."""
    try:
        yield
    except BaseException:
        print(run.cluster.logs())
        raise


def check(run: Run, title: str) -> None:
    """End the cluster of the plain job, which has caught up, and judge the run."""
    with failing_with_logs(run):
        run.catch_up()
        verdict = check_totals(
            run.brokers, run.job, run.source, run.output, readers=run.readers[:2], title=title
        )
        run.cluster.close()
        verdict.merge(
            check_state(
                run.brokers,
                run.job,
                stage=run.source,
                source=run.source,
                store="totals",
                expected=state_by_key(read_input(run.brokers, run.source)),
                data_dir=run.data_dir,
            )
        )
        print(verdict.report())
        assert verdict.ok, verdict.report()


def test_worker_killed_and_worker_stopped_mid_epoch_loses_and_repeats_nothing(
    start: Callable[..., Run],
) -> None:
    """200,000 records in 8 partitions. The session of the stopped worker is over when it continues."""
    run = start()
    with failing_with_logs(run):
        write_records(
            run.brokers, run.source, generate_records(60_000, keys=KEYS, seed=1, sequences=(last := {}))
        )
        run.cluster.start()
        run.wait_committed(10_000)
        feeder = Feeder(run, 140_000, last)
        with feeder:
            killed, in_flight = run.cluster.kill_mid_epoch(range(3), [run.output])
            assert in_flight > 0
            slot = int(killed.rpartition("-")[2])
            run.cluster.start_worker(slot)
            run.wait_committed(run.committed() + 5_000)
            others = [number for number in range(3) if number != slot]
            stopped, held = run.cluster.stop_mid_epoch(others, [run.output])
            assert sum(held.values()) > 0
            # After its session has ended, its transaction is aborted, and other workers commit in those
            # partitions.
            stable = end_offsets(run.brokers, [run.output], READ_COMMITTED)
            wait_until(lambda: stable_offsets_moved(run, {at: stable[at] for at in held}), "the fence", 30)
            assert joins(run, stopped) == 1
            run.cluster.resume(stopped)
            wait_until_equal(lambda: joins(run, stopped), 2, "the new session of the stopped worker", 30)
        run.catch_up()
        run.cluster.assert_alive()
        assert run.committed() == 200_000
    check(run, "one worker killed, one stopped past its session")
    assert run.aborted() > 0, "nothing was aborted, so no fault hit an open epoch"


def joins(run: Run, name: str) -> int:
    """How many sessions a worker has had."""
    return run.cluster.log(name, lines=100_000).count("joined as slot")


def stable_of_open(run: Run) -> dict[tuple[str, int], int]:
    """The last stable offsets of the output partitions with an open transaction."""
    return {at: stable for at, (stable, _) in held_back(run.brokers, [run.output]).items()}


def at_rest(run: Run) -> dict[tuple[str, int], int]:
    """The same, if they stay for half a second, which is longer than an epoch. Otherwise empty."""
    before = stable_of_open(run)
    time.sleep(0.5)  # the time in which they must not move
    return before if before.items() <= stable_of_open(run).items() else {}


def stable_offsets_moved(run: Run, before: dict[tuple[str, int], int]) -> bool:
    """Whether the last stable offset has moved in all these partitions."""
    now = end_offsets(run.brokers, [run.output], READ_COMMITTED)
    return all(now[at] > stable for at, stable in before.items())


class Feeder:
    """Writes more records while the block runs.

    At the block's end it waits until `count` are written, or stops if they are ENDLESS. With those, a fault
    finds
    records in flight, however slow the host is.
    """

    def __init__(
        self, run: Run, count: int, last: dict[str, int], rate: float = 10_000, keys: int = KEYS
    ) -> None:
        self._generator = Generator(run.brokers, run.source, rate=rate, keys=keys, count_max=count, seed=2)
        self._generator.continue_after(last)
        self._endless = count == ENDLESS

    def __enter__(self) -> Feeder:
        self._generator.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._generator.stop() if kind or self._endless else self._generator.join(120)

    def write(self) -> None:
        """Write all records."""
        with self:
            pass


def test_coordinator_killed_and_restarted_loses_nothing_and_workers_stay(start: Callable[..., Run]) -> None:
    run = start(workers=2)
    with failing_with_logs(run):
        run.cluster.start()
        with Feeder(run, ENDLESS, {}, rate=6_000):
            run.wait_committed(5_000)
            workers = {name: pid for name, pid in run.cluster.pids().items() if name != COORDINATOR}
            run.cluster.kill(COORDINATOR)
            # Commits that the coordinator still allowed end. A worker that commits without it would never
            # stop.
            begun = wait_until(lambda: at_rest(run), "records of an open epoch that stays open", 10)
            time.sleep(1.0)  # the fault itself: time for a worker that would commit without a coordinator
            assert begun.items() <= stable_of_open(run).items(), "an epoch went on without a coordinator"
            run.cluster.start_coordinator()
            run.wait_committed(run.committed() + 20_000)
            assert {name: pid for name, pid in run.cluster.pids().items() if name != COORDINATOR} == workers
        run.catch_up()
        run.cluster.assert_alive()
    check(run, "coordinator killed")


def test_whole_cluster_killed_and_started_again_loses_and_repeats_nothing(start: Callable[..., Run]) -> None:
    run = start()
    with failing_with_logs(run):
        run.cluster.start()
        with Feeder(run, ENDLESS, {}, rate=8_000):
            run.wait_committed(8_000)
            stopped, held = run.cluster.stop_mid_epoch(range(3), [run.output])
            assert held, stopped
            pids = list(run.cluster.pids().values())
            run.cluster.kill_all()
            assert [process_state(pid) for pid in pids] == ["X"] * 4
            run.cluster.start()
            run.wait_committed(run.committed() + 20_000)
            run.cluster.kill_all()
            run.cluster.start()
            run.wait_committed(run.committed() + 10_000)
        run.catch_up()
    check(run, "all killed, twice")
    assert run.aborted() > 0, "nothing was aborted, so the kill hit no open epoch"


def test_repartitioned_job_with_a_worker_killed_mid_epoch_is_exactly_once(start: Callable[..., Run]) -> None:
    run = start("regrouped_totals.py")
    with failing_with_logs(run):
        run.cluster.start()
        with Feeder(run, ENDLESS, {}, rate=6_000):
            run.wait_committed(6_000)
            repartition = repartition_topic(run.job, "totals")
            killed, in_flight = run.cluster.kill_mid_epoch(range(3), [run.output, repartition])
            assert in_flight > 0
            run.cluster.start_worker(int(killed.rpartition("-")[2]))
            run.wait_committed(run.committed() + 20_000)
        run.catch_up([run.source, repartition])
        verdict = check_regrouped(
            run.brokers, run.job, run.source, run.output, GROUPS, readers=run.readers[:1], title="repartition"
        )
        run.cluster.close()
        expected = state_by_group(read_input(run.brokers, run.source), GROUPS)
        verdict.merge(
            check_state(run.brokers, run.job, "totals", repartition, "totals", expected, run.data_dir)
        )
        assert verdict.ok, verdict.report()


def test_read_uncommitted_reader_sees_outputs_within_100_ms_however_rarely_they_are_committed(
    start: Callable[..., Run],
) -> None:
    """Compared with a reader of the source, because other load on the host delays both. An output goes the
    same way as a source record once more: from a producer through the broker to a reader. So what that way
    takes at that time comes on top."""
    run = start(workers=1, partitions=4, commit_interval_min_ms=1000, commit_interval_max_ms=1000)
    last: dict[str, int] = {}
    with failing_with_logs(run):
        run.cluster.start()
        write_records(run.brokers, run.source, generate_records(2000, keys=500, sequences=last))
        run.catch_up()
        floor = LiveReader(run.brokers, run.source, READ_UNCOMMITTED).start()
        run.readers.append(floor)
        with Slowness() as machine:
            Feeder(run, 9000, last, rate=1000, keys=500).write()
    check(run, "steady flow")
    seen_at_source = {number: at for number, at in floor.first_seen_ns().items() if number >= 2000}
    assert len(seen_at_source) == 9000
    one_way = latency_by_second_ms(
        {number: at for number, at in floor.produced_ns().items() if number >= 2000}, seen_at_source
    )
    committed, uncommitted = (
        latency_by_second_ms(seen_at_source, reader.first_seen_ns()) for reader in run.readers[:2]
    )
    print(f"worst of 100 by second: uncommitted {uncommitted}, committed {committed}, one way {one_way} ms")
    # Other work on the host comes in bursts, and an output waits while a broker that got no processor time
    # ends the transaction before. A fault of ours would show in all seconds: so the quickest third counts.
    # If the host always has other work, all of it is slower, but commits still come once a second.
    slower = machine.leeway
    bound_ms = 100 * slower + statistics.median(one_way)
    told = f"{uncommitted}; the machine was {slower:.1f} times slower than alone, one way took {one_way}"
    assert sorted(uncommitted)[len(uncommitted) // 3] < bound_ms, told
    assert statistics.median(committed) > 500, f"commits came too soon to show anything: {committed}"


def latency_by_second_ms(from_ns: Mapping[int, int], to_ns: Mapping[int, int]) -> list[int]:
    """The latency that 99% of the records stay below, for each second."""
    seconds: dict[int, list[float]] = {}
    for number, at_ns in from_ns.items():
        seconds.setdefault(at_ns // 10**9, []).append((to_ns[number] - at_ns) / 1e6)
    return [round(percentile(latencies, 0.99)) for _, latencies in sorted(seconds.items())]


def test_checker_objects_to_an_at_least_once_run_with_a_kill_in_it(start: Callable[..., Run]) -> None:
    """The checker must be able to fail: without transactions, a kill leaves repeats."""
    # Rarely committed, so that each kill finds outputs whose inputs aren't committed.
    seldom = {"commit_interval_min_ms": 1000, "commit_interval_max_ms": 1000}
    run = start(workers=2, processing_guarantee="at-least-once", **seldom)
    with failing_with_logs(run):
        run.cluster.start()
        with Feeder(run, ENDLESS, {}, rate=6_000):
            run.wait_committed(6_000)
            for _ in range(3):
                wait_until(lambda: outputs_ahead(run) > 2_000, "outputs ahead of the committed offsets")
                run.cluster.kill(worker_name(0))
                run.cluster.start_worker(0)
                run.wait_committed(run.committed() + 6_000)
        run.catch_up()
        verdict = check_totals(run.brokers, run.job, run.source, run.output, title="at-least-once")
    assert not verdict.ok, "the kills left no repeats: the checker missed them, or they hit no open epoch"
    assert verdict.counts["repeated"] > 0, verdict.report()
    assert verdict.counts["lost"] == 0, verdict.report()


def outputs_ahead(run: Run) -> int:
    """Outputs whose inputs aren't committed, and repeats, of a run without transactions."""
    committed = run.committed()
    return sum(end_offsets(run.brokers, [run.output], READ_UNCOMMITTED).values()) - committed
