"""Kafka clients as fcluster uses them: their configuration, topics, offsets, and the fencing of ids.

Responsible for: the only place where clients are created, so that settings, defaults and log routing apply to
all of them; and for all requests to Kafka besides reading and writing records. Invariants: every wait is
bounded; errors become an `FclusterError` that names the brokers or topics and says what to do; secrets stay
out of messages. Must not know how records are processed, and keeps no state between calls.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TypeVar

from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (
    AdminClient,
    ConfigResource,  # pyright: ignore[reportPrivateImportUsage]
    NewTopic,  # pyright: ignore[reportPrivateImportUsage]
    OffsetSpec,  # pyright: ignore[reportPrivateImportUsage]
)

from fcluster.common.errors import IncompatibleState, KafkaUnavailable, MissingTopic, SettingsError
from fcluster.common.ids import colliding_topic, journal_topic
from fcluster.common.isolation import Isolation
from fcluster.common.offsets import NotKnownYetError, Offset, known_offset
from fcluster.common.positions import CommittedPosition, UnreadableMetadataError, decode_position
from fcluster.common.settings import Settings
from fcluster.graph.topology import Stage, Topology, check_copartitioned
from fcluster.kafka.durability import Replication, replications
from fcluster.kafka.topic_ids import reset_remedy

REQUEST_TIMEOUT_S: Final = 10.0
ANSWER_TIMEOUT_S: Final = 30.0
"""How long to keep asking Kafka for what it doesn't know yet: three times what a broker's death takes."""
ATTEMPT_TIMEOUT_S: Final = 3.0
"""The limit of one such request. A broker that is gone doesn't answer, and the next request goes to
another one."""
TOPIC_CREATION_TIMEOUT_S: Final = 30.0
SOCKET_TIMEOUT_MS: Final = 8_000
"""How long to wait for a broker's answer before it counts as gone and its successor is looked for. Brokers
need as long to notice (`broker.session.timeout.ms`, 9 s)."""
PRODUCER_SOCKET_TIMEOUT_MS: Final = 12_000
"""The same for producers. All leaders let them wait while a dead follower is still in sync, which ends with
its session. An earlier timeout would repeat requests that are fine, and the offset of a repeated record isn't
reported."""
CONNECTED_TIMEOUT_MS: Final = 5_000
"""The same for the first answer on a new connection, which costs a broker nothing."""
METADATA_REFRESH_MS: Final = 5_000
"""How often a client asks some broker who leads the partitions that it reads or writes."""
SERVE_REST_S: Final = 5.0
FENCE_FIRST_WAIT_S: Final = 0.03
"""How long to wait for the first of two fencing producers. It takes 5 ms for an idle id. The broker needs
about 20 ms to abort an open transaction, which is then complete when the second one asks."""
FENCE_RESTING_WAIT_S: Final = 1.0
"""How long a fencing producer that was connected before may take to find that it still is."""

_NO_GROUP: Final = "fcluster-reader"
"""For consumers that neither commit nor join, outside of any job: librdkafka requires some name."""

_NO_OFFSET: Final = -1001
_POLL_INTERVAL_S: Final = 0.02
_POLL_INTERVAL_S_MAX: Final = 0.5
_LEADERS_KNOWN_S: Final = 2.0

_Client = TypeVar("_Client")
_Answer = TypeVar("_Answer")

_kafka_logger = logging.getLogger("fcluster.kafka")

_COMMON: Final[Mapping[str, Any]] = {
    "client.id": "fcluster",
    "socket.keepalive.enable": True,
    "reconnect.backoff.max.ms": 1000,  # a restarted broker is found again within a second, not ten
    "log.connection.close": False,
    # A broker that hangs keeps its connections and answers nothing. Only when a request has waited for so
    # long is it taken for one that is down, and its successor asked for, once a second. librdkafka's default
    # is 60 s; with transactions it is transaction.timeout.ms.
    "socket.timeout.ms": SOCKET_TIMEOUT_MS,
    "api.version.request.timeout.ms": CONNECTED_TIMEOUT_MS,
    "socket.connection.setup.timeout.ms": SOCKET_TIMEOUT_MS,
    # A broker that is cut off from the other ones only goes on believing that it leads: it gives consumers
    # nothing new and refuses them nothing. Only another broker's metadata tells (default: five minutes).
    "topic.metadata.refresh.interval.ms": METADATA_REFRESH_MS,
}
_CONSUMER: Final[Mapping[str, Any]] = {
    "enable.auto.commit": False,
    "auto.offset.reset": "error",  # a gap is an error that names it, never a jump
    "allow.auto.create.topics": False,
}
_PRODUCER: Final[Mapping[str, Any]] = {
    "enable.idempotence": True,
    "socket.timeout.ms": PRODUCER_SOCKET_TIMEOUT_MS,
    "partitioner": "murmur2_random",  # Java's: keys meet the same partition number whoever wrote them
    "linger.ms": 1,
    "compression.type": "lz4",
    "retry.backoff.ms": 2,  # the wait on CONCURRENT_TRANSACTIONS in every epoch; the default is 100
    "retry.backoff.max.ms": 1000,
}
LASTING: Final[Mapping[str, Any]] = {"enable.sparse.connections": False}
"""For clients that read or write a few partitions for long: connected to all brokers, not only to those that
they have to do with. If that is a single one, and it is cut off from the others, nobody else can be asked who
leads now."""
# What a caller sets in these the user can't override: the caller's code depends on it.
_CALLERS_OWN: Final = frozenset(
    {"group.id", "isolation.level", "enable.partition.eof", "enable.auto.commit", "enable.idempotence"}
    | {"auto.offset.reset", "on_delivery", "delivery.report.only.error", "error_cb", "stats_cb"}
    | {"batch.size"}
)
_CONSUMER_ONLY = re.compile(
    r"(fetch|queued|max\.poll|auto|partition\.assignment|group|heartbeat|enable\.auto|consume|allow\.auto)\..*"
    r"|isolation\.level|session\.timeout\.ms|max\.partition\.fetch\.bytes|check\.crcs|enable\.partition\.eof"
)
_PRODUCER_ONLY = re.compile(
    r"(linger|batch|queue\.buffering|compression|message\.send|delivery|transaction|sticky|retry\.backoff)\..*"
    r"|acks|request\.required\.acks|request\.timeout\.ms|retries|message\.timeout\.ms|partitioner"
    r"|enable\.gapless\.guarantee|transactional\.id"
)

# librdkafka logs these while it copes by itself, or reports the same as an error that we handle.
_EXPECTED_LOGS: Final = frozenset(
    {"FAIL", "ERROR", "FATAL", "TXNERR", "GETPID", "CONFWARN", "REQTMOUT", "PARTCNT", "ADDPARTS", "CLUSTERID"}
    | {"MAXPOLL", "TERMINATE", "SSL", "OFFSET", "COMMITFAIL", "TXNOFFSETS", "ADDOFFSETS", "ENDTXN"}
    | {"METADATAUPDATE"}
)


class _QuietFilter(logging.Filter):
    """Demotes librdkafka's expected errors to the debug level."""

    def filter(self, record: logging.LogRecord) -> bool:
        facility = record.getMessage().split(" ", 1)[0]
        expected = record.levelno < logging.WARNING or facility in _EXPECTED_LOGS
        return not expected or _kafka_logger.isEnabledFor(logging.DEBUG)


