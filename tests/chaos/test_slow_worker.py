"""One worker that is ten times slower than the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.chaos.runner import LONG, SETTINGS, Chaos
from tests.chaos.tally import WORKER_SLOWED
from tests.checker.live import LiveReader, percentile
from tests.checker.reading import READ_COMMITTED
from tests.harness import wait_until

pytestmark = pytest.mark.timeout(300)

SLOW = "worker-0"
TIMES = 10
TURN_S = 0.4
"""The length of a turn, of which the worker is stopped for nine tenths. That is longer than others wait for
it
(`STRAGGLER_MS`), however much it does in the last tenth, and shorter than a session lasts without
heartbeats."""
STRAGGLERS_SEEN = 5
WATCHED_S = 60.0 if LONG else 10.0
STRAGGLER_MS = 100.0
"""`checkpoint.straggler.ms`: an epoch waits at most this much longer for a straggler."""


def shards_of(run: Chaos, slot: int) -> set[int]:
    """The source partitions of this slot."""
    status = run.cluster.status()
    assert status is not None
    return {shard["partition"] for shard in status["shards"] if shard["slot"] == slot}


def stragglers_of(run: Chaos) -> int:
    """How often an epoch was declared complete without one of its workers."""
    status = run.cluster.status()
    assert status is not None
    return status["counters"]["stragglers"]


def latencies_ms(reader: LiveReader, partitions: set[int], begin_ns: int, end_ns: int) -> list[float]:
    """The latencies of the records of these source partitions that were produced in that time."""
    return [
        (seen_ns - row.produced_at_ns) / 1e6
        for row, seen_ns in reader.timed_rows()
        if row.partition in partitions and begin_ns <= row.produced_at_ns < end_ns
    ]


def test_one_slow_worker_does_not_slow_the_others(
    chaos: Callable[..., AbstractContextManager[Chaos]],
) -> None:
    still_ms = TURN_S * 1000 * (1 - 1 / TIMES)
    assert 2 * STRAGGLER_MS < still_ms < float(str(SETTINGS["session.timeout.ms"])) / 2
    # The default interval of epochs, because their latency is measured.
    settings = {"commit.interval.min.ms": 10}
    with chaos("one worker ten times slower", rate=600.0, settings=settings) as run:
        mine = shards_of(run, 0)
        others = set(range(8)) - mine
        assert mine
        assert others
        pids = run.cluster.pids()
        before_ns = time.time_ns()
        time.sleep(WATCHED_S / 2)  # for comparison, in the same run
        slow_ns = time.time_ns()
        stragglers = stragglers_of(run)
        with run.cluster.slowed(SLOW, times=TIMES, period_s=TURN_S):
            time.sleep(WATCHED_S)
            wait_until(
                lambda: stragglers_of(run) - stragglers >= STRAGGLERS_SEEN, "epochs that didn't wait for it"
            )
        healed_ns = time.time_ns()
        run.await_flow()
        assert run.cluster.pids() == pids
        assert shards_of(run, 0) == mine, "the slow worker lost shards, although it wasn't dead"
        shown = f"{stragglers_of(run) - stragglers} epochs of others didn't wait for it"
        run.note(WORKER_SLOWED, f"{SLOW} ran a tenth of the time for {WATCHED_S} s", slow_ns, shown=shown)
        reader = run.readers[READ_COMMITTED]
        wait_until(lambda: min(reader.newest_ns().values()) > healed_ns, "all is read", 30)
        normal = latencies_ms(reader, others, before_ns, slow_ns)
        slowed = latencies_ms(reader, others, slow_ns, healed_ns)
        own = latencies_ms(reader, mine, slow_ns, healed_ns)
        for name, values in (("others before", normal), ("others meanwhile", slowed), ("its own", own)):
            print(f"{name}: p50 {percentile(values, 0.5):.0f} ms, p95 {percentile(values, 0.95):.0f} ms")
        for share in (0.5, 0.95):
            bound_ms = 2 * percentile(normal, share) + 2 * STRAGGLER_MS
            assert percentile(slowed, share) < bound_ms
