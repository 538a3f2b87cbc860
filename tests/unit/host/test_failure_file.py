"""How a child process reports to its supervisor why it failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fcluster.common.failures import Failure, FailureKind
from fcluster.host import failure_file
from fcluster.host.failure_file import FailureFile, take_from_environment, write_failure

SEVERAL_LINES = Failure(FailureKind.JOB, "job.py can't be loaded\n  job.py:3: boom()", "Correct it.")


def path_of(file: FailureFile) -> Path:
    return Path(file.environment[failure_file.VARIABLE])


def test_supervisor_reads_the_failure_unchanged() -> None:
    file = FailureFile()
    write_failure(path_of(file), SEVERAL_LINES)
    assert file.take() == SEVERAL_LINES
    assert not path_of(file).parent.exists()


@pytest.mark.parametrize("data", [None, b"", b'{"kind":"jo', b"[]", b'{"kind":"later","message":"m"}'])
def test_missing_incomplete_or_strange_file_is_not_a_failure(data: bytes | None) -> None:
    file = FailureFile()
    if data is not None:
        path_of(file).write_bytes(data)
    assert file.take() is None


def test_file_that_cannot_be_written_does_not_affect_the_process(tmp_path: Path) -> None:
    write_failure(tmp_path / "missing" / "failure.json", SEVERAL_LINES)


def test_file_belongs_to_one_process_and_not_to_those_that_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failure_file.VARIABLE, "/somewhere")
    assert take_from_environment() == Path("/somewhere")
    assert take_from_environment() is None


def test_command_that_fails_reports_to_its_supervisor_what_it_prints(tmp_path: Path) -> None:
    file = FailureFile()
    command = [sys.executable, "-m", "fcluster", "worker", str(tmp_path / "nosuch.py")]
    ran = subprocess.run(
        command, env={"PATH": "/usr/bin", **file.environment}, capture_output=True, text=True, check=False
    )
    told = file.take()
    assert ran.returncode == 1
    assert told is not None
    assert told.kind is FailureKind.JOB
    assert f"error: {told.message}\n" in ran.stderr
    assert f"remedy: {told.remedy}\n" in ran.stderr