_kafka_logger.addFilter(_QuietFilter())


# --- clients -------------------------------------------------------------------------------------------


def consumer_config(settings: Settings, isolation: Isolation, **extra: Any) -> dict[str, Any]:
    """librdkafka's configuration of a consumer.

    The user's own `kafka.` settings override `extra`, except for those that the caller's code depends on.

    Args:
        settings: of the cluster.
        isolation: whether records of open and aborted transactions are read.
        **extra: configuration by librdkafka's names, such as ``**{"fetch.wait.max.ms": 8}``.
    """
    defaults = {**_CONSUMER, "isolation.level": isolation.replace("-", "_")}
    defaults["group.id"] = settings.reading_group or _NO_GROUP
    return _config(settings, "consumer.", _PRODUCER_ONLY, defaults, extra)


def producer_config(settings: Settings, transactional_id: str | None = None, **extra: Any) -> dict[str, Any]:
    """librdkafka's configuration of an idempotent producer, transactional if it has a `transactional_id`."""
    defaults = dict(_PRODUCER)
    if transactional_id is not None:
        defaults["transactional.id"] = transactional_id
        defaults["transaction.timeout.ms"] = settings.transaction_timeout_ms
        defaults["socket.timeout.ms"] = min(PRODUCER_SOCKET_TIMEOUT_MS, settings.transaction_timeout_ms)
        # By default librdkafka forgets all brokers when none is up, and then sends offsets to the
        # group coordinator that it remembers and has no connection to any more: the call never
        # returns, not even at its time-out (librdkafka #5511, #5456; decision 0073). So they are kept, and
        # reconnected to, as long as a session lasts.
        defaults["metadata.recovery.strategy"] = "none"
        # A request for a coordinator that is gone is looked at again when some connection changes: at
        # the latest when it is closed for being idle (decision 0082). The default is nine minutes.
        defaults["connections.max.idle.ms"] = 120_000
    return _config(settings, "producer.", _CONSUMER_ONLY, defaults, extra)


def make_consumer(settings: Settings, isolation: Isolation, **extra: Any) -> Consumer:
    """A consumer; see `consumer_config`. Name a ``group.id`` in `extra` if it commits offsets.

    Raises:
        SettingsError: librdkafka rejects a setting.
    """
    return _make(Consumer, consumer_config(settings, isolation, **extra))


def make_producer(settings: Settings, transactional_id: str | None = None, **extra: Any) -> Producer:
    """A producer; see `producer_config`.

    Raises:
        SettingsError: librdkafka rejects a setting.
    """
    return _make(Producer, producer_config(settings, transactional_id, **extra))


def serve_rest(producer: Producer) -> None:
    """Drop what a producer has queued and serve all its reports, so that it can be destroyed.

    Reports that haven't been served when a fenced producer is destroyed corrupt the heap, and some thread
    that ends later is aborted because of that (decision 0073).
    """
    with contextlib.suppress(KafkaException):
        producer.purge()
    deadline_s = time.monotonic() + SERVE_REST_S
    while len(producer) and time.monotonic() < deadline_s:
        # A fatal error is raised to whoever serves it; as SystemError, if another callback is due with it.
        with contextlib.suppress(KafkaException, SystemError):
            producer.poll(0.05)


