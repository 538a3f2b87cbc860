"""An epoch doesn't become slower unnoticed: it takes the recorded steps, and its processor time is compared
with a reference loop.

Each test runs `benchmarks/epochs.py` once in its own process, so that no threads, plugins or objects of other
tests are measured. Nothing depends on how long something takes by the clock. docs/performance.md says how to
read a failure.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness import REPOSITORY

pytestmark = pytest.mark.timeout(600)

ROUNDS = 5
PLANTED = 2.0


def guard(*more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.epochs", "--guard", "--rounds", str(ROUNDS), *more]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_epoch_takes_the_recorded_steps_and_is_not_25_percent_slower() -> None:
    done = guard()
    assert done.returncode == 0, done.stdout + done.stderr


def test_guard_catches_an_epoch_that_takes_twice_as_long() -> None:
    """Compared with the ratio of the same rounds without the slowdown, so the kind of machine doesn't
    matter."""
    done = guard("--plant", str(PLANTED))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "latency: an epoch takes" in done.stdout, done.stdout


def test_guard_catches_a_step_more() -> None:
    done = guard("--plant-step")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "tasks of the commit thread: 3, recorded 2" in done.stdout, done.stdout
