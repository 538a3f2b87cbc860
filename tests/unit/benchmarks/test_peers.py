"""Peers: who can't be had is left out, with the reason. Nothing is fetched here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import peers, suite
from benchmarks.lanes import Fcluster, PyFlink

SOURCES = Path(peers.__file__).parent


@pytest.mark.parametrize("peer", suite.PEERS)
def test_a_peer_that_cannot_be_fetched_is_left_out_with_the_reason(
    peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(command: list[str], otherwise: str) -> None:
        raise peers.NoPeerError(f"{otherwise}: no network")

    monkeypatch.setenv("FCLUSTER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(peers, "_run", refuse)
    monkeypatch.setattr(peers.shutil, "which", lambda name: f"/usr/bin/{name}")
    lanes = suite.lanes_of(suite.new_parser().parse_args(["--peer", peer]))
    assert [type(lane) for lane in lanes.jobs] == [Fcluster]
    assert len(lanes.failures) == 1
    assert re.match(rf"without {peer}: .*: no network$", lanes.failures[0])


@pytest.mark.parametrize("missing", ["mvn", "javac"])
def test_java_s_peers_say_which_tool_they_lack(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FCLUSTER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(peers, "_environment_with", lambda requirement: tmp_path / requirement)
    monkeypatch.setattr(peers.shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")
    for resolve in (peers.resolve, peers.resolve_flink):
        with pytest.raises(peers.NoPeerError, match=f"no {missing} on the PATH"):
            resolve()


def test_pyflink_is_a_lane_with_its_version_mode_and_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    flink = peers.Flink(Path("python"), Path("jars"))
    monkeypatch.setattr(peers, "resolve_flink", lambda: flink)
    arguments = suite.new_parser().parse_args(
        ["--peer", "pyflink", "--flink-mode", "process", "--flink-heap-mb", "300"]
    )
    assert suite.lanes_of(arguments).jobs[1:] == [PyFlink(flink, "process", 300)]
    assert suite.versions_of(arguments)["PyFlink"] == peers.FLINK.partition("==")[2]


def test_flink_s_connector_is_for_the_flink_that_is_installed() -> None:
    pom = (SOURCES / "pyflink" / "pom.xml").read_text()
    connector = re.search(r"<connector\.version>.*-(.*)</connector\.version>", pom)
    assert connector is not None
    assert peers.FLINK.startswith(f"apache-flink=={connector[1]}.")


@pytest.mark.parametrize("name", ["quix_streams", "pyflink"])
def test_the_programs_of_peers_can_be_compiled(name: str) -> None:
    path = SOURCES / name / "running_totals.py"
    compile(path.read_text(), str(path), "exec")
