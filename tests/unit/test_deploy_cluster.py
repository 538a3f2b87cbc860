"""The files under deploy/ that run a cluster: what can be checked without a container engine, cluster or
root.

Each file is checked with its own schema or tool (compose specification, Kubernetes' schemas, kustomize,
systemd), and all of them with fcluster itself: every setting resolves, every command parses, grace periods
are longer than an epoch. A test is skipped if its tool is missing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml
from honcho.environ import parse_procfile

from fcluster.cli.main import commands
from fcluster.common.exit_codes import ExitCode
from fcluster.common.settings import Settings, parse_duration_ms, resolve
from fcluster.kafka.jars import kafka_version
from fcluster.wire.http_port import Verdict, health_port, split_address

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
MANIFESTS = sorted(path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.stem != "kustomization")
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
KUBERNETES_VERSIONS = ("1.33.0", "1.37.0")
"""From the oldest version whose pods always have their ordinal as a label, to the newest."""
GIVEN = {
    "POD_IP": "10.0.0.7",
    "SLOT": "3",
    "JOB_FILE": "/job/flights.py",
    "JOB_NAME": "carrier-delays",
}


def settings_of(environment: Mapping[str, Any]) -> Settings:
    """The settings in an environment, as fcluster reads them. Fails on an unknown name."""
    assert [name for name, value in environment.items() if not isinstance(value, str)] == []
    return resolve({}, None, dict(environment), {})


def parse(arguments: list[str]) -> click.Context:
    """Parse the command line as fcluster does, without running it."""
    with click.Context(commands) as parent:
        command = commands.get_command(parent, arguments[0])
        assert command is not None, f"there is no command {arguments[0]!r}"
        return command.make_context(arguments[0], arguments[1:], parent=parent)


class Answers:
    """A process with an HTTP port, as probes see it."""

    def __init__(self) -> None:
        self.ready_verdict = Verdict(True, "ready")

    def live(self) -> Verdict:
        return Verdict(True, "live")

    def ready(self) -> Verdict:
        return self.ready_verdict

    def status(self) -> Mapping[str, Any]:
        return {}


# --- compose ----------------------------------------------------------------------------------------------


def interpolated(value: Any) -> Any:
    """Replace variables in values, like compose does after it has read the file. None is set here."""
    if isinstance(value, dict):
        return {key: interpolated(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [interpolated(inner) for inner in value]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return interpolated(yaml.safe_load((DEPLOY / "compose-cluster.yaml").read_text()))


@pytest.mark.parametrize("name", ["compose.yaml", "compose-cluster.yaml"])
def test_compose_file_matches_the_compose_specification(name: str) -> None:
    tool = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*tool, str(DEPLOY / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_cluster_has_three_brokers_two_coordinators_and_workers(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert [name for name in services if name.startswith("kafka")] == ["kafka-1", "kafka-2", "kafka-3"]
    assert [name for name in services if name.startswith("coord")] == ["coordinator-1", "coordinator-2"]
    assert services["worker"]["deploy"]["replicas"] == 4
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        volumes = [volume.partition(":")[0] for volume in service["volumes"]]
        assert {volume for volume in volumes if not volume.startswith(".")} <= set(compose["volumes"]), name


def test_compose_brokers_agree_with_each_other_and_tolerate_the_loss_of_one(compose: dict[str, Any]) -> None:
    brokers = {name: s for name, s in compose["services"].items() if name.startswith("kafka")}
    ids = {service["environment"]["KAFKA_NODE_ID"] for service in brokers.values()}
    assert ids == {"1", "2", "3"}
    for name, service in brokers.items():
        environment = service["environment"]
        assert service["image"] == f"apache/kafka:{kafka_version()}"
        assert [key for key, value in environment.items() if not isinstance(value, str)] == []
        number = environment["KAFKA_NODE_ID"]
        assert f"{number}@{name}:29093" in environment["KAFKA_CONTROLLER_QUORUM_VOTERS"].split(",")
        assert f"NETWORK://{name}:19092" in environment["KAFKA_ADVERTISED_LISTENERS"]
        [published] = service["ports"]
        host_port = published.removesuffix(":9092")
        assert f"HOST://{host_port}" in environment["KAFKA_ADVERTISED_LISTENERS"]
        for factor in ("DEFAULT", "OFFSETS_TOPIC", "TRANSACTION_STATE_LOG"):
            assert environment[f"KAFKA_{factor}_REPLICATION_FACTOR"] == "3"
        assert environment["KAFKA_MIN_INSYNC_REPLICAS"] == "2"
        assert environment["KAFKA_TRANSACTION_STATE_LOG_MIN_ISR"] == "2"


def leave_ms(settings: Settings) -> int:
    """The longest time from SIGTERM to a worker's end: shards move away, or a last epoch ends."""
    return settings.worker_leave_timeout_ms + settings.checkpoint_timeout_ms