class Admin(AdminClient):
    """An admin client that remembers why it could not connect, and asks partitions' leaders one at a time.

    `list_offsets` and `delete_records` look for leaders in librdkafka's metadata cache. If a leader isn't
    there, librdkafka waits for a change of the cache both in the calling thread and in its own main thread,
    and either of them may free what the other uses: the process crashes (decision 0080). So here they are
    called only when the cache has all leaders, by one thread at a time, which waits for the answers.

    It refuses requests to a group's coordinator: librdkafka aborts the process if such a request has timed
    out when the coordinator's broker comes back (decision 0083).
    """

    def __init__(self, config: dict[str, Any], **extra: Any) -> None:
        self.last_error: KafkaError | None = None
        self._asking_leaders = threading.RLock()
        self._leaders_known_s: dict[tuple[str, int], float] = {}
        with_callback: dict[str, Any] = config | {"error_cb": self._note_error}
        super().__init__(with_callback, **extra)

    def list_offsets(self, topic_partition_offsets: Any, **kwargs: Any) -> dict[TopicPartition, Future[Any]]:
        """Like AdminClient's. All answers are there when it returns.

        Raises:
            KafkaException: a partition's leader isn't known now. Nothing was asked.
        """
        return self._ask_leaders(_untyped(super()).list_offsets, topic_partition_offsets, kwargs)

    def delete_records(
        self, topic_partition_offsets: Any, **kwargs: Any
    ) -> dict[TopicPartition, Future[Any]]:
        """Like AdminClient's. All answers are there when it returns.

        Raises:
            KafkaException: a partition's leader isn't known now. Nothing was asked.
        """
        return self._ask_leaders(_untyped(super()).delete_records, topic_partition_offsets, kwargs)

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError("an admin client must not ask a group's coordinator: librdkafka may abort")

    describe_consumer_groups = _refuse
    delete_consumer_groups = _refuse
    list_consumer_group_offsets = _refuse
    alter_consumer_group_offsets = _refuse

    def _ask_leaders(
        self, ask: Callable[..., Any], request: Iterable[TopicPartition], kwargs: dict[str, Any]
    ) -> dict[TopicPartition, Future[Any]]:
        timeout_s = float(kwargs.get("request_timeout", REQUEST_TIMEOUT_S))
        with self._asking_leaders:
            self._have_leaders_cached(request, timeout_s)
            futures: dict[TopicPartition, Future[Any]] = ask(request, **kwargs)
            answered, unanswered = wait(futures.values(), 2 * timeout_s + 1)
            if unanswered or any(future.exception() is not None for future in answered):
                self._leaders_known_s.clear()  # librdkafka has forgotten some, or should
            return futures

    def _have_leaders_cached(self, partitions: Iterable[TopicPartition], timeout_s: float) -> None:
        wanted = [(at.topic, at.partition) for at in partitions]
        now_s = time.monotonic()
        if all(now_s < self._leaders_known_s.get(at, 0.0) for at in wanted):
            return
        # All topics: asking for a single one may create it, where brokers do that by themselves.
        metadata = self.list_topics(timeout=timeout_s)
        known = {
            (name, partition.id)
            for name, topic in metadata.topics.items()
            for partition in topic.partitions.values()
            if partition.leader in metadata.brokers
        }
        self._leaders_known_s = dict.fromkeys(known, now_s + _LEADERS_KNOWN_S)
        for topic, partition in wanted:
            if topic not in metadata.topics:
                raise KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART, f"no topic {topic!r}"))
            if (topic, partition) not in known:
                raise KafkaException(
                    KafkaError(KafkaError.LEADER_NOT_AVAILABLE, f"{topic}/{partition} has no leader")
                )

    def _note_error(self, error: KafkaError) -> None:
        # "all brokers down" always comes last, and says less than what led to it.
        if self.last_error is None or error.code() != KafkaError._ALL_BROKERS_DOWN:
            self.last_error = error


def make_admin(settings: Settings) -> Admin:
    """An admin client.

    Raises:
        SettingsError: librdkafka rejects a setting.
    """
    any_kind = re.compile(f"{_CONSUMER_ONLY.pattern}|{_PRODUCER_ONLY.pattern}")
    return _make(Admin, _config(settings, "admin.", any_kind, {}, {}))


