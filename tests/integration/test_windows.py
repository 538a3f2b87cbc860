"""Windows on a real broker: a worker is killed, and each window's result is written exactly once."""

from __future__ import annotations

import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.feeding import all_the_time
from tests.harness import REPOSITORY, wait_until
from tests.in_driver import Row, rows_in_driver, rows_on_kafka, run_in_driver
from tests.job_run import TimedRun

pytestmark = pytest.mark.timeout(180)

JOB = REPOSITORY / "tests" / "jobs" / "windowed.py"
MANY_JOB = REPOSITORY / "tests" / "jobs" / "many_windows.py"
PARTITIONS = 2
KEYS = 40
RESULTS = 400


class Run(TimedRun):
    """A cluster with the job."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        super().__init__(brokers, prefix, directory, JOB, PARTITIONS)

    def key(self, number: int) -> str:
        return f"k{number % KEYS}"

    def results(self) -> Counter[str]:
        """How many results each window has written."""
        self.cluster.assert_alive()
        rows = rows_on_kafka(self.brokers, self.output)
        return Counter(row["by"] for row in values_in(rows))


def values_in(rows: dict[int, list[Row]]) -> list[dict[str, Any]]:
    return [orjson.loads(row[1] or b"") for found in rows.values() for row in found]


def by_window(rows: dict[int, list[Row]]) -> dict[tuple[str, str], list[Row]]:
    """The results of each step and key, in order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for part in rows.values():
        for row in part:
            value = orjson.loads(row[1] or b"")
            found.setdefault((value["by"], value["key"]), []).append(row)
    return found