def test_compose_commands_settings_and_grace_periods_are_right(compose: dict[str, Any]) -> None:
    services = compose["services"]
    brokers = {f"{name}:19092" for name in services if name.startswith("kafka")}
    for name in ("coordinator-1", "coordinator-2", "worker"):
        service = services[name]
        given = {key: value for key, value in service["environment"].items() if not key.startswith("AWS_")}
        settings = settings_of(given)
        assert set(settings.bootstrap_servers.split(",")) == brokers
        assert parse_duration_ms(service["stop_grace_period"]) > leave_ms(settings)
        assert parse(service["command"]).params["target"] == "/job/flights.py"
        if name != "worker":
            assert settings.coordinator_bind.startswith("tcp://0.0.0.0:")
            assert service["hostname"] == name  # the address that workers are told


def test_compose_health_check_succeeds_if_the_process_is_ready_and_fails_if_not(
    compose: dict[str, Any],
) -> None:
    answers = Answers()
    for name in ("coordinator-1", "coordinator-2", "worker"):
        service = compose["services"][name]
        kind, program, option, code = service["healthcheck"]["test"]
        assert (kind, program, option) == ("CMD", "python", "-c")
        bind = service["environment"]["FCLUSTER_HTTP_BIND"]
        assert f"'http://{bind}/ready'" in code
        with health_port("127.0.0.1:0", answers) as server:
            assert server is not None
            probe = [sys.executable, "-c", code.replace(f"http://{bind}", server.url)]
            for ready in (True, False):
                answers.ready_verdict = Verdict(ready, "")
                done = subprocess.run(probe, capture_output=True, timeout=30)
                assert (done.returncode == 0) == ready, done.stderr


# --- image --------------------------------------------------------------------------------------------------


def test_image_is_built_from_files_that_exist_and_are_not_ignored() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    allowed = {
        line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, flags=re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert {name.removeprefix("./") for name in copied} == allowed
    assert [name for name in allowed if not (REPOSITORY / name).exists()] == []
    settings_of(dict(re.findall(r"(FCLUSTER_\w+)=(\S+)", dockerfile)))


def test_image_runs_a_python_that_the_package_allows_with_locked_dependencies() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    versions = set(re.findall(r"^FROM python:(\d\.\d+)-slim", dockerfile, flags=re.MULTILINE))
    assert {f"Programming Language :: Python :: {version}" for version in versions} <= set(
        project["classifiers"]
    )
    assert "--require-hashes --no-deps --requirement requirements-run.lock" in dockerfile
    tested, shipped = pins("requirements.lock"), pins("requirements-run.lock")
    assert shipped.items() <= tested.items()
    assert {re.split(r"[\[<>=]", requirement)[0] for requirement in project["dependencies"]} <= set(shipped)


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (REPOSITORY / lock).read_text(), flags=re.MULTILINE))


# --- Kubernetes ---------------------------------------------------------------------------------------------


def manifests() -> Iterator[dict[str, Any]]:
    for path in MANIFESTS:
        yield from yaml.safe_load_all(path.read_text())


