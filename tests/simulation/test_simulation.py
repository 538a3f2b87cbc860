"""Many seeds find nothing, a seed always plays in the same way, and a failing seed can be played again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.simulation.__main__ import main, play, replay_command
from tests.simulation.job_mix import (
    BOUNDED_INTERVALS_SEEDS_FROM,
    BOUNDED_SEEDS_FROM,
    CLOCK_KINDS_SEEDS_FROM,
    CLOCK_SEEDS_FROM,
    INTERVALS_SEEDS_FROM,
)
from tests.simulation.run import run

SEEDS = 2000
BOUNDED_SEEDS = 400
BOUNDED_INTERVALS_SEEDS = 28
CLOCK_SEEDS = 60
CLOCK_KINDS_SEEDS = 24
INTERVALS_SEEDS = 42
ROOT = Path(__file__).parents[2]

MUST_LAND = (
    "crash of a worker",
    "crash of all workers",
    "crash at worker: committed, before apply",
    "crash at worker: complete, before commit",
    "crash at worker: delta flushed",
    "crash at worker: layers frozen",
    "crash at worker: offsets sent",
    "crash at coordinator: between two effects",
    "crash at coordinator: before a journal write",
    "crash at coordinator: after a journal write",
    "stop at worker: complete, before commit",
    "worker stopped",
    "main thread hangs",
    "connection broken",
    "frame twice",
    "worker cut from coordinator",
    "worker cut from coordinator, one way",
    "cut from Kafka",
    "Kafka away",
    "request lost: commit",
    "answer lost: commit",
    "request late: commit",
    "coordinator: crash",
    "coordinator: stop and second",
    "coordinator: deposed alive",
    "worker added",
    "worker asked to leave",
    "worker asked to leave twice",
    "worker drained by an operator",
    "worker restarted in good order",
    "disk lost",
    "disk full",
    "snapshot damaged",
    "snapshot damaged on its way",
    "restore from snapshot",
    "restore from local files",
    "restore from nothing",
    "changelog truncated",
    "copy from snapshot",
    "copy from local files",
    "copy from nothing",
    "shard taken over warm",
    "input aborted",
    "input idle",
    "timer fired by the wall clock",
    "timers left to the next epoch",
    "late record",
    "window closed",
    "window closed later",
    "crash at worker: timers fired",
    "stop at worker: timers fired",
    "broker killed",
    "broker stands still",
    "leadership moved",
    "all leaderships moved",
    "stale metadata",
    "request without a leader",
    "request hangs at a broker",
    "leader moved while a request was on its way",
    "not known: committed",
    "group coordinator cut off",
    "old answer of a group coordinator",
    "not known: ends",
    "request refused: produce",
    "request refused: delta",
    "request refused: offsets",
    "epochs aborted in their session",
)
"""Each of these has to happen in some seed. Otherwise the run proves less than it seems to."""


@pytest.mark.timeout(600)
def test_two_thousand_seeds_are_safe_and_end() -> None:
    landed, failures, commits = Counter[str](), list[str](), 0
    for result in play(0, SEEDS):
        landed += result.landed
        commits += result.commits
        if result.failure:
            failures.append(f"{result.failure}\n  {replay_command(result.seed)}")
    assert not failures, f"{len(failures)} seeds failed:\n" + "\n".join(failures[:10])
    assert [fault for fault in MUST_LAND if not landed[fault]] == []
    assert commits > 10 * SEEDS


def landed_in(first: int, count: int) -> Counter[str]:
    """What has happened in so many seeds. None of them has failed."""
    landed: Counter[str] = Counter()
    for seed in range(first, first + count):
        result = run(seed)
        assert not result.failure, f"seed {seed}: {result.failure}"
        landed += result.landed
    return landed


def fingerprint(seed: int) -> str:
    """A hash of the seed's transcript."""
    return hashlib.sha256("\n".join(run(seed, recording=True).transcript).encode()).hexdigest()


STORY = """
import sys
from tests.simulation.test_simulation import fingerprint
print(fingerprint(int(sys.argv[1])))
"""


def test_bounded_runs_are_safe_and_end() -> None:
    landed: Counter[str] = Counter()
    for first, count in (
        (BOUNDED_SEEDS_FROM, BOUNDED_SEEDS),
        (BOUNDED_INTERVALS_SEEDS_FROM, BOUNDED_INTERVALS_SEEDS),
    ):
        landed += landed_in(first, count)
    assert landed["run came to its end"] == BOUNDED_SEEDS + BOUNDED_INTERVALS_SEEDS
    assert landed["crash of a worker"]
    assert landed["result at an interval"]


@pytest.mark.timeout(300)
def test_windows_in_processing_time_are_safe_and_close() -> None:
    for first, count in ((CLOCK_SEEDS_FROM, CLOCK_SEEDS), (CLOCK_KINDS_SEEDS_FROM, CLOCK_KINDS_SEEDS)):
        landed = landed_in(first, count)
        assert landed["crash of a worker"]
        assert landed["crash at worker: timers fired"]


@pytest.mark.timeout(300)
def test_results_at_intervals_are_those_of_the_models() -> None:
    landed = landed_in(INTERVALS_SEEDS_FROM, INTERVALS_SEEDS)
    assert landed["crash of a worker"]
    assert landed["crash at worker: timers fired"]
    assert landed["result at an interval"] > 10 * INTERVALS_SEEDS
    assert landed["window closed later"]
    assert landed["timers left to the next epoch"]


@pytest.mark.parametrize("seed", [3, 16])
def test_same_seed_gives_the_same_transcript_in_every_process(seed: int) -> None:
    stories = {fingerprint(seed), fingerprint(seed)}
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        told = subprocess.run(
            [sys.executable, "-c", STORY, str(seed)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            check=True,
        )
        stories.add(told.stdout.decode().strip())
    assert len(stories) == 1


def test_recording_changes_nothing() -> None:
    plain, recorded = run(16), run(16, recording=True)
    assert not plain.transcript
    assert len(recorded.transcript) > 100
    assert (plain.landed, plain.commits, plain.events) == (recorded.landed, recorded.commits, recorded.events)


def test_failing_seed_is_played_again_by_the_command_that_it_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--seed", "0", "--mutation", "commit before complete", "--verbose"]) == 1
    shown = capsys.readouterr().out
    assert "Barrier(" in shown
    assert "VIOLATION: " in shown
    assert "which was never declared complete" in shown.splitlines()[-1]
    assert main(["--find", "commit before complete", "--seeds", "20"]) == 0
    found = capsys.readouterr().out
    assert '--mutation "commit before complete" --verbose' in found
