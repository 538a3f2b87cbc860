"""The parts of the embedded broker that need no Java. tests/integration has the rest."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.common.errors import DirectoryInUse
from fcluster.kafka import embedded as embedded_kafka
from fcluster.kafka import jars as kafka_jars
from fcluster.kafka.embedded import EmbeddedKafka, EmbeddedKafkaError, escape_property
from fcluster.kafka.ports import reserve_for_directory


def script(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


def only_on_path(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.delenv("JAVA_HOME", raising=False)


# --- Java and Maven ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "major"),
    [
        ('openjdk version "17.0.15" 2025-04-15', 17),
        ('java version "1.8.0_392"', 8),
        ('openjdk version "25" 2025-09-16', 25),
        ('Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nopenjdk version "21.0.1" 2023-10-17', 21),
        ("", None),
        ("The operation couldn't be completed. Unable to locate a Java Runtime.", None),
    ],
)
def test_java_version_is_read(output: str, major: int | None) -> None:
    assert kafka_jars.java_major(output) == major


def test_missing_java_is_reported_with_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_on_path(monkeypatch, tmp_path)
    with pytest.raises(EmbeddedKafkaError, match="needs Java 17 or newer: no java") as caught:
        EmbeddedKafka(tmp_path / "kafka").start()
    for way in ("Install Java 17 or newer and Maven", "--brokers HOST:PORT", "compose.yaml"):
        assert way in caught.value.remedy


def test_java_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin", "java", "echo 'openjdk version \"11.0.2\"' >&2")
    only_on_path(monkeypatch, tmp_path / "bin")
    with pytest.raises(EmbeddedKafkaError, match=r"bin/java is version 11\n"):
        kafka_jars.find_java()


def test_java_that_does_not_work_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin", "java", "echo 'version \"17\"'; exit 1")
    only_on_path(monkeypatch, tmp_path / "bin")
    with pytest.raises(EmbeddedKafkaError, match="bin/java is no working Java"):
        kafka_jars.find_java()


def test_new_java_on_the_path_is_preferred_to_an_old_java_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    script(tmp_path / "home" / "bin", "java", "echo 'version \"1.8.0\"'")
    script(tmp_path / "new", "java", "echo 'version \"21\"'")
    only_on_path(monkeypatch, tmp_path / "new")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    assert kafka_jars.find_java() == tmp_path / "new" / "java"


def test_missing_maven_is_reported_with_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_on_path(monkeypatch, tmp_path)
    with pytest.raises(EmbeddedKafkaError, match="no mvn on the PATH") as caught:
        kafka_jars.resolve_jars(print, tmp_path / "cache")
    assert "--brokers HOST:PORT" in caught.value.remedy
    assert not (tmp_path / "cache").exists()


MAVEN_THAT_WORKS = """
for argument in "$@"; do case $argument in -DoutputDirectory=*) target=${argument#*=};; esac; done
/bin/mkdir -p "$target"; echo jar > "$target/kafka_2.13-4.3.1.jar"; echo other > "$target/other.jar"
"""


def test_jars_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin", "mvn", MAVEN_THAT_WORKS)
    only_on_path(monkeypatch, tmp_path / "bin")
    said: list[str] = []
    jars = kafka_jars.resolve_jars(said.append, tmp_path / "cache")
    assert sorted(path.name for path in jars.glob("*.jar")) == ["kafka_2.13-4.3.1.jar", "other.jar"]
    assert len(said) == 1
    (tmp_path / "bin" / "mvn").unlink()
    assert kafka_jars.resolve_jars(said.append, tmp_path / "cache") == jars
    assert len(said) == 1


def test_jar_lost_from_the_cache_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin", "mvn", MAVEN_THAT_WORKS)
    only_on_path(monkeypatch, tmp_path / "bin")
    jars = kafka_jars.resolve_jars(print, tmp_path / "cache")
    (jars / "other.jar").unlink()
    kafka_jars.resolve_jars(print, tmp_path / "cache")
    assert (jars / "other.jar").read_text() == "other\n"


def test_failing_maven_leaves_nothing_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = f"{MAVEN_THAT_WORKS}\necho '[INFO] so far so good'; echo '[ERROR] no route to the mirror'; exit 1"
    script(tmp_path / "bin", "mvn", fails)
    only_on_path(monkeypatch, tmp_path / "bin")
    with pytest.raises(EmbeddedKafkaError, match=r"exit code 1\): \[ERROR\] no route to the mirror"):
        kafka_jars.resolve_jars(print, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_fetch_interrupted_by_ctrl_c_leaves_no_maven_and_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    lines = "echo Downloaded from mirror\n" * 25
    script(tmp_path / "bin", "mvn", f"echo $$ > {pid_file}\n{lines}exec /bin/sleep 600")
    only_on_path(monkeypatch, tmp_path / "bin")

    def break_off(line: str) -> None:
        if "files" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kafka_jars.resolve_jars(break_off, tmp_path / "cache")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    # The watchdog ends as soon as it is cancelled. If it was left, it would keep Python from ending for
    # minutes.
    deadline = time.monotonic() + 20
    while any(isinstance(thread, threading.Timer) for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not any((tmp_path / "cache").glob(".*"))


def test_leftovers_of_a_killed_fetch_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin", "mvn", MAVEN_THAT_WORKS)
    only_on_path(monkeypatch, tmp_path / "bin")
    cache = tmp_path / "cache"
    rest = cache / f".{kafka_jars.jars_dir(cache).name}.abc" / "jars"
    rest.mkdir(parents=True)
    jars = kafka_jars.resolve_jars(print, cache)
    assert {path.name for path in cache.iterdir()} == {jars.name, f"{jars.name}.lock"}


# --- directories -------------------------------------------------------------------------------------


def test_status_of_an_unused_directory_is_stopped_and_does_not_change_it(tmp_path: Path) -> None:
    found = embedded_kafka.status(tmp_path / "none")
    assert (found.state, found.bootstrap_servers, found.pid) == ("stopped", "", 0)
    assert not (tmp_path / "none").exists()


def test_stop_without_a_broker_does_nothing(tmp_path: Path) -> None:
    assert embedded_kafka.stop_detached(tmp_path) is False
    EmbeddedKafka(tmp_path).stop()
    assert list(tmp_path.iterdir()) == []


def test_data_directory_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedKafkaError, match=r"cannot use .*/file as .*: File exists") as caught:
        EmbeddedKafka(tmp_path / "file").start()
    assert "--data-dir" in caught.value.remedy


def test_data_directory_with_a_comma_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedKafkaError, match="a comma for a separator"):
        EmbeddedKafka(tmp_path / "a,b").start()


def test_directory_of_another_process_broker_is_refused(tmp_path: Path) -> None:
    launch = {"port": 1, "controller_port": 2, "detached": False, "owner_pid": 4711, "kafka_version": "4.3.1"}
    (tmp_path / "broker.json").write_text(json.dumps(launch))
    (tmp_path / "broker.pid").write_text("4712\n")
    lock = embedded_kafka._lock_directory(tmp_path)
    assert lock is not None
    with lock:
        for use in (EmbeddedKafka(tmp_path).start, lambda: embedded_kafka.stop_detached(tmp_path)):
            with pytest.raises(DirectoryInUse, match=r"process 4712, .* belongs to process 4711") as caught:
                use()
            assert "127.0.0.1:1" in caught.value.remedy
        assert embedded_kafka.status(tmp_path).state == "starting"


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([], ""),
        (["", "Error: no such class", " "], "Error: no such class"),
        (
            ["12:00 ERROR Kafka$ Exiting", "java.io.IOException: disk", "\tat x", "12:01 INFO bye"],
            "Kafka$ Exiting: java.io.IOException: disk",
        ),
        (["12:00 ERROR one", "12:00 ERROR two", "12:01 INFO bye"], "two"),
    ],
)
def test_cause_is_found_in_a_log(lines: list[str], cause: str) -> None:
    assert embedded_kafka.last_error(lines) == cause


# --- ports and properties ----------------------------------------------------------------------------


def test_two_free_ports_are_chosen_depending_on_the_directory(tmp_path: Path) -> None:
    ports = embedded_kafka._choose_ports(tmp_path)
    assert len(set(ports)) == 2
    assert all(20_000 <= port < 30_000 for port in ports)
    assert ports != embedded_kafka._choose_ports(tmp_path / "other")


def test_ports_of_the_last_run_are_kept_unless_taken(tmp_path: Path) -> None:
    ports = tuple(reserve_for_directory(tmp_path, 2))
    launch = embedded_kafka._Launch(*ports, False, os.getpid(), "4.3.1")
    (tmp_path / "broker.json").write_bytes(embedded_kafka.msgspec.json.encode(launch))
    assert embedded_kafka._choose_ports(tmp_path) == ports
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", ports[0]))
        holder.listen()
        assert ports[0] not in embedded_kafka._choose_ports(tmp_path)


def test_damaged_launch_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "broker.json").write_text('{"port": "x"')
    assert embedded_kafka._read_launch(tmp_path) is None
    assert len(embedded_kafka._choose_ports(tmp_path)) == 2


def test_broker_settings_fit_a_single_broker(tmp_path: Path) -> None:
    settings = embedded_kafka.server_properties(embedded_kafka._Launch(1, 2, False, 3, "4.3.1"), tmp_path)
    assert settings["auto.create.topics.enable"] == "false"
    replication = {name: value for name, value in settings.items() if "replication.factor" in name}
    assert len(replication) == 4
    assert set(replication.values()) == {"1"}
    assert settings["log.retention.ms"] == "-1"


def unescape(text: str) -> str:
    """The value that java.util.Properties reads, for the escapes that we use."""
    units: list[int] = []
    position = 0
    while position < len(text):
        if text[position] != "\\":
            units.append(ord(text[position]))
            position += 1
        elif text[position + 1] == "u":
            units.append(int(text[position + 2 : position + 6], 16))
            position += 6
        else:
            units.append(ord(text[position + 1]))
            position += 2
    return b"".join(unit.to_bytes(2, "big") for unit in units).decode("utf-16-be")


@given(st.text(max_size=30))
def test_property_survives_java(value: str) -> None:
    escaped = escape_property(value)
    assert escaped.isascii()
    assert escaped.isprintable()
    assert not escaped.startswith(" ")
    assert unescape(escaped) == value


def test_cluster_id_is_never_parsed_as_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([b"\xf8" * 16, b"\x00" * 16])  # the first encodes to a leading dash

    class Drawn:
        @property
        def bytes(self) -> bytes:
            return next(drawn)

    monkeypatch.setattr(embedded_kafka.uuid, "uuid4", Drawn)
    assert embedded_kafka.new_cluster_id() == "A" * 22