def manifest(kind: str, name: str) -> dict[str, Any]:
    [found] = [m for m in manifests() if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


WORKLOADS = [("Deployment", "fcluster-coordinator"), ("StatefulSet", "fcluster-worker")]


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_matches_the_schema_of_kubernetes(path: Path, version: str) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, version, strict=True)


def test_schema_refuses_a_manifest_with_a_misspelt_field() -> None:
    document = manifest("StatefulSet", "fcluster-worker")
    document["spec"]["replica"] = document["spec"].pop("replicas")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, KUBERNETES_VERSIONS[0], strict=True)


def test_kustomization_names_all_manifests_and_renders() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == [path.name for path in MANIFESTS]
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is missing: the kustomization is not rendered")
    done = subprocess.run(
        [kubectl, "kustomize", str(DEPLOY / "kubernetes")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    assert len(rendered) == len(list(manifests()))
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert f"image: fcluster:{version}" in done.stdout


@pytest.mark.parametrize(("kind", "name"), WORKLOADS)
def test_pod_finds_its_settings_and_ends_cleanly(kind: str, name: str) -> None:
    pod = manifest(kind, name)["spec"]["template"]["spec"]
    [container] = pod["containers"]
    environment: dict[str, str] = dict(GIVEN)
    for source in container["envFrom"]:
        if "configMapRef" in source:
            environment |= manifest("ConfigMap", source["configMapRef"]["name"])["data"]
        else:
            environment |= manifest("Secret", source["secretRef"]["name"])["stringData"]
    for variable in container["env"]:
        if "value" in variable:
            environment[variable["name"]] = expanded(variable["value"], environment)
    settings = settings_of(environment)
    assert pod["terminationGracePeriodSeconds"] * 1000 > leave_ms(settings)
    context = parse([expanded(argument, environment) for argument in container["args"]])
    assert context.params["target"] == "/job/flights.py"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/job", "/tmp", settings.security_keys_dir, image_state_dir()} == mounts
    if kind == "StatefulSet":
        assert context.params["slot"] == 3
        label = {v["name"]: v for v in container["env"]}["SLOT"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert label == "metadata.labels['apps.kubernetes.io/pod-index']"
    else:
        assert settings.coordinator_bind == "tcp://10.0.0.7:7700"


@pytest.mark.parametrize(("kind", "name"), WORKLOADS)
def test_probes_ask_the_http_port_that_the_settings_open(kind: str, name: str) -> None:
    [container] = manifest(kind, name)["spec"]["template"]["spec"]["containers"]
    bind = manifest("ConfigMap", "fcluster-settings")["data"]["FCLUSTER_HTTP_BIND"]
    host, port = split_address(bind)
    assert host == "0.0.0.0", "the kubelet asks from outside"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == port
    for probe, paths in {
        "startupProbe": {"/live", "/ready"},
        "livenessProbe": {"/live"},
        "readinessProbe": {"/ready"},
    }.items():
        asked = container[probe]["httpGet"]
        assert asked["port"] == "http"
        assert asked["path"] in paths
        with health_port("127.0.0.1:0", Answers()) as server:
            assert server is not None
            with urllib.request.urlopen(server.url + asked["path"], timeout=5) as answer:
                assert answer.status == 200
    # The process may be suspended, or collect garbage, without being dead.
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 30


def test_rollout_of_coordinators_always_leaves_one_to_hand_over_to() -> None:
    coordinator = manifest("Deployment", "fcluster-coordinator")["spec"]
    assert coordinator["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    [container] = coordinator["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready", "a new pod counts when it stands by"


def expanded(text: str, environment: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: environment[match.group(1)], text)


def image_state_dir() -> str:
    return settings_of(
        dict(re.findall(r"(FCLUSTER_\w+)=(\S+)", (DEPLOY / "Dockerfile").read_text()))
    ).state_dir


@pytest.mark.parametrize(("kind", "name"), WORKLOADS)
def test_pod_conforms_to_the_restricted_profile(kind: str, name: str) -> None:
    """The namespace enforces the profile: another pod would never start."""
    namespace = manifest("Namespace", "fcluster")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = manifest(kind, name)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"--uid {pod['securityContext']['runAsUser']} " in (DEPLOY / "Dockerfile").read_text()
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    [container] = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    keys = next(volume for volume in pod["volumes"] if volume["name"] == "keys")
    assert keys["secret"]["defaultMode"] == 0o440  # for the pod's group only; other modes are refused


def test_selectors_match_the_intended_pods() -> None:
    for kind, name in WORKLOADS:
        workload = manifest(kind, name)
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"] == labels
        assert manifest("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"] == labels
    workers = manifest("StatefulSet", "fcluster-worker")["spec"]
    service = manifest("Service", workers["serviceName"])["spec"]
    assert service["selector"] == workers["template"]["metadata"]["labels"]


# --- systemd ------------------------------------------------------------------------------------------------


def lines_of(path: Path) -> dict[str, str]:
    text = path.read_text().splitlines()
    return dict(line.split("=", 1) for line in text if "=" in line and not line.startswith(("#", "[")))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_is_accepted_by_systemd(unit: Path, tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is missing: the units are not verified")
    program = tmp_path / "fcluster"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/fcluster/bin/fcluster", str(program)))
    done = subprocess.run([tool, "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if unit.name.partition("@")[0] in line]
    assert (done.returncode, ours) == (0, []), done.stderr
    copy.write_text(copy.read_text().replace("Restart=", "Restrat="))
    done = subprocess.run([tool, "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60)
    assert "Restrat" in done.stderr  # it does check names


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_runs_an_existing_command_and_ends_cleanly(unit: Path) -> None:
    found = lines_of(unit)
    environment = lines_of(DEPLOY / "systemd" / "fcluster.env")
    assert "EnvironmentFile=/etc/fcluster/fcluster.env" in unit.read_text()
    settings = settings_of(environment | {"FCLUSTER_STATE_DIR": "/var/lib/fcluster"})
    assert int(found["TimeoutStopSec"]) * 1000 > leave_ms(settings)
    if "worker" in unit.name:
        assert int(found["RestartPreventExitStatus"]) == ExitCode.DRAINED
    arguments = found["ExecStart"].replace("${JOB_FILE}", environment["JOB_FILE"]).replace("%i", "3").split()
    assert arguments[0] == "/opt/fcluster/bin/fcluster"
    context = parse(arguments[1:])
    assert context.info_name == unit.name.removeprefix("fcluster-").partition("@")[0]
    assert context.params["target"] == environment["JOB_FILE"]
    assert context.params.get("slot", 3) == 3


# --- all ----------------------------------------------------------------------------------------------------


def test_procfile_runs_existing_commands() -> None:
    processes = parse_procfile((REPOSITORY / "Procfile").read_text()).processes
    assert set(processes) == {"coordinator", "worker"}
    for name, line in processes.items():
        arguments = re.sub(r"\$\{JOB:-(\S+)\}", r"\1", line).removeprefix("exec ").split()
        assert arguments[:2] == ["fcluster", name]
        assert (REPOSITORY / parse(arguments[1:]).params["target"]).is_file()


def test_guide_names_every_file_of_the_deployments() -> None:
    guide = (REPOSITORY / "docs" / "deploy.md").read_text()
    for path in [*UNITS, *MANIFESTS, DEPLOY / "Dockerfile", DEPLOY / "compose-cluster.yaml"]:
        assert path.name in guide, f"docs/deploy.md doesn't mention {path.name}"


def test_no_deployment_contains_a_real_secret() -> None:
    secret = manifest("Secret", "fcluster-credentials")["stringData"]
    values = {name: value for name, value in secret.items() if re.search("PASSWORD|SECRET|KEY_ID|USER", name)}
    assert set(values.values()) == {"replace-me"}
