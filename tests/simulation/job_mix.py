"""Which job of the simulation a seed plays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Literal

from tests.simulation.clock_job import clock_job, clock_kinds_job
from tests.simulation.interval_jobs import INTERVALS_JOBS
from tests.simulation.jobs import (
    MAX_DRIFT_MS,
    SimJob,
    counting_job,
    drifting_job,
    kinds_job,
    merged_windows_job,
    sessions_job,
    timers_job,
    tumbling_job,
    updates_job,
)
from tests.simulation.more_jobs import running_job, sliding_job, tables_job

SEEDS_OF_A_JOB = 1_000_000
MERGED_SEEDS_FROM = SEEDS_OF_A_JOB
KINDS_SEEDS_FROM = 2 * SEEDS_OF_A_JOB
TIMED_SEEDS_FROM = 3 * SEEDS_OF_A_JOB
TIMERS_SEEDS_FROM = 4 * SEEDS_OF_A_JOB
WINDOWS_SEEDS_FROM = 5 * SEEDS_OF_A_JOB
SLIDING_SEEDS_FROM = 6 * SEEDS_OF_A_JOB
CLOCK_SEEDS_FROM = 6 * SEEDS_OF_A_JOB + SEEDS_OF_A_JOB // 2
CLOCK_KINDS_SEEDS_FROM = 6 * SEEDS_OF_A_JOB + SEEDS_OF_A_JOB * 3 // 4
TABLES_SEEDS_FROM = 7 * SEEDS_OF_A_JOB
RUNNING_SEEDS_FROM = 7 * SEEDS_OF_A_JOB + SEEDS_OF_A_JOB // 2
BOUNDED_SEEDS_FROM = 8 * SEEDS_OF_A_JOB
BOUNDED_INTERVALS_SEEDS_FROM = 8 * SEEDS_OF_A_JOB + SEEDS_OF_A_JOB // 2
DRIFT_SEEDS_FROM = 9 * SEEDS_OF_A_JOB
INTERVALS_SEEDS_FROM = 10 * SEEDS_OF_A_JOB
"""Seeds from these numbers on play: the merged job, the one with declared states, the first job with event
time, the one with timers, those with windows, the one with further kinds of windows, the two with windows in
processing time, the one with tables, and the one with running aggregates; bounded runs of some of them, and
of those with results at intervals; jobs in which partitions wait for each other, and those with results at
intervals.
"""
WindowsJob = Literal["tumbling", "sessions", "updates", "merged"]
_WINDOWS_JOBS: dict[WindowsJob, Callable[[], SimJob]] = {
    "tumbling": tumbling_job,
    "sessions": sessions_job,
    "updates": updates_job,
    "merged": merged_windows_job,
}
"""The jobs with windows. Chance, which depends on the seed, chooses one of them."""
_BOUNDED_JOBS: tuple[Callable[[], SimJob], ...] = (
    tumbling_job,
    sessions_job,
    lambda: counting_job(merged=True),
    updates_job,
    lambda: counting_job(merged=False, timed=True),
)
"""The jobs that bounded runs play. Their models know what is left to come at the end."""
_BOUNDED_INTERVALS_JOBS = (*INTERVALS_JOBS, lambda: clock_kinds_job(bounded=True))
_SEEDS_FROM = (
    0,
    TABLES_SEEDS_FROM,
    MERGED_SEEDS_FROM,
    KINDS_SEEDS_FROM,
    TIMED_SEEDS_FROM,
    TIMERS_SEEDS_FROM,
    WINDOWS_SEEDS_FROM,
    SLIDING_SEEDS_FROM,
    RUNNING_SEEDS_FROM,
)


def seeds(first: int, count: int) -> Iterator[int]:
    """Seeds from this number on, of all jobs alike. Bounded runs, the jobs with windows in processing time,
    those whose partitions wait for each other, and those with results at intervals, have seeds of their own.
    """
    for number in range(first, first + count):
        # Settings and brokers depend on the last digits of a seed. Each job has to play with all of them.
        yield number + _SEEDS_FROM[number // 4 % len(_SEEDS_FROM)]


def job_of(seed: int) -> SimJob:
    """The job that a seed plays."""
    if seed >= INTERVALS_SEEDS_FROM:
        return INTERVALS_JOBS[seed % len(INTERVALS_JOBS)]()
    if seed >= DRIFT_SEEDS_FROM:
        return drifting_job() if seed % 2 == 0 else merged_windows_job(max_drift_ms=MAX_DRIFT_MS)
    if seed >= BOUNDED_INTERVALS_SEEDS_FROM:
        return _BOUNDED_INTERVALS_JOBS[seed % len(_BOUNDED_INTERVALS_JOBS)]()
    if seed >= BOUNDED_SEEDS_FROM:
        return _BOUNDED_JOBS[seed % len(_BOUNDED_JOBS)]()
    if seed >= RUNNING_SEEDS_FROM:
        return running_job()
    if seed >= TABLES_SEEDS_FROM:
        return tables_job()
    if seed >= CLOCK_KINDS_SEEDS_FROM:
        return clock_kinds_job()
    if seed >= CLOCK_SEEDS_FROM:
        return clock_job()
    if seed >= SLIDING_SEEDS_FROM:
        return sliding_job()
    if seed >= WINDOWS_SEEDS_FROM:
        return _WINDOWS_JOBS[Random(f"windows {seed}").choice(tuple(_WINDOWS_JOBS))]()
    if seed >= TIMERS_SEEDS_FROM:
        return timers_job(behind=seed % 2 == 0)
    if seed >= TIMED_SEEDS_FROM:
        return counting_job(merged=False, timed=True)
    if seed >= KINDS_SEEDS_FROM:
        return kinds_job()
    return counting_job(merged=seed >= MERGED_SEEDS_FROM)
