"""Finds a cluster and its brokers for the console commands, and sends requests to them.

Responsible for: where to look (options first, then the cluster in the data directory, then the journal), and
requests that follow the leadership. If something is missing, the error names it, with a remedy. Must not
start anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from fcluster.cli.local_kafka import detached_kafka, no_brokers
from fcluster.common.errors import FclusterError
from fcluster.common.settings import Settings, resolve
from fcluster.host.data_directory import ClusterNote, read_note

if TYPE_CHECKING:
    from fcluster.cli.console_clients import Sent
    from fcluster.common.isolation import Isolation
    from fcluster.wire.admin_client import AdminClient
    from fcluster.wire.discovery import Leader

_T = TypeVar("_T")

STATUS_TIMEOUT_MS = 3_000


class NoCluster(FclusterError):  # noqa: N818
    """No cluster runs where the command looked."""


@dataclass(frozen=True)
class Connection:
    """What the console commands know: the settings (with brokers, if any are known), and the cluster that
    runs in the data directory, if there is one.
    """

    settings: Settings
    data_dir: Path
    note: ClusterNote | None

    @classmethod
    def find(cls, flags: Mapping[str, str], config: Path | None, env: Mapping[str, str]) -> Connection:
        """Use the options first, then what runs in the data directory."""
        settings = resolve({}, config, env, flags)
        directory = Path(settings.state_dir)
        note = read_note(directory)
        if not settings.bootstrap_servers:
            servers = note.brokers if note is not None else detached_kafka(directory)
            settings = replace(settings, bootstrap_servers=servers or "")
        if note is not None and not settings.security_keys_dir:
            insecure = settings.insecure or note.insecure
            settings = replace(settings, security_keys_dir=note.keys, insecure=insecure)
        return cls(settings, directory, note)

    def status(self, job: str | None) -> dict[str, Any]:
        """The status document of the cluster in the data directory, or of `job` on the brokers.

        Raises:
            NoCluster: no cluster runs there.
            FclusterError: the cluster doesn't answer.
        """
        with AdminLine(self, job) as line:
            return line.status()

    def coordinator(self, job: str | None) -> tuple[str, str]:
        """The coordinator's address, and its public key from the journal. The key is empty if the journal
        wasn't read.

        Raises:
            NoCluster: no coordinator is known.
        """
        if self.note is not None and job in (None, self.note.job):
            return self.note.coordinator, ""
        if job is None:
            raise NoCluster(
                f"no cluster runs in {self.data_dir}",
                remedy="Start one with `fcluster up`, or name a cluster: --brokers HOST:PORT --job NAME.",
            )
        self._check_brokers()
        from fcluster.wire.discovery import find_leader

        leader = find_leader(self.settings, job)
        if leader is None:
            raise NoCluster(
                f"no coordinator of a job {job!r} is known on {self.settings.bootstrap_servers}",
                remedy="Check the job's name and the brokers, or start it with `fcluster up`.",
            )
        return leader.address, leader.public_key

    def consume(
        self,
        topic: str,
        output: BinaryIO,
        *,
        isolation: Isolation,
        from_beginning: bool,
        count_max: int | None,
        headers: bool = False,
    ) -> int:
        """Print records; see `console_clients.run_consume`."""
        from fcluster.cli.console_clients import kafka_errors, run_consume
        from fcluster.kafka.clients import make_consumer

        self._check_brokers()
        # Records may be deleted while they are read. Then reading continues with the oldest one that is left.
        consumer = make_consumer(self.settings, isolation, **{"auto.offset.reset": "earliest"})
        with kafka_errors():
            return run_consume(
                consumer,
                topic,
                output,
                from_beginning=from_beginning,
                count_max=count_max,
                headers=headers,
            )

    def produce(
        self,
        topic: str,
        lines: BinaryIO,
        *,
        key_field: str | None,
        partitions: int | None,
        skip_errors: bool = False,
    ) -> tuple[Sent, int]:
        """Send lines (see `console_clients.run_produce`). Returns their number, and the topic's partition
        count.
        """
        from fcluster.cli.console_clients import create_topic, existing_partitions, kafka_errors, run_produce
        from fcluster.kafka.clients import make_admin, make_producer

        self._check_brokers()
        admin = make_admin(self.settings)
        with kafka_errors():
            if partitions is not None:
                create_topic(admin, topic, partitions)
            count = len(existing_partitions(admin, topic, creatable=True))
            sent = run_produce(
                partial(make_producer, self.settings),
                topic,
                lines,
                key_field=key_field,
                skip_errors=skip_errors,
            )
        return sent, count

    def _check_brokers(self) -> None:
        if not self.settings.bootstrap_servers:
            raise no_brokers(self.data_dir)
        check_brokers(self.settings)


class AdminLine:
    """Requests to the leader of a job, one at a time. It follows the leadership.

    Args:
        connection: says where to look.
        job: the job's name. None: the job in the data directory.
    """

    def __init__(self, connection: Connection, job: str | None) -> None:
        self._connection = connection
        self._job = job
        self._client: AdminClient | None = None

    def __enter__(self) -> AdminLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()

    def status(self) -> dict[str, Any]:
        """The status document. Raises what `ask` raises."""
        return self.ask(lambda client: client.status(STATUS_TIMEOUT_MS))

    def ask(self, request: Callable[[AdminClient], _T]) -> _T:
        """The result of `request` from the coordinator, or from a new leader.

        Raises:
            NoCluster: no coordinator is known.
            CoordinatorSilent: the coordinator doesn't answer, and there is no other leader.
            RequestRefused: the coordinator refuses, for the reason in the message.
        """
        from fcluster.wire.admin_client import CoordinatorSilent

        settings = self._connection.settings
        if self._client is None:
            address, key = self._connection.coordinator(self._job)
            self._client = open_admin_client(settings, address, key)
        try:
            return request(self._client)
        except CoordinatorSilent:
            note = self._connection.note
            job = self._job or (note.job if note is not None else "")
            leader = leader_elsewhere(settings, job, self._client.address)
            if leader is None:
                raise
        self._client.close()
        self._client = open_admin_client(settings, leader.address, leader.public_key)
        return request(self._client)


def open_admin_client(settings: Settings, address: str, announced_key: str = "") -> AdminClient:
    """A client for the coordinator at `address`, with the admin's key if the settings name keys.

    Raises:
        FclusterError: keys are needed, but there are none, or they can't be used.
    """
    from fcluster.wire.admin_client import AdminClient
    from fcluster.wire.keys import Role
    from fcluster.wire.security import client_security

    return AdminClient(address, client_security(settings, Role.ADMIN, address, announced_key))


def leader_elsewhere(settings: Settings, job: str, address: str) -> Leader | None:
    """The leader according to the journal, if it has another address: a standby may have taken over."""
    from fcluster.wire.discovery import find_leader

    try:
        leader = find_leader(settings, job, timeout_s=STATUS_TIMEOUT_MS / 1000)
    except FclusterError:
        return None
    return leader if leader is not None and leader.address != address else None


def check_brokers(settings: Settings) -> None:
    """Raises KafkaUnavailable if the brokers can't be reached."""
    from fcluster.kafka.brokers import connect_or_raise
    from fcluster.kafka.clients import make_admin

    connect_or_raise(make_admin(settings), settings)
