"""Joins with a real broker: a worker is killed, each record is joined once, and nothing gets lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from fcluster.common.ids import repartition_topic
from tests.checker.check import wait_until_committed
from tests.checker.generate import create_topic
from tests.feeding import all_the_time
from tests.harness import REPOSITORY, Up, wait_until
from tests.in_driver import by_key, rows_on_kafka
from tests.job_run import JobRun

pytestmark = pytest.mark.timeout(180)

JOB = REPOSITORY / "tests" / "jobs" / "joined.py"
PAIRS_JOB = REPOSITORY / "tests" / "jobs" / "paired.py"
GROUPS_JOB = REPOSITORY / "tests" / "jobs" / "grouped.py"
FOREIGN_JOB = REPOSITORY / "tests" / "jobs" / "foreign.py"
GLOBAL_JOB = REPOSITORY / "tests" / "jobs" / "global_rows.py"
PARTITIONS = 2
KEYS = 40
BEGIN_MS = 1_700_000_000_000
STEP_MS = 10
"""Between two records of streams that are joined. Those of a key are further apart than the interval."""


class Run(JobRun):
    """A cluster with a job that joins.

    Attributes:
        written: the newest row of each key; None: it was deleted.
    """

    sent: int

    def __init__(self, brokers: str, prefix: str, directory: Path, job: Path = JOB) -> None:
        super().__init__(brokers, prefix, directory, job, PARTITIONS)
        self.table = f"{self.source}-rows"
        create_topic(brokers, self.table, PARTITIONS, {"cleanup.policy": "compact"})
        self.written: dict[str, int | None] = {}

    def send(self) -> None:
        """Ten records more, and a few rows between them."""
        for number in range(self.sent, self.sent + 10):
            key = f"k{number * 7 % KEYS}"
            if number % 3 == 0:
                self.written[key] = row = number if number % 5 else None
                raw = None if row is None else b"%d" % row
                self._producer.produce(self.table, raw, key)
            self._producer.produce(self.source, b"%d" % number, key)
        self._producer.poll(0)
        self.sent += 10

    def send_before(self) -> None:
        """Records, and behind them a row of each key. There are more partitions than one of both."""
        for number in range(self.sent, self.sent + 200):
            self._producer.produce(self.source, b"%d" % number, f"k{number * 7 % KEYS}")
        self.sent += 200
        for number in range(3 * KEYS):
            key = f"k{number % KEYS}"
            self.written[key] = number
            self._producer.produce(self.table, b"%d" % number, key)
        assert self._producer.flush(30) == 0

    def send_last(self, *through: str) -> None:
        """A record for each key, when all rows are in the table, and have come through these topics."""
        assert self._producer.flush(30) == 0
        wait_until_committed(self.brokers, self.job, [self.table, *through, self.source], 60)
        for number in range(KEYS):
            self._producer.produce(self.source, b"%d" % (self.sent + number), f"k{number}")
        assert self._producer.flush(30) == 0
        self.sent += KEYS

    def send_pairs(self) -> None:
        """Twenty records of each stream more: some have no partner on the other side."""
        for number in range(self.sent, self.sent + 20):
            for topic, other in ((self.source, 3), (self.table, 5)):
                if number % other:
                    at_ms = BEGIN_MS + number * STEP_MS + (other - 3) * STEP_MS
                    key = f"k{number % KEYS}"
                    self._producer.produce(topic, b"%d" % number, key, timestamp=at_ms)
        self._producer.poll(0)
        self.sent += 20

    def let_time_pass(self) -> None:
        """A record in each partition of both streams, after which all others have closed."""
        for topic in (self.source, self.table):
            for partition in range(PARTITIONS):
                at_ms = BEGIN_MS + self.sent * STEP_MS + 10**6
                self._producer.produce(topic, b"-1", "last", partition=partition, timestamp=at_ms)
        assert self._producer.flush(30) == 0

    def joined(self) -> dict[str, list[dict[str, Any]]]:
        """The results of each key, in order."""
        found = by_key(rows_on_kafka(self.brokers, self.output))
        return {
            key.decode(): [orjson.loads(value or b"") for value in values] for key, values in found.items()
        }

    def count(self) -> int:
        """How many results there are."""
        self.cluster.assert_alive()
        return sum(map(len, self.joined().values()))


@pytest.fixture
def run(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    run = Run(kafka, topic_prefix, tmp_path)
    with run.cluster:
        yield run


def test_each_record_is_joined_once_when_a_worker_is_killed_and_rows_are_never_older_than_before(
    run: Run,
) -> None:
    run.cluster.start()
    with all_the_time(run.send):
        run.kill_amid(run.count, 1_000, 500, "records are joined")
    run.send_last()
    wait_until(lambda: run.count() >= run.sent, f"{run.sent} results are written", 60, 0.5)
    found = run.joined()
    assert sorted(one["n"] for results in found.values() for one in results) == list(range(run.sent))
    for key, results in found.items():
        met = [one["row"] for one in results if one["row"] is not None]
        assert met == sorted(met), key
        assert results[-1]["row"] == run.written.get(key), key


def pairs_of(sent: int) -> list[tuple[int | None, int | None]]:
    """What has to come of so many records."""
    found = [(number if number % 3 else None, number if number % 5 else None) for number in range(sent)]
    return sorted((pair for pair in found if pair != (None, None)), key=str)


def test_each_pair_comes_once_and_so_does_what_stays_alone_when_a_worker_is_killed(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    run = Run(kafka, topic_prefix, tmp_path, PAIRS_JOB)
    with run.cluster:
        run.cluster.start()
        with all_the_time(run.send_pairs):
            run.kill_amid(run.count, 1_000, 500, "records are joined")
        run.let_time_pass()
        expected = pairs_of(run.sent)

        def found() -> list[tuple[int | None, int | None]]:
            rows = [row for rows in run.joined().values() for row in rows]
            pairs = [(row["left"], row["right"]) for row in rows if -1 not in (row["left"], row["right"])]
            return sorted(pairs, key=str)

        wait_until(lambda: len(found()) >= len(expected), f"{len(expected)} results are written", 60, 0.5)
        assert found() == expected


def counted(numbers: dict[str, int], rows: dict[str, int | None]) -> dict[str, dict[str, Any]]:
    """What the groups have to be in the end."""
    found: dict[str, dict[str, Any]] = {}
    for key, number in numbers.items():
        row = rows.get(key)
        group = found.setdefault("none" if row is None else f"g{row % 7}", {"n": 0, "total": 0})
        group["n"] += 1
        group["total"] += number
    return found


def test_groups_of_joined_tables_are_right_to_the_last_row_when_a_worker_is_killed(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    run = Run(kafka, topic_prefix, tmp_path, GROUPS_JOB)
    with run.cluster:
        run.cluster.start()
        with all_the_time(run.send):
            run.kill_amid(run.count, 1_000, 500, "groups change")
        run.send_last()
        expected = counted({f"k{number}": run.sent - KEYS + number for number in range(KEYS)}, run.written)

        def newest() -> dict[str, dict[str, Any]]:
            last = {group: rows[-1] for group, rows in run.joined().items()}
            assert all(row["total"] == 0 for row in last.values() if row["n"] == 0)
            return {group: row for group, row in last.items() if row["n"] != 0}

        # A row that moves is in no group for a moment, and a total that is off once stays so.
        wait_until(lambda: sum(row["n"] for row in newest().values()) == KEYS, "all are counted", 60, 0.5)
        wait_until(lambda: newest() == expected, f"the groups are {expected}", 60, 0.5)


def test_join_by_a_foreign_key_has_the_right_row_for_each_left_row_when_a_worker_is_killed(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    run = Run(kafka, topic_prefix, tmp_path, FOREIGN_JOB)
    with run.cluster:
        run.cluster.start()
        with all_the_time(run.send):
            run.kill_amid(run.count, 500, 200, "rows change")
        run.send_last()
        expected: dict[str, dict[str, Any]] = {}
        for number in range(run.sent - KEYS, run.sent):
            target = f"k{number * 3 % KEYS}"
            row = None if number % 11 == 0 else run.written.get(target)
            expected[f"k{number - run.sent + KEYS}"] = {"n": number, "row": row}

        def newest() -> dict[str, dict[str, Any]]:
            return {key: rows[-1] for key, rows in run.joined().items()}

        wait_until(lambda: newest() == expected, f"the rows are {expected}", 60, 0.5)


def test_each_record_meets_a_row_of_a_global_table_once_when_a_worker_is_killed(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    """What is there at the start meets the rows that are there at the start, although they came later."""
    run = Run(kafka, topic_prefix, tmp_path, GLOBAL_JOB)
    with run.cluster:
        run.send_before()
        before, first = run.sent, dict(run.written)
        run.cluster.start()
        wait_until(lambda: run.count() >= before, "the records before the rows are joined", 60, 0.5)
        for result in (one for results in run.joined().values() for one in results):
            assert result["row"] == first[f"k{result['n'] * 3 % KEYS}"], result
        with all_the_time(run.send):
            run.kill_amid(run.count, 1_000, 500, "records are joined")
        run.send_last(repartition_topic(run.job, f"rows-in-{run.source}"))
        wait_until(lambda: run.count() >= run.sent, f"{run.sent} results are written", 60, 0.5)
        found = [one for results in run.joined().values() for one in results]
        assert sorted(one["n"] for one in found) == list(range(run.sent))
        for results in run.joined().values():
            for row in {one["n"] * 3 % KEYS for one in results}:
                mine = [one for one in results if one["n"] * 3 % KEYS == row]
                met = [one["row"] for one in mine if one["row"] is not None]
                assert met == sorted(met), row
        for result in found:
            if result["n"] >= run.sent - KEYS:
                assert result["row"] == run.written[f"k{result['n'] * 3 % KEYS}"], result


def check_backlog(run: Run, since: int, rows: dict[str, int | None]) -> None:
    """All records are joined once; those from this number on with these rows."""
    found = [one for results in run.joined().values() for one in results]
    assert sorted(one["n"] for one in found) == list(range(run.sent))
    for one in found:
        if one["n"] >= since:
            assert one["row"] == rows[f"k{one['n'] * 3 % KEYS}"], one


@pytest.mark.parametrize("until", [("--until-caught-up",), ("--end", "end")])
def test_each_run_that_ends_joins_its_records_with_the_rows_of_a_global_table_at_its_start(
    kafka: str, topic_prefix: str, tmp_path: Path, until: tuple[str, ...]
) -> None:
    """The records wait until the table is read, and the run until the records are joined."""
    run = Run(kafka, topic_prefix, tmp_path, GLOBAL_JOB)
    for _ in range(2):
        since = run.sent
        run.send_before()
        with Up(GLOBAL_JOB, kafka, tmp_path / "data", *until, workers=2, env=run.environment) as up:
            ended = up.wait(120)
        assert ended.code == 0, ended.text
        check_backlog(run, since, run.written)


def test_backlog_of_an_outage_meets_the_rows_of_a_global_table_that_are_there_when_the_job_starts_again(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    run = Run(kafka, topic_prefix, tmp_path, GLOBAL_JOB)
    with run.cluster:
        run.send_before()
        run.cluster.start()
        wait_until(lambda: run.count() >= run.sent, "the first records are joined", 60, 0.5)
        run.cluster.kill_all()
        since = run.sent
        run.send_before()
        run.cluster.start()
        wait_until(lambda: run.count() >= run.sent, "the backlog is joined", 60, 0.5)
        check_backlog(run, since, run.written)


def test_topics_with_different_numbers_of_partitions_are_refused_with_the_way_out(
    kafka: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = f"{topic_prefix}in", f"{topic_prefix}out"
    for topic, partitions in ((source, 4), (f"{source}-rows", 6), (output, 4)):
        create_topic(kafka, topic, partitions)
    monkeypatch.setenv("FCLUSTER_TEST_JOB", f"{topic_prefix}job")
    monkeypatch.setenv("FCLUSTER_TEST_SOURCE", source)
    monkeypatch.setenv("FCLUSTER_TEST_OUTPUT", output)
    with Up(JOB, kafka, tmp_path / "data", "--until-caught-up") as up:
        ended = up.wait(60)
    assert ended.code == 1, ended.text
    assert "joins topics with different numbers of partitions" in ended.text
    assert f"'{source}' (4 partitions) and '{source}-rows' (6 partitions)" in ended.text
    assert ".key_by(...)" in ended.text
