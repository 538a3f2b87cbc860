"""The engine doesn't become slower unnoticed: its processor time for a record, by that of a reference loop.

Each test is one run of `benchmarks/engine.py` in a process of its own, where no test's threads, plugins or
objects take part in what is measured. docs/performance.md says how to read a failure.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness import REPOSITORY

pytestmark = pytest.mark.timeout(600)

ROUNDS = 7
PLANTED = 1.32


def guard(*more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.engine", "--guard", "--rounds", str(ROUNDS), *more]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_engine_is_not_25_percent_slower_than_recorded() -> None:
    done = guard()
    assert done.returncode == 0, done.stdout + done.stderr


def test_guard_catches_a_planted_slowdown() -> None:
    """By the ratios of the same rounds without it, so that the machine's kind doesn't matter."""
    done = guard("--plant", str(PLANTED))
    assert done.returncode == 1, done.stdout + done.stderr
    for case in ("few keys", "many keys"):
        assert f"{case}: the engine takes" in done.stdout, done.stdout
