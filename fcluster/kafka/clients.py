"""Kafka clients as fcluster uses them, and their configuration.

Responsible for: creating clients. They are created only here, so that settings, defaults and log routing
apply to all of them. Also for refusing requests that a client must not make (`Admin`). Invariant: messages
contain no secrets. Must not know what clients are used for, and keeps no state between calls.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from typing import Any, Final, NoReturn, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from fcluster.common.errors import SettingsError
from fcluster.common.isolation import Isolation
from fcluster.common.settings import Settings
from fcluster.kafka.asking import REFUSALS, REQUEST_TIMEOUT_S, reason_of, remedy_for, said_by, untyped

SOCKET_TIMEOUT_MS: Final = 8_000
"""How long to wait for a broker's answer before it counts as dead and its successor is looked for. Brokers
take as long to notice (`broker.session.timeout.ms`, 9 s).
"""
PRODUCER_SOCKET_TIMEOUT_MS: Final = 12_000
"""The same for producers. Every leader makes them wait while a dead follower is still in sync, until its
session ends. With a shorter timeout, requests that are fine would be repeated, and the offset of a repeated
record isn't reported.
"""
CONNECTED_TIMEOUT_MS: Final = 5_000
"""The same for the first answer on a new connection. That answer costs a broker nothing."""
METADATA_REFRESH_MS: Final = 5_000
"""How often a client asks a broker for the leaders of the partitions that it reads or writes."""
SERVE_REST_S: Final = 5.0

_NO_GROUP: Final = "fcluster-reader"
"""For consumers that neither commit nor join, outside any job: librdkafka requires a name."""
_LEADERS_KNOWN_S: Final = 0.2
"""How long a list of leaders is used. If one is lost meanwhile, that may cost the process (decision 0080)."""

_Client = TypeVar("_Client")

_kafka_logger = logging.getLogger("fcluster.kafka")

_COMMON: Final[Mapping[str, Any]] = {
    "client.id": "fcluster",
    "socket.keepalive.enable": True,
    "reconnect.backoff.max.ms": 1000,  # a restarted broker is found again within a second, not ten
    "log.connection.close": False,
    # A broker that hangs keeps its connections open and answers nothing. Only when a request has waited this
    # long does it count as down, and its successor is looked for once a second. librdkafka's default is 60 s;
    # with transactions it is transaction.timeout.ms.
    "socket.timeout.ms": SOCKET_TIMEOUT_MS,
    "api.version.request.timeout.ms": CONNECTED_TIMEOUT_MS,
    "socket.connection.setup.timeout.ms": SOCKET_TIMEOUT_MS,
    # A broker that is cut off only from the other brokers still believes that it leads: consumers get nothing
    # new from it, and no error. Only another broker's metadata shows the change (default: five minutes).
    "topic.metadata.refresh.interval.ms": METADATA_REFRESH_MS,
}
_CONSUMER: Final[Mapping[str, Any]] = {
    "enable.auto.commit": False,
    "auto.offset.reset": "error",  # a gap must be an error that names it, never a silent jump
    "allow.auto.create.topics": False,
}
_PRODUCER: Final[Mapping[str, Any]] = {
    "enable.idempotence": True,
    "socket.timeout.ms": PRODUCER_SOCKET_TIMEOUT_MS,
    "partitioner": "murmur2_random",  # Java's: a key gets the same partition, whoever writes it
    "linger.ms": 1,
    "compression.type": "lz4",
    "retry.backoff.ms": 2,  # how long each epoch waits on CONCURRENT_TRANSACTIONS; the default is 100
    # A coordinator that has just been elected loads for a while. With the default of 1 s, each of an epoch's
    # requests would come half a second late.
    "retry.backoff.max.ms": 250,
}
LASTING: Final[Mapping[str, Any]] = {"enable.sparse.connections": False}
"""For clients that read or write a few partitions for a long time: they connect to all brokers, not only to
those that they need. If they needed only one, and that one were cut off from the others, they could ask no
other broker who leads now.
"""
# If a caller sets one of these, the user can't override it: the caller's code depends on it.
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

# librdkafka logs these although it handles them itself, or also reports them as errors that we handle.
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


def consumer_config(settings: Settings, isolation: Isolation, **extra: Any) -> dict[str, Any]:
    """librdkafka's configuration of a consumer.

    The user's own `kafka.` settings override `extra`, except for those that the caller's code depends on.

    Args:
        settings: the cluster's settings.
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
        # By default librdkafka forgets all brokers when none is up. It then sends offsets to the group
        # coordinator that it remembers, to which it has no connection any more: the call never returns, not
        # even at its timeout (librdkafka #5511, #5456; decision 0073). So brokers are kept for as long as a
        # session lasts, and reconnected to.
        defaults["metadata.recovery.strategy"] = "none"
        # A request for a dead coordinator is looked at again only when some connection changes: at the latest
        # when it is closed for being idle (decision 0082). The default is nine minutes.
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

    If the reports of a fenced producer haven't been served when it is destroyed, they corrupt the heap, and
    some thread that ends later is aborted because of that (decision 0073).
    """
    with contextlib.suppress(KafkaException):
        producer.purge()
    deadline_s = time.monotonic() + SERVE_REST_S
    while len(producer) and time.monotonic() < deadline_s:
        # A fatal error is raised in the code that serves it; as SystemError, if another callback is due with
        # it.
        with contextlib.suppress(KafkaException, SystemError):
            producer.poll(0.05)


class Admin(AdminClient):
    """An admin client that remembers why it could not connect, and sends requests to partitions' leaders one
    at a time.

    `list_offsets` and `delete_records` look for leaders in librdkafka's metadata cache. If a leader isn't
    there, librdkafka waits for a change of the cache both in the calling thread and in its own main thread.
    Either of them may free what the other one uses, and the process crashes (decision 0080). So these two are
    called here only when the cache has all leaders, by one thread at a time, which waits for the answers.

    It refuses requests to a group's coordinator. If such a request has timed out when the coordinator's
    broker comes back, librdkafka aborts the process (decision 0083).
    """

    def __init__(self, config: dict[str, Any], **extra: Any) -> None:
        self.last_error: KafkaError | None = None
        self._asking_leaders = threading.RLock()
        self._leaders_known_s: dict[tuple[str, int], float] = {}
        with_callback: dict[str, Any] = config | {"error_cb": self._note_error}
        super().__init__(with_callback, **extra)

    def list_offsets(self, topic_partition_offsets: Any, **kwargs: Any) -> dict[TopicPartition, Future[Any]]:
        """Like AdminClient's, but it returns only when all answers are there.

        Raises:
            KafkaException: a partition's leader isn't known at present. Nothing was requested.
        """
        return self._ask_leaders(untyped(super()).list_offsets, topic_partition_offsets, kwargs)

    def delete_records(
        self, topic_partition_offsets: Any, **kwargs: Any
    ) -> dict[TopicPartition, Future[Any]]:
        """Like AdminClient's, but it returns only when all answers are there.

        Raises:
            KafkaException: a partition's leader isn't known at present. Nothing was requested.
        """
        return self._ask_leaders(untyped(super()).delete_records, topic_partition_offsets, kwargs)

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
                self._leaders_known_s.clear()  # librdkafka has forgotten some, or should forget them
            return futures

    def _have_leaders_cached(self, partitions: Iterable[TopicPartition], timeout_s: float) -> None:
        wanted = [(at.topic, at.partition) for at in partitions]
        now_s = time.monotonic()
        if all(now_s < self._leaders_known_s.get(at, 0.0) for at in wanted):
            return
        # This asks for all topics: asking for a single one may create it, if the brokers create topics
        # automatically.
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
        # "all brokers down" always comes last, and says less than the errors before it.
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


class ErrorLog:
    """Errors that clients report by themselves. It logs them once in a while, and remembers a rejection.

    Args:
        brokers: for the message.
        quiet: only remember the rejection; the owner reports it.
    """

    INTERVAL_S = 10.0

    def __init__(self, brokers: str, *, quiet: bool = False) -> None:
        self.refusal: KafkaError | None = None
        """Why the brokers last rejected us. The cause may have been corrected since."""
        self._brokers = brokers
        self._quiet = quiet
        self._silent_until = dict[bool, float]()

    def __call__(self, error: KafkaError) -> None:
        refused = error.name() in REFUSALS
        if refused:
            self.refusal = error
        if self._quiet or (not refused and error.code() != KafkaError._ALL_BROKERS_DOWN):
            return  # all other errors are raised by calls
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