def _config(
    settings: Settings,
    role: str,
    of_other_clients: re.Pattern[str],
    defaults: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    config: dict[str, Any] = {"bootstrap.servers": settings.bootstrap_servers, **_COMMON, **defaults, **extra}
    fixed = _CALLERS_OWN & config.keys()
    users: dict[str, str] = {}
    for key, value in settings.kafka.items():
        prefix = next((p for p in ("consumer.", "producer.", "admin.") if key.startswith(p)), "")
        if prefix in ("", role) and not of_other_clients.fullmatch(key.removeprefix(prefix)):
            users[key.removeprefix(prefix)] = value
    return config | {key: value for key, value in users.items() if key not in fixed}


def _make(kind: Callable[..., _Client], config: dict[str, Any]) -> _Client:
    config.setdefault("error_cb", ErrorLog(str(config["bootstrap.servers"])))
    try:
        return kind(config, logger=_kafka_logger)
    except KafkaException as error:
        raise SettingsError(
            f"librdkafka rejects its configuration: {reason_of(error)}.",
            remedy="Correct the setting of that name under kafka. (librdkafka's documentation lists them).",
        ) from error


# What a client goes on retrying though it won't help: somebody has to correct a setting.
_REFUSALS: Final = frozenset(
    {
        "_AUTHENTICATION",
        "SASL_AUTHENTICATION_FAILED",
        "UNSUPPORTED_SASL_MECHANISM",
        "ILLEGAL_SASL_STATE",
        "_SSL",
    }
)


class ErrorLog:
    """Errors that clients report by themselves: logs them once in a while, and remembers a rejection.

    Args:
        brokers: for the message.
        quiet: only remember it; the owner reports it.
    """

    INTERVAL_S = 10.0

    def __init__(self, brokers: str, *, quiet: bool = False) -> None:
        self.refusal: KafkaError | None = None
        """Why the brokers last rejected us. It may have been corrected since."""
        self._brokers = brokers
        self._quiet = quiet
        self._silent_until = dict[bool, float]()

    def __call__(self, error: KafkaError) -> None:
        refused = error.name() in _REFUSALS
        if refused:
            self.refusal = error
        if self._quiet or (not refused and error.code() != KafkaError._ALL_BROKERS_DOWN):
            return  # all else comes back from calls
        if time.monotonic() < self._silent_until.get(refused, 0.0):
            return
        self._silent_until[refused] = time.monotonic() + self.INTERVAL_S
        if refused:
            _kafka_logger.warning(
                "Kafka at %s rejects this client, retrying: %s. %s",
                self._brokers,
                said_by(error),
                remedy_for(error),
            )
        elif self.refusal is None:
            _kafka_logger.warning("can't reach any Kafka broker at %s; retrying", self._brokers)


# --- trouble -------------------------------------------------------------------------------------------


def reason_of(error: KafkaException) -> str:
    """librdkafka's text, with the name of the error."""
    cause = cause_of(error)
    return f"{cause.str()} ({cause.name()})"


_DETAILS = re.compile(r" \(after [0-9]+ms in state \w+(, [0-9]+ identical error\(s\) suppressed)?\)")


def said_by(error: KafkaError) -> str:
    """librdkafka's text without durations, so that the same error always has the same text."""
    return _DETAILS.sub("", error.str())


def cause_of(error: KafkaException) -> KafkaError:
    """The error within the exception. It has the code and knows whether it can be retried."""
    cause = error.args[0] if error.args else None
    return cause if isinstance(cause, KafkaError) else KafkaError(KafkaError._FAIL, str(error))


@contextmanager
def _asking(settings_or_admin: Settings | AdminClient | Consumer, what: str) -> Generator[None]:
    """Turns librdkafka's exceptions into one that says what was being asked."""
    try:
        yield
    except KafkaException as error:
        raise _unavailable(settings_or_admin, what, cause_of(error)) from error


def _unavailable(
    settings_or_admin: Settings | AdminClient | Consumer, what: str, cause: KafkaError
) -> KafkaUnavailable:
    brokers = settings_or_admin.bootstrap_servers if isinstance(settings_or_admin, Settings) else ""
    where = f" at {brokers}" if brokers else ""
    return KafkaUnavailable(
        f"A request to Kafka{where} failed ({what}): {cause.str()} ({cause.name()}).",
        remedy=remedy_for(cause),
    )


def _untyped(admin: Any) -> Any:
    # Its methods' results are futures of nothing in particular, as its own types have it.
    return admin


def remedy_for(cause: KafkaError) -> str:
    """What a user can do about an error from Kafka."""
    name = cause.name()
    if "AUTHORIZATION" in name or "POLICY" in name:
        return (
            "Grant the job's Kafka user the right to do this (docs/security.md lists the ACLs that it "
            "needs), or have it done by a user with that right."
        )
    if "AUTHENTICATION" in name or "SASL" in name:
        return (
            "Check the login: kafka.sasl.username, kafka.sasl.mechanism, and the password "
            "(FCLUSTER_KAFKA_SASL_PASSWORD in the environment, or sasl.password under [kafka] in "
            "fcluster.toml)."
        )
    if "SSL" in name:
        return "Check kafka.security.protocol and the certificates (kafka.ssl.ca.location and so on)."
    if name == "INVALID_REPLICATION_FACTOR":
        return "Set replication.factor to at most the number of brokers."
    return "Check that the brokers are up and reachable from here, then start again."


def connect_or_raise(admin: AdminClient, settings: Settings, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
    """Check that the brokers answer, and allow what the settings ask for.

    Raises:
        KafkaUnavailable: they don't answer within `timeout_s` seconds, or none are given.
        SettingsError: `transaction.timeout.ms` is above what they allow.
    """
    brokers = settings.bootstrap_servers
    if not brokers:
        raise KafkaUnavailable(
            "No Kafka brokers are given.",
            remedy="Give them with --brokers host:9092, or as bootstrap.servers in fcluster.toml.",
        )
    try:
        _list_topics_unless_refused(admin, timeout_s)
    except KafkaException as error:
        cause = getattr(admin, "last_error", None) or cause_of(error)
        remedy = remedy_for(cause)
        if cause.name() in ("_TRANSPORT", "_TIMED_OUT", "_RESOLVE", "_ALL_BROKERS_DOWN"):
            remedy = (
                "Check that Kafka runs there, and that address and port are right (--brokers or "
                "bootstrap.servers). If it needs TLS or a login, set kafka.security.protocol and so on."
            )
        said = f"answered within {timeout_s:g} s" if cause.name() not in _REFUSALS else "accepts this client"
        raise KafkaUnavailable(
            f"No Kafka broker at {brokers} {said}: {said_by(cause)}.", remedy=remedy
        ) from error
    if settings.processing_guarantee == "exactly-once":
        _check_transaction_timeout(admin, settings)


def _list_topics_unless_refused(admin: AdminClient, timeout_s: float) -> None:
    """Raises KafkaException once the brokers have rejected us, or haven't answered in time. librdkafka itself
    would keep trying the same wrong password until then.
    """
    deadline = time.monotonic() + timeout_s
    wait_s = 0.5
    while True:
        try:
            admin.list_topics(timeout=min(wait_s, _remaining_s(deadline)))
            return
        except KafkaException:
            admin.poll(0)  # has the reasons noted
            last_error: KafkaError | None = getattr(admin, "last_error", None)
            if time.monotonic() >= deadline or (last_error is not None and last_error.name() in _REFUSALS):
                raise
        wait_s *= 2


def _check_transaction_timeout(admin: AdminClient, settings: Settings) -> None:
    limit_ms = broker_setting(admin, "transaction.max.timeout.ms")
    if limit_ms is not None and settings.transaction_timeout_ms > limit_ms:
        raise SettingsError(
            f"transaction.timeout.ms = {settings.transaction_timeout_ms} is above the brokers' "
            f"transaction.max.timeout.ms = {limit_ms}.",
            remedy="Lower it (together with commit.interval.max.ms and checkpoint.timeout.ms, which it has "
            "to exceed), or raise the brokers' limit.",
        )


def broker_setting(admin: AdminClient, name: str) -> int | None:
    """A number in a broker's configuration. None if we may not see it."""
    with _asking(admin, "listing the brokers"):
        broker = next(iter(admin.list_topics(timeout=REQUEST_TIMEOUT_S).brokers))
    return _number_in(admin, ConfigResource(ConfigResource.Type.BROKER, str(broker)), name)


def largest_batch(admin: AdminClient, topic: str) -> int | None:
    """The largest batch of records that a topic accepts, in bytes. None if we may not see it."""
    return _number_in(admin, ConfigResource(ConfigResource.Type.TOPIC, topic), "max.message.bytes")


def _number_in(admin: AdminClient, resource: ConfigResource, name: str) -> int | None:
    try:
        futures = _untyped(admin).describe_configs([resource], request_timeout=REQUEST_TIMEOUT_S)
        entries = futures[resource].result()
        return int(entries[name].value)
    except (KafkaException, KeyError, TypeError, ValueError):
        return None


# --- topics --------------------------------------------------------------------------------------------


def partition_counts(admin: AdminClient, topics: Iterable[str]) -> dict[str, int]:
    """The number of partitions of each topic.

    Raises:
        MissingTopic: one doesn't exist.
        KafkaUnavailable: the brokers don't answer.
    """
    existing = existing_topics(admin)
    wanted = list(topics)
    for topic in wanted:
        if topic not in existing:
            raise missing_topic(topic, existing)
    return {topic: existing[topic] for topic in wanted}


def missing_topic(topic: str, existing: Iterable[str]) -> MissingTopic:
    """The error for a missing topic. It suggests topics with similar names."""
    near = difflib.get_close_matches(topic, [name for name in existing if not name.startswith("__")], 3, 0.6)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return MissingTopic(
        f"The topic {topic!r} doesn't exist.{hint}",
        remedy="Correct the name in the job file, or create the topic (`fcluster produce` can do that).",
    )


def ensure_internal_topics(admin: AdminClient, topology: Topology, settings: Settings) -> dict[str, int]:
    """Create what the job needs besides its sources: internal topics, and output topics that are missing.

    Repartition and output topics get as many partitions as the source that they are written from, a changelog
    as many as its stage's inputs. A repartition topic that is merged with others gets as many as they have.
    Existing topics aren't changed. Calling it again does no harm.

    Returns:
        The partition counts of all these topics, and of the sources.

    Raises:
        MissingTopic: a source that the job doesn't write itself doesn't exist.
        IncompatibleState: a source has another partition count than when its stage's state was written, or
            than a topic that it is merged with.
        KafkaUnavailable: the brokers don't answer, or refuse.
    """
    existing = existing_topics(admin)
    plan = _TopicPlan(topology, existing)
    plan.want(journal_topic(topology.job), 1, _JOURNAL_CONFIG)
    for stage in topology.stages:
        plan.add_stage(stage)
    most = max(plan.counts[topic.name] for topic in topology.sources)
    for topic in topology.outputs:
        plan.want(topic.name, most, {})
    _create_topics(admin, plan.missing, settings)
    return plan.counts


# What only we read may never expire by time; what is done with is deleted by offset.
_KEPT_CONFIG: Final = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
_REPARTITION_CONFIG: Final = {
    **_KEPT_CONFIG,
    "message.timestamp.type": "CreateTime",  # records keep their timestamps on the way through
    "segment.bytes": str(64 * 1024 * 1024),
}
_CHANGELOG_CONFIG: Final = {**_KEPT_CONFIG, "segment.bytes": str(64 * 1024 * 1024)}
_JOURNAL_CONFIG: Final = {
    "cleanup.policy": "compact",
    "min.cleanable.dirty.ratio": "0.1",
    "segment.bytes": str(16 * 1024 * 1024),
    "segment.ms": "600000",  # only closed segments are compacted, and the journal grows slowly
}


class _TopicPlan:
    """The required topics, derived stage by stage, upstream first."""

    def __init__(self, topology: Topology, existing: Mapping[str, int]) -> None:
        self._job = topology.job
        self._existing = existing
        self._repartition_topics = {source.topic.name for source in topology.inputs if source.internal}
        self._readers = topology.stages_by_topic
        self.counts: dict[str, int] = {}
        self.missing: dict[str, tuple[int, Mapping[str, str]]] = {}

    def want(self, topic: str, partitions: int, config: Mapping[str, str]) -> None:
        if topic in self.counts:
            return
        if topic not in self._existing:
            other = colliding_topic(topic, self._existing)
            if other is not None:
                raise _collides(topic, other)
            self.missing[topic] = (partitions, config)
        self.counts[topic] = self._existing.get(topic, partitions)

    def add_stage(self, stage: Stage) -> None:
        for topic in stage.topics:
            if topic not in self.counts:
                if topic not in self._existing:
                    raise missing_topic(topic, self._existing)
                self.counts[topic] = self._existing[topic]
        check_copartitioned(stage, self.counts)
        source = stage.topics[0]
        count = self.counts[source]
        if stage.changelog is not None:
            self.want(stage.changelog, count, _CHANGELOG_CONFIG)
            if self.counts[stage.changelog] != count:
                raise _partitions_changed(
                    self._job, source, count, stage.changelog, self.counts[stage.changelog]
                )
        for chain in stage.chains:
            if chain.sink is not None and chain.sink.name in self._repartition_topics:
                self.want(chain.sink.name, self._merged_count(chain.sink.name, count), _REPARTITION_CONFIG)
            elif chain.sink is not None:
                self.want(chain.sink.name, count, {})
        for topic in stage.dead_letter_topics:
            self.want(topic.name, count, {})

    def _merged_count(self, topic: str, feeding: int) -> int:
        """How many partitions a repartition topic gets: as many as what it is merged with has, or will have;
        merged with nothing, as many as the stage that feeds it."""
        others = self._readers[topic].topics
        for counts in (self._existing, self.counts):
            known = [counts[other] for other in others if other in counts]
            if known:
                return known[0]
        return feeding


def _collides(topic: str, other: str) -> MissingTopic:
    return MissingTopic(
        f"The topic {topic!r} doesn't exist, and can't be created because {other!r} exists: Kafka treats "
        "'.' and '_' in topic names as equal.",
        remedy="If the name of the topic is misspelt, correct it (for a journal, that of the job); otherwise "
        "choose a name that differs in another character.",
    )


def _partitions_changed(job: str, source: str, now: int, changelog: str, then: int) -> IncompatibleState:
    return IncompatibleState(
        f"The topic {source!r} has {now} partitions, but had {then} when the state in {changelog!r} was "
        "written: keys would meet the state of other shards.",
        remedy=f"Copy the records to a topic with {then} partitions and read that, or start again: "
        + reset_remedy(job),
    )


def existing_topics(admin: AdminClient) -> dict[str, int]:
    """The number of partitions of each existing topic.

    Raises:
        KafkaUnavailable: the brokers don't answer.
    """

    def ask() -> dict[str, int]:
        topics = admin.list_topics(timeout=ATTEMPT_TIMEOUT_S).topics
        counts: dict[str, int] = {}
        for name, topic in topics.items():
            if topic.error is None or (topic.partitions and is_not_known_yet(topic.error)):
                counts[name] = len(topic.partitions)
            elif is_not_known_yet(topic.error):
                # It exists, but the broker can't say yet with how many partitions.
                raise NotKnownYetError(f"the partitions of {name!r} are not known yet: {topic.error.str()}")
        return counts

    with _asking(admin, "listing topics"):
        return ask_until_known(ask, REQUEST_TIMEOUT_S)


def _create_topics(
    admin: AdminClient, missing: Mapping[str, tuple[int, Mapping[str, str]]], settings: Settings
) -> None:
    if not missing:
        return
    with _asking(settings, "listing the brokers"):
        ways = replications(admin, settings.replication_factor)
    left = dict(missing)
    for number, way in enumerate(ways, 1):
        left = _try_to_create(admin, left, way, settings, last=number == len(ways))
    _wait_for_leaders(admin, settings, list(missing))


def _try_to_create(
    admin: AdminClient,
    missing: Mapping[str, tuple[int, Mapping[str, str]]],
    way: Replication,
    settings: Settings,
    *,
    last: bool,
) -> dict[str, tuple[int, Mapping[str, str]]]:
    """Create the topics. Returns those for whose replicas there are too few brokers, unless this was the
    last way to try.
    """
    if not missing:
        return {}
    new = [
        NewTopic(name, partitions, way.factor, config={**config, **way.config})
        for name, (partitions, config) in missing.items()
    ]
    futures: dict[str, Future[None]] = _untyped(admin).create_topics(
        new, request_timeout=TOPIC_CREATION_TIMEOUT_S, operation_timeout=TOPIC_CREATION_TIMEOUT_S
    )
    refused = dict[str, tuple[int, Mapping[str, str]]]()
    for name, future in futures.items():
        try:
            future.result()
        except KafkaException as error:
            cause = cause_of(error)
            if cause.name() == "INVALID_REPLICATION_FACTOR" and not last:
                refused[name] = missing[name]
            elif cause.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise _unavailable(settings, f"creating the topic {name!r}", cause) from error
    return refused


def create_output_topic(admin: AdminClient, topic: str, partitions: int, settings: Settings) -> None:
    """Create a topic that the job writes to. If it already exists, that is no error.

    Raises:
        KafkaUnavailable: the brokers don't answer, or refuse.
    """
    _create_topics(admin, {topic: (partitions, {})}, settings)


def _wait_for_leaders(admin: AdminClient, settings: Settings, topics: Sequence[str]) -> None:
    deadline = time.monotonic() + TOPIC_CREATION_TIMEOUT_S
    while True:
        with _asking(settings, "listing topics"):
            known = admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics
        waiting = [name for name in topics if not _has_leaders(known.get(name))]
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise KafkaUnavailable(
                f"The new topic {waiting[0]!r} has no leaders after {TOPIC_CREATION_TIMEOUT_S:g} s.",
                remedy="Check the brokers' logs, then start again.",
            )
        time.sleep(_POLL_INTERVAL_S)


def _has_leaders(topic: Any) -> bool:
    if topic is None or topic.error is not None or not topic.partitions:
        return False
    return all(partition.leader >= 0 for partition in topic.partitions.values())


# --- offsets -------------------------------------------------------------------------------------------


def begin_offsets(
    admin: AdminClient, partitions: Iterable[TopicPartition], timeout_s: float = ANSWER_TIMEOUT_S
) -> dict[TopicPartition, Offset]:
    """The first offset that each partition still has.

    Raises:
        KafkaUnavailable: the brokers don't answer, or a topic or partition doesn't exist.
    """
    return _offsets(admin, partitions, OffsetSpec.earliest(), "read-uncommitted", timeout_s)


def end_offsets(
    admin: AdminClient,
    partitions: Iterable[TopicPartition],
    isolation: Isolation,
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> dict[TopicPartition, Offset]:
    """The offset after the last record that readers with that isolation can see in each partition.

    With "read-committed" it is the last stable offset. Open transactions hold it back, and so does one whose
    commit has just returned, until its markers are written (see `settled_end_offsets`).

    Raises:
        KafkaUnavailable: the brokers don't answer, or a topic or partition doesn't exist.
    """
    return _offsets(admin, partitions, OffsetSpec.latest(), isolation, timeout_s)


def settled_end_offsets(
    admin: AdminClient, partitions: Iterable[TopicPartition], timeout_s: float = ANSWER_TIMEOUT_S
) -> dict[TopicPartition, Offset]:
    """The ends of partitions that are not being written to, once all their transactions are settled.

    A commit returns when it is decided. Its markers reach the partitions a little later, one by one. A worker
    that takes over a shard has to wait for those in its changelog, or it would read too few deltas.

    Raises:
        KafkaUnavailable: a transaction was still open after `timeout_s` seconds, or brokers don't answer.
    """
    wanted = list(partitions)
    deadline = time.monotonic() + timeout_s
    while True:
        # In this order: a record written in between makes the two differ, never agree by mistake.
        stable = end_offsets(admin, wanted, "read-committed", timeout_s)
        ends = end_offsets(admin, wanted, "read-uncommitted", timeout_s)
        waiting = [at for at in wanted if stable[at] < ends[at]]
        if not waiting:
            return ends
        if time.monotonic() > deadline:
            names = ", ".join(f"{at.topic}/{at.partition}" for at in waiting[:3])
            raise KafkaUnavailable(
                f"A transaction in {names} is still open after {timeout_s:g} s.",
                remedy="Look for another program that writes to this topic.",
            )
        time.sleep(_POLL_INTERVAL_S)


def _offsets(
    admin: AdminClient,
    partitions: Iterable[TopicPartition],
    spec: Any,
    isolation: Isolation,
    timeout_s: float,
) -> dict[TopicPartition, Offset]:
    request = {TopicPartition(at.topic, at.partition): spec for at in partitions}
    if not request:
        return {}
    level = (
        IsolationLevel.READ_COMMITTED if isolation == "read-committed" else IsolationLevel.READ_UNCOMMITTED
    )

    def ask() -> dict[TopicPartition, Offset]:
        futures: dict[TopicPartition, Future[Any]] = _untyped(admin).list_offsets(
            request, isolation_level=level, request_timeout=ATTEMPT_TIMEOUT_S
        )
        # A leader that didn't answer leaves -1001 in the answer, and no error.
        return {
            at: known_offset(future.result().offset, f"{at.topic}/{at.partition}")
            for at, future in futures.items()
        }

    with _asking(admin, "listing offsets"):
        return ask_until_known(ask, timeout_s)


# A partition's leader, or a group's or transaction's coordinator, is moving or has just come up; a broker
# has gone; or what a client knows of them is out of date, as after a broker's restart. Asking again helps.
_NOT_KNOWN_YET: Final = frozenset(
    {"NOT_LEADER_FOR_PARTITION", "LEADER_NOT_AVAILABLE", "NOT_COORDINATOR", "COORDINATOR_NOT_AVAILABLE"}
    | {"COORDINATOR_LOAD_IN_PROGRESS", "_WAIT_COORD", "FENCED_LEADER_EPOCH", "UNKNOWN_LEADER_EPOCH"}
    | {"_NOENT", "_NOOP", "_TRANSPORT", "_TIMED_OUT", "_TIMED_OUT_QUEUE", "_ALL_BROKERS_DOWN"}
    | {"_WAIT_CACHE", "_IN_PROGRESS", "_DESTROY_BROKER", "_RETRY", "REQUEST_TIMED_OUT", "NETWORK_EXCEPTION"}
    | {"OFFSET_NOT_AVAILABLE", "REPLICA_NOT_AVAILABLE", "BROKER_NOT_AVAILABLE", "KAFKA_STORAGE_ERROR"}
    | {"UNSTABLE_OFFSET_COMMIT", "NOT_ENOUGH_REPLICAS", "NOT_ENOUGH_REPLICAS_AFTER_APPEND"}
    | {"NOT_CONTROLLER", "UNKNOWN_SERVER_ERROR"}
)
# Of a broker that has just started it may only mean that it hasn't heard of the topic yet.
_MISSING: Final = frozenset(
    {"UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_PARTITION", "_UNKNOWN_TOPIC", "UNKNOWN_TOPIC_ID"}
)
MISSING_TIMEOUT_S: Final = 2.0
"""How long a topic has to be missing in the answers before that is accepted."""


def is_not_known_yet(error: KafkaError) -> bool:
    """Whether the error says nothing about what was asked, so that it should be asked again."""
    return error.name() in _NOT_KNOWN_YET


def ask_until_known(
    ask: Callable[[], _Answer], timeout_s: float, given_up: Callable[[], bool] = lambda: False
) -> _Answer:
    """Repeat a request to Kafka, less and less often, as long as the answer says nothing.

    Args:
        ask: raises KafkaException or NotKnownYetError if there is no answer. One call may take
            `ATTEMPT_TIMEOUT_S`.
        timeout_s: how long to repeat it.
        given_up: whether the answer isn't needed any more.

    Raises:
        KafkaException: the last answer, if it wasn't known in time; or an error that repeating doesn't fix.
    """
    begun_s = time.monotonic()
    wait_s = _POLL_INTERVAL_S
    while True:
        passed_s = time.monotonic() - begun_s
        try:
            return ask()
        except NotKnownYetError as error:
            if passed_s > timeout_s or given_up():
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, str(error))) from error
        except KafkaException as error:
            cause = cause_of(error)
            bound_s = min(MISSING_TIMEOUT_S, timeout_s) if cause.name() in _MISSING else timeout_s
            again = cause.name() in _MISSING or is_not_known_yet(cause)
            if not again or passed_s > bound_s or given_up():
                raise
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _POLL_INTERVAL_S_MAX)


