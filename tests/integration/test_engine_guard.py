"""The engine doesn't become slower unnoticed. Its processor time per record is compared with a reference
loop.

Each test runs `benchmarks/engine.py` once in its own process, so that no threads, plugins or objects of other
tests are measured. docs/performance.md says how to read a failure.
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
    """Compared with the ratios of the same rounds without the slowdown, so the kind of machine doesn't
    matter."""
    done = guard("--plant", str(PLANTED))
    assert done.returncode == 1, done.stdout + done.stderr
    for case in ("few keys", "many keys"):
        assert f"{case}: the engine takes" in done.stdout, done.stdout
