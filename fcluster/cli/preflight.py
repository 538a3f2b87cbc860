"""What `fcluster up` decides and checks before any process runs: keys, brokers and topics, that no other
cluster runs, and where the coordinator listens.

Responsible for: finding problems in the foreground, and deciding everything once (`Cleared`). Must not start
anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcluster.cli.connection import open_admin_client
from fcluster.cli.local_kafka import say
from fcluster.common.errors import ClusterConflict, FclusterError
from fcluster.common.settings import Settings
from fcluster.kafka.ports import reserve_for_process

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient

    from fcluster.graph.topology import Topology
    from fcluster.wire.discovery import Leader


@dataclass(frozen=True)
class Cleared:
    """A cluster that may start.

    Attributes:
        settings: complete with what all processes have to know: the brokers, the keys, and the coordinator's
            port.
        address: the address at which this host's processes reach the coordinator.
    """

    settings: Settings
    address: str


def clear_for_start(
    settings: Settings, topology: Topology, directory: Path, servers: str, *, embedded: bool = False
) -> Cleared:
    """Decide what is still open, and find problems, before anything runs.

    Args:
        settings: the resolved settings.
        topology: the job's topology.
        directory: the data directory. Keys are created there if other hosts will connect.
        servers: the brokers to use.
        embedded: whether they run for this cluster alone.

    Raises:
        FclusterError: the cluster can't start; see `check_before_start`.
    """
    settings = with_own_keys(replace(settings, bootstrap_servers=servers), directory)
    check_before_start(settings, topology, embedded=embedded)
    bind, address = listening_addresses(settings.coordinator_bind)
    return Cleared(replace(settings, coordinator_bind=bind), address)


def check_before_start(settings: Settings, topology: Topology, *, embedded: bool = False) -> None:
    """Find problems before anything runs.

    Raises:
        KafkaUnavailable: the brokers can't be reached.
        MissingTopic: a source doesn't exist.
        IncompatibleState: topics that are merged have different numbers of partitions.
        ClusterConflict: the job already runs.
    """
    from fcluster.cli.console_clients import METADATA_TIMEOUT_S, kafka_errors
    from fcluster.kafka.brokers import connect_or_raise
    from fcluster.kafka.clients import make_admin

    admin = make_admin(settings)
    connect_or_raise(admin, settings)
    with kafka_errors():
        topics: Mapping[str, Any] = admin.list_topics(timeout=METADATA_TIMEOUT_S).topics
    counts = {name: len(topic.partitions) for name, topic in topics.items()}
    for problem in problems_of_sources(settings, topology, counts, embedded=embedded):
        raise problem
    check_not_running(settings, topology.job)
    lines = risks_of_loss(admin, topology)
    if lines:
        say("WARNING committed data can be lost on these brokers (docs/kafka.md):")
        for line in lines:
            say(f"  {line}")


def problems_of_sources(
    settings: Settings, topology: Topology, counts: Mapping[str, int], *, embedded: bool = False
) -> Iterator[FclusterError]:
    """What is wrong with the topics that the job reads.

    Args:
        settings: with the brokers.
        topology: the job's topology.
        counts: the partition counts of all existing topics.
        embedded: whether the brokers run for this cluster alone.
    """
    from fcluster.graph.stages import check_copartitioned
    from fcluster.kafka.missing import missing_topic

    own = {sink.name for stage in topology.stages for chain in stage.chains for sink in chain.sinks}
    for source in topology.sources:
        if source.name not in counts and source.name not in own:  # the job's own output is created
            where = (
                f" --data-dir {settings.state_dir}"
                if embedded
                else f" --brokers {settings.bootstrap_servers}"
            )
            create = f"fcluster produce {source.name} --partitions 4{where} < lines.jsonl"
            after = " (after `fcluster kafka start`)" if embedded else ""
            yield missing_topic(source.name, counts, f"The job reads it. To create it: {create}{after}")
    for stage in topology.stages:
        try:
            check_copartitioned(stage, counts)
        except FclusterError as problem:
            yield problem


def risks_of_loss(admin: AdminClient, topology: Topology) -> list[str]:
    """Where committed data can be lost: a few lines at most, or none if all is well or can't be seen."""
    from fcluster.common.ids import journal_topic
    from fcluster.kafka.durability import look_for_risks

    names = [topic.name for topic in (*topology.sources, *topology.outputs)]
    for stage in topology.stages:
        names += [*stage.topics, *([stage.changelog] if stage.changelog is not None else [])]
        names += [sink.name for chain in stage.chains for sink in chain.sinks]
    return look_for_risks(admin, [*names, journal_topic(topology.job)])


def check_not_running(settings: Settings, job: str) -> None:
    """Raises ClusterConflict if a coordinator of `job` answers."""
    from fcluster.wire.discovery import find_leader

    leader = find_leader(settings, job)
    if leader is not None and leader_answers(settings, leader, job):
        raise ClusterConflict(
            f"a cluster of job {job!r} already runs on these brokers: its coordinator is at {leader.address}",
            remedy="Stop that cluster, join it with `fcluster worker`, or give this job another name.",
        )


def leader_answers(settings: Settings, leader: Leader, job: str) -> bool:
    """Whether the coordinator that led `job` last is there, as far as can be told from here."""
    if not leader.address:
        return False
    try:
        with open_admin_client(settings, leader.address, leader.public_key) as client:
            return client.status(timeout_ms=1_000).get("job") == job
    except FclusterError:
        return False  # the coordinator itself will check more closely


def with_own_keys(settings: Settings, directory: Path) -> Settings:
    """The settings. If other hosts will connect and no keys are given, they get keys from the data
    directory.
    """
    from fcluster.wire.keys import create_keys
    from fcluster.wire.security import is_loopback

    if settings.security_keys_dir or settings.insecure or is_loopback(settings.coordinator_bind):
        return settings
    keys = directory / "keys"
    if not keys.exists():
        create_keys(keys)
        say(f"created keys in {keys}: workers on other hosts need worker.key and coordinator.pub from there")
    return replace(settings, security_keys_dir=str(keys))


def listening_addresses(bind: str) -> tuple[str, str]:
    """Where the coordinator listens according to the setting `bind`, and the address that this host's
    processes use.
    """
    scheme, _, rest = bind.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host:
        return bind, bind
    # The port is chosen here, because the address must stay the same when the coordinator is restarted.
    port = str(reserve_for_process()) if port in ("0", "*", "") else port
    near = "127.0.0.1" if host in ("0.0.0.0", "*") else host
    return f"tcp://{host}:{port}", f"tcp://{near}:{port}"
