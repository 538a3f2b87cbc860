"""Ports stay with their owner."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcluster.kafka import ports
from tests.harness import REPOSITORY


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A separate registry. Its ports are released afterwards."""
    held: list[int] = []
    monkeypatch.setenv("FCLUSTER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ports, "_held", held)
    yield
    for descriptor in held:
        os.close(descriptor)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> range:
    """Restricts the choice to this many ports, none of them in the system's ephemeral range."""
    found = next(
        range(first, first + 4)
        for first in range(31_000, 32_000, 4)
        if all(ports.is_free(port) for port in range(first, first + 4))
    )
    monkeypatch.setattr(ports, "BROKER_PORTS", found)
    monkeypatch.setattr(ports, "PROCESS_PORTS", found)
    return found


def directory(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_port_of_a_stopped_broker_is_not_given_to_another(tmp_path: Path, few: range) -> None:
    """Nobody listens on these ports, but they belong to the first directory as long as it exists."""
    mine, other = directory(tmp_path, "mine"), directory(tmp_path, "other")
    first = ports.reserve_for_directory(mine, 2)
    second = ports.reserve_for_directory(other, 2)
    assert sorted(first + second) == list(few)
    assert ports.reserve_for_directory(mine, 2, first) == first
    assert ports.reserve_for_directory(other, 2, second) == second
    other.rmdir()
    assert ports.reserve_for_process() in second


def test_reserved_port_is_refused_to_a_broker_that_once_had_it(tmp_path: Path, few: range) -> None:
    mine, other = directory(tmp_path, "mine"), directory(tmp_path, "other")
    first = ports.reserve_for_directory(mine, 2)
    assert not set(ports.reserve_for_directory(other, 2, first)) & set(first)


def test_directory_that_gets_other_ports_releases_the_old_ones(tmp_path: Path, few: range) -> None:
    mine, other = directory(tmp_path, "mine"), directory(tmp_path, "other")
    first = ports.reserve_for_directory(mine, 2)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", first[0]))
        stranger.listen()
        second = ports.reserve_for_directory(mine, 2, first)
        assert first[0] not in second
    assert len(ports.reserve_for_directory(other, 2)) == 2


def test_port_of_a_process_is_its_own_until_it_ends(tmp_path: Path, few: range) -> None:
    program = (
        "from fcluster.kafka import ports; import sys\n"
        f"ports.PROCESS_PORTS = range({few[0]}, {few[-1] + 1})\n"
        "print(ports.reserve_for_process(), flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY
    ) as other:
        assert other.stdout is not None
        theirs = int(other.stdout.readline())
        mine = {ports.reserve_for_process() for _ in range(3)}
        assert len(mine) == 3
        assert theirs not in mine
        other.kill()  # however it ends, its port is free again
        other.wait()
        assert ports.reserve_for_process() == theirs


def test_too_few_free_ports_are_reported(tmp_path: Path, few: range) -> None:
    with pytest.raises(ports.NoFreePort, match=f"fewer than 5 ports between {few[0]} and {few[-1]}"):
        ports.reserve_for_directory(tmp_path, 5)


def test_reserved_ports_are_used_if_no_others_are_left(tmp_path: Path, few: range) -> None:
    ports.reserve_for_directory(directory(tmp_path, "mine"), 4)
    assert ports.reserve_for_process() in few


def test_ephemeral_ports_are_the_last_choice(
    tmp_path: Path, few: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "ephemeral_ports", lambda: range(few[0], few[2]))
    assert set(ports.reserve_for_directory(tmp_path, 2)) == set(few[2:])
    assert len(ports.reserve_for_directory(tmp_path, 3)) == 3


def test_ephemeral_range_is_read_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "range"
    told.write_text("1024\t2000\n")
    monkeypatch.setattr(ports, "_EPHEMERAL_RANGE_FILE", told)
    assert ports.ephemeral_ports() == range(1024, 2001)
    monkeypatch.setattr(ports, "_EPHEMERAL_RANGE_FILE", tmp_path / "none")
    assert ports.ephemeral_ports() == range(32_768, 65_536)


def test_free_ports_are_chosen_even_if_the_registry_cannot_be_written(
    tmp_path: Path, few: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FCLUSTER_CACHE_DIR", str(tmp_path / "file"))
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", few[0]))
        stranger.listen()
        assert sorted(ports.reserve_for_directory(tmp_path, 3)) == list(few[1:])
        assert ports.reserve_for_process() in few[1:]


def test_port_is_taken_by_a_server_on_any_address(few: range) -> None:
    with socket.socket() as stranger:
        stranger.bind(("", few[0]))
        stranger.listen()
        assert not ports.is_free(few[0])
    assert ports.is_free(few[0])


def test_no_other_code_chooses_a_port_without_holding_it() -> None:
    """A port that was free a moment ago may belong to another program when somebody connects to it."""
    choosing = re.compile(r"\.bind\(\(.*, 0\)\)")
    found = [
        f"{path.relative_to(REPOSITORY)}: {line.strip()}"
        for directory in ("fcluster", "tests", "benchmarks", "examples")
        for path in (REPOSITORY / directory).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if choosing.search(line) and path != Path(__file__)
    ]
    # This one listens on the port while others ask for it.
    assert found == ['tests/unit/wire/test_addresses.py: listening.bind(("127.0.0.1", 0))']