@pytest.fixture
def run(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    run = Run(kafka, topic_prefix, tmp_path)
    with run.cluster:
        yield run


def test_windows_close_exactly_once_when_a_worker_is_killed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.cluster.start()
    with all_the_time(run.send):
        wait_until(lambda: run.results()["key"] >= RESULTS, "windows close", 60, 0.5)
        killed, in_flight = run.cluster.kill_mid_epoch(range(2), [run.output])
        assert in_flight > 0
        run.cluster.start_worker(int(killed.rpartition("-")[2]))
        after = run.results()
        wait_until(
            lambda: run.results()["key"] >= after["key"] + RESULTS // 2, "the workers continue", 60, 0.5
        )
    run.let_time_pass()
    for name, value in run.environment.items():
        monkeypatch.setenv(name, value)
    driver = run_in_driver(runpy.run_path(str(JOB))["job"], run.brokers, [run.source])
    assert driver.late == 0
    expected = rows_in_driver(driver, run.output)
    count = len(values_in(expected))
    wait_until(lambda: run.results().total() >= count, f"{count} results are written", 60, 0.5)
    rows = rows_on_kafka(run.brokers, run.output)
    # For each key, the results are the same bytes as the driver's, wherever epochs ended.
    assert by_window(rows) == by_window(expected)
    counted = [value for value in values_in(rows) if value["by"] == "key"]
    assert sorted(one for value in counted for one in value["values"]) == list(range(run.sent))


# --- all other kinds of windows -------------------------------------------------------------------------

MANY_KEYS = 8
Found = dict[tuple[str, str], list[tuple[Any, ...]]]
"""By kind of window and key: start, end, records, and whether it is withdrawn, of each result in order."""


class ManyRun(TimedRun):
    """A cluster with the job that has all other kinds of windows. It gets fewer records."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        super().__init__(brokers, prefix, directory, MANY_JOB, PARTITIONS)

    def key(self, number: int) -> str:
        return f"k{number % MANY_KEYS}"

    def send(self) -> None:
        """Write four more records."""
        for number in range(self.sent, self.sent + 4):
            self._produce(number, number, number % self.partitions)
        self.sent += 4

    def results(self) -> int:
        """How many results there are."""
        self.cluster.assert_alive()
        return sum(map(len, rows_on_kafka(self.brokers, self.output).values()))

    def found(self) -> Found:
        found: Found = {}
        for value in values_in(rows_on_kafka(self.brokers, self.output)):
            # Windows of all records have no key, and their values no order.
            key, values = value.get("key", ""), value["values"]
            result = value["start"], value["end"], values if key else sorted(values), value.get("withdrawn")
            assert (value["n"], value["total"]) == (len(values), sum(values))
            found.setdefault((value["by"], key), []).append(result)
        found["all", ""].sort()  # records without a key are spread over the partitions
        return found

    def expected(self, job: dict[str, Any]) -> Found:
        """What has to come of the records in the source, by a model that knows of event time only how far
        it came in the end.
        """
        parts = rows_on_kafka(self.brokers, self.source)
        now = min(rows[-1][2] for rows in parts.values())
        of_key: dict[str, Timed] = {}
        for rows in parts.values():
            for key, value, at, _headers in rows:
                of_key.setdefault((key or b"").decode(), []).append((at, int(value or b"")))
        found: Found = {}
        for key, timed in of_key.items():
            spans = cumulative(timed, job["SIZE_MS"], job["STEP_MS"]) | sliding_from(timed, job["WITHIN_MS"])
            for kind, start, end in sorted(spans, key=lambda span: span[2]):
                values = [value for at, value in timed if start <= at < end]
                if values and end <= now:
                    found.setdefault((kind, key), []).append((start, end, values, None))
            found["counted", key] = [
                (own[0][0], own[-1][0] + 1, [value for _, value in own], None)
                for begin in range(0, len(timed) - 2, 2)
                for own in [timed[begin : begin + 3]]
            ]
            kept = [(at, value) for at, value in timed if job["is_kept"](value)]
            found["session", key] = updates(kept, job["GAP_MS"])
        size = job["SIZE_MS"]
        everything = sorted((at // size * size, value) for timed in of_key.values() for at, value in timed)
        for start in sorted({start for start, _ in everything}):
            if start + size <= now:
                values = [value for own, value in everything if own == start]
                found.setdefault(("all", ""), []).append((start, start + size, values, None))
        return found


Timed = list[tuple[int, int]]
"""Times and values of records, in order."""
Spans = set[tuple[str, int, int]]
"""Kind, start and end of windows."""


def cumulative(timed: Timed, size: int, step: int) -> Spans:
    starts = {at // size * size for at, _ in timed}
    return {
        ("cumulative", start, end) for start in starts for end in range(start + step, start + size + 1, step)
    }


def sliding_from(timed: Timed, within: int) -> Spans:
    spans = {("sliding", at - within, at + 1) for at, _ in timed}
    return spans | {("sliding", at + 1, at + within + 2) for at, _ in timed}


def updates(timed: Timed, gap: int) -> list[tuple[Any, ...]]:
    """What a session passes on when records come in order."""
    found: list[tuple[Any, ...]] = []
    session: Timed = []
    for at, value in timed:
        if session and at - session[-1][0] <= gap:
            found.append((*found[-1][:3], True))
        else:
            session = []
        session = [*session, (at, value)]
        found.append((session[0][0], at + gap, [value for _, value in session], False))
    return found


@pytest.fixture
def many(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[ManyRun]:
    run = ManyRun(kafka, topic_prefix, tmp_path)
    with run.cluster:
        yield run


def test_all_kinds_of_windows_have_each_result_once_when_a_worker_is_killed(
    many: ManyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in many.environment.items():
        monkeypatch.setenv(name, value)
    many.cluster.start()
    with all_the_time(many.send):
        many.kill_amid(many.results, 500, 300, "windows close")
    many.let_time_pass()
    expected = many.expected(runpy.run_path(str(MANY_JOB)))
    assert {kind for kind, _key in expected} == {"cumulative", "sliding", "counted", "session", "all"}
    count = sum(map(len, expected.values()))
    wait_until(lambda: many.results() >= count, f"{count} results are written", 60, 0.5)
    assert many.found() == expected