def read_committed_positions(
    consumer: Consumer,
    group: str,
    partitions: Iterable[TopicPartition],
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> dict[TopicPartition, CommittedPosition | None]:
    """What the group has committed for each partition, None where there is nothing.

    While an open transaction holds an offset of one of them, the answer isn't settled, and a read-committed
    consumer waits for it. So fence the transaction's owner first. A read-uncommitted consumer answers at once
    with what was committed last.

    Args:
        consumer: of that group. An admin client could ask the same, but librdkafka 2.16 crashes when the
            group's coordinator isn't ready to answer an admin client (it continues as if that were a
            consumer).
        group: the job's name.
        partitions: of source topics.
        timeout_s: seconds to wait.

    Raises:
        KafkaUnavailable: no settled answer came in time.
        IncompatibleState: the offsets were not committed by fcluster.
    """
    wanted = [TopicPartition(at.topic, at.partition) for at in partitions]
    if not wanted:
        return {}
    what = f"reading the committed offsets of the group {group!r}"

    def ask() -> list[TopicPartition]:
        answer = consumer.committed(wanted, timeout=min(timeout_s, REQUEST_TIMEOUT_S))
        answered = {(at.topic, at.partition) for at in answer}
        for at in answer:
            if at.error is not None and is_not_known_yet(at.error):
                raise KafkaException(at.error)
        if any((at.topic, at.partition) not in answered for at in wanted):
            raise NotKnownYetError("the answer lacks some partitions")
        return answer

    try:
        answer = ask_until_known(ask, timeout_s)
    except KafkaException as error:
        problem = _unavailable(consumer, what, cause_of(error))
        if cause_of(error).code() == KafkaError._TIMED_OUT:
            # librdkafka looks for the group's coordinator for as long as it is refused, and doesn't tell.
            problem = KafkaUnavailable(
                problem.message,
                remedy="Check that the brokers are up and reachable from here. If Kafka has ACLs, a missing "
                f"authorization for the group {group!r} looks the same; docs/security.md lists what a job "
                "needs.",
            )
        raise problem from error
    return {TopicPartition(at.topic, at.partition): _position(group, at) for at in answer}


def _position(group: str, at: TopicPartition) -> CommittedPosition | None:
    if at.error is not None:
        raise KafkaUnavailable(
            f"Can't read the committed offset of {at.topic}/{at.partition}: {at.error.str()}.",
            remedy=remedy_for(at.error),
        )
    if at.offset == _NO_OFFSET:
        return None
    try:
        return decode_position(known_offset(at.offset, f"{at.topic}/{at.partition}"), at.metadata)
    except NotKnownYetError as error:
        raise KafkaUnavailable(
            f"Can't read the committed offset of {at.topic}/{at.partition}: {error}.",
            remedy="Check the brokers. fcluster keeps asking.",
        ) from error
    except UnreadableMetadataError as error:
        raise IncompatibleState(
            f"The consumer group {group!r} has an offset for {at.topic}/{at.partition} that fcluster did not "
            f"commit: {error}.",
            remedy="Stop the program that uses the job's group, or give the job another name. Then "
            + reset_remedy(group),
        ) from error


def delete_records_before(
    admin: AdminClient, offsets: Mapping[TopicPartition, int], timeout_s: float = REQUEST_TIMEOUT_S
) -> dict[TopicPartition, Offset]:
    """Delete all records before the given offsets.

    Returns:
        The first offset that each partition has now. Records that were deleted earlier are no error.

    Raises:
        KafkaUnavailable: the brokers don't answer or refuse, or an offset is after the partition's end.
    """
    if not offsets:
        return {}
    request = [
        TopicPartition(at.topic, at.partition, known_offset(offset, f"{at.topic}/{at.partition}"))
        for at, offset in offsets.items()
    ]

    def ask() -> dict[TopicPartition, Offset]:
        futures: dict[TopicPartition, Future[Any]] = _untyped(admin).delete_records(
            request, request_timeout=ATTEMPT_TIMEOUT_S, operation_timeout=ATTEMPT_TIMEOUT_S
        )
        return {
            TopicPartition(at.topic, at.partition): known_offset(
                future.result().low_watermark, f"{at.topic}/{at.partition}"
            )
            for at, future in futures.items()
        }

    with _asking(admin, "deleting records"):
        return ask_until_known(ask, timeout_s)


# --- fencing -------------------------------------------------------------------------------------------


def fencing_producers(settings: Settings, transactional_id: str) -> list[Producer]:
    """Two connected producers, for `fence_transactional_id`. They have no effect until they are used.

    Raises:
        KafkaUnavailable: the brokers don't answer.
    """
    producers = [make_producer(settings, transactional_id) for _ in range(2)]
    with _asking(settings, f"connecting to fence {transactional_id!r}"):
        for producer in producers:
            producer.list_topics(timeout=REQUEST_TIMEOUT_S)
    return producers


def fence_transactional_id(
    settings: Settings,
    transactional_id: str,
    timeout_s: float = REQUEST_TIMEOUT_S,
    ready: list[Producer] | None = None,
) -> None:
    """Abort open transactions of the id, and make the next call of its previous owner fail.

    When this returns, no transaction of any earlier producer with this id can commit any more. It takes about
    60 ms for an idle id, 90 ms with an open transaction. Calling it again does no harm.

    Args:
        settings: of the cluster.
        transactional_id: to be fenced.
        timeout_s: for all of it.
        ready: from `fencing_producers`, to save time. It is emptied.

    Raises:
        KafkaUnavailable: the broker didn't confirm it in time; the id may or may not be fenced.
    """
    deadline = time.monotonic() + timeout_s
    wait_s = FENCE_FIRST_WAIT_S
    # A producer whose initialisation met the open transaction sleeps for a fixed 500 ms before it asks
    # again; another one with the same id, asking a moment later, finds it aborted. The sleeper is destroyed
    # here, before anyone else uses the id: asking once more it would fence the next owner.
    connected = [] if ready is None else ready
    resting = len(connected)
    producer = connected.pop() if connected else make_producer(settings, transactional_id)
    while True:
        # If it is made only now, it connects while the first one asks.
        spare = connected.pop() if connected else make_producer(settings, transactional_id)
        try:
            # One that was connected long ago may ask a broker that hangs: then it is the next one's turn.
            connects_s = FENCE_RESTING_WAIT_S if resting > 0 else ATTEMPT_TIMEOUT_S
            resting -= 1
            producer.list_topics(timeout=min(connects_s, _remaining_s(deadline)))
            producer.init_transactions(min(wait_s, _remaining_s(deadline)))
            return
        except KafkaException as error:
            cause = cause_of(error)
            hopeless = cause.fatal() or not (cause.retriable() or cause.name() in _FENCE_AGAIN)
            if hopeless or time.monotonic() >= deadline:
                raise _unavailable(settings, f"fencing {transactional_id!r}", cause) from error
        producer = spare
        wait_s = min(wait_s * 4, 2.0)


_FENCE_AGAIN: Final = frozenset(
    {"_TIMED_OUT", "_TRANSPORT", "_ALL_BROKERS_DOWN", "_FENCED", "PRODUCER_FENCED", "INVALID_PRODUCER_EPOCH"}
    | {"CONCURRENT_TRANSACTIONS", "COORDINATOR_NOT_AVAILABLE", "NOT_COORDINATOR"}
)


def _remaining_s(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())
