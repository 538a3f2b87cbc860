"""The settings of a cluster: their names, defaults, checks, and the origin of each value.

Responsible for: one frozen `Settings`, resolved from the job file, `fcluster.toml`, the environment and
flags; later ones win. Invariants: an unknown or bad setting is an error that names its origin, and never
silently becomes a default; secrets never appear in `repr`, in messages or in `redacted()`. Must not use the
network, or read anything but the TOML file that it is given.

Names follow the Kafka ecosystem. Dots, dashes, underscores and case don't matter. Names that begin with
`kafka.` are passed through to librdkafka. Those that begin with `kafka.consumer.` or `kafka.producer.` apply
to one kind of client. Names that begin with `schema.registry.` go to the schema registry's client.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, cast

from fcluster.common.errors import SettingsError
from fcluster.common.isolation import Isolation
from fcluster.common.spelling import near_names

Guarantee = Literal["exactly-once", "at-least-once"]
SourceGapPolicy = Literal["fail", "continue"]
SinkMissingPolicy = Literal["stop", "create"]
TornPolicy = Literal["stop", "offsets", "delta"]

DEFAULT_TOML_NAME: Final = "fcluster.toml"
ENVIRONMENT_PREFIX: Final = "FCLUSTER_"
HANDED_FLAGS: Final = "FCLUSTER__FLAGS"
"""Environment variable in which a process passes flags with secrets to its children. Other users can see a
process's arguments, but not its environment.
"""
REDACTED: Final = "********"

_INT_MAX: Final = 2**31 - 1
_SECRET = re.compile(
    r"password|passphrase|secret|key|token|jaas|credential|oauthbearer|pem|user\.info", re.IGNORECASE
)
_NO_SECRETS: Final = {"security.keys.dir"}  # only a path
_USER_INFO = re.compile(r"(?<=://)(?=[^/?#]*:|[^/?#]*@)(?:(?!://).)+(?=@)", re.DOTALL)
"""What is in front of the host of a URL. Passwords needn't be escaped: all up to the last "@" counts. So too
much is hidden of a URL with a port and an "@" in its path. Of several URLs, none hides the next one.
"""
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|sec|m|min|h|d)?", re.IGNORECASE)
_HOST_AND_PORT = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_UNIT_MS: Final = {
    "ms": 1,
    "s": 1000,
    "sec": 1000,
    "m": 60_000,
    "min": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
}
# Kubernetes sets most of these in every pod, for a service whose name begins with "fcluster".
_NOT_A_SETTING = re.compile(
    r"FCLUSTER_CACHE_DIR|FCLUSTER__.*|FCLUSTER_TEST_.*|FCLUSTER_(.*_)?(SERVICE_(HOST|PORT.*)|PORT(_[0-9]+_.*)?)"
)


class _BadValueError(Exception):
    """Its text says what is valid: 'a whole number from 1 to 10'."""


def _setting(default: Any, parse: Callable[[Any], Any]) -> Any:
    return field(default=default, metadata={"parse": parse})


def parse_duration_ms(value: Any) -> int:
    """Milliseconds of a duration: a whole number of them, or text like "500ms", "10s", "1min", "2h".

    Raises:
        ValueError: not a duration, or not a whole number of milliseconds.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not a duration")
    number, unit = match[1], _UNIT_MS[(match[2] or "ms").lower()]
    whole, _, fraction = number.partition(".")
    scaled = int(whole + fraction) * unit
    if scaled % 10 ** len(fraction):
        raise ValueError(f"{value!r} is not a duration")
    return scaled // 10 ** len(fraction)


def _duration(default: int, *, least: int, most: int = _INT_MAX, also: int | None = None) -> Any:
    def parse(value: Any) -> int:
        expected = f"a duration from {least} ms to {most} ms, in milliseconds, or like '500ms', '10s', '1min'"
        if also is not None:
            expected += f", or {also}"
            if str(value).strip() == str(also):
                return also
        try:
            duration_ms = parse_duration_ms(value)
        except ValueError:
            raise _BadValueError(expected) from None
        if not least <= duration_ms <= most:
            raise _BadValueError(expected)
        return duration_ms

    return _setting(default, parse)


def _integer(default: int, *, least: int, most: int, also: int | None = None) -> Any:
    def parse(value: Any) -> int:
        text = str(value).strip()
        number = int(text) if not isinstance(value, bool) and re.fullmatch(r"-?[0-9]{1,18}", text) else None
        if number is None or not (least <= number <= most or number == also):
            extra = "" if also is None else f", or {also}"
            raise _BadValueError(f"a whole number from {least} to {most}{extra}")
        return number

    return _setting(default, parse)


def _text(default: str) -> Any:
    def parse(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ",".join(str(item) for item in cast("list[Any]", value))
        if not isinstance(value, str | Path):
            raise _BadValueError("text")
        return str(value).strip()

    return _setting(default, parse)


def _advertised_address() -> Any:
    expected = (
        "a host's name or address, with or without a port: 'host-a', 'host-a:7070', 'tcp://host-a:7070'"
    )

    def parse(value: Any) -> str:
        text = str(value).strip().removeprefix("tcp://")
        if text and not re.fullmatch(r"([A-Za-z0-9._-]{1,255}|\[[0-9a-fA-F:.]{2,45}\])(:[0-9]{1,5})?", text):
            raise _BadValueError(expected)
        return text

    return _setting("", parse)


def _listening_address(default: str) -> Any:
    def parse(value: Any) -> str:
        text = str(value).strip()
        match = _HOST_AND_PORT.fullmatch(text)
        if text and (match is None or int(match[1]) > 65_535):
            raise _BadValueError("a host and a port, like '127.0.0.1:8080' or '[::]:8080', or empty")
        return text

    return _setting(default, parse)


def _boolean(default: bool) -> Any:
    def parse(value: Any) -> bool:
        text = str(value).strip().lower()
        if text in ("true", "1", "yes", "on"):
            return True
        if text in ("false", "0", "no", "off"):
            return False
        raise _BadValueError("true or false")

    return _setting(default, parse)


def _choice(default: str, *others: str) -> Any:
    def parse(value: Any) -> str:
        # Kafka's own name for its exactly-once mode ends in v2.
        plain = str(value).strip().lower().replace("_", "-").removesuffix("-v2")
        if plain not in (default, *others):
            raise _BadValueError(" or ".join(map(repr, (default, *others))))
        return plain

    return _setting(default, parse)


_ISOLATION_SPELLINGS: Final[Mapping[str, Isolation]] = {
    "read-committed": "read-committed",
    "read-uncommitted": "read-uncommitted",
}


def isolation_from(value: Any) -> Isolation | None:
    """The isolation level that `value` spells ("READ_COMMITTED", "read-committed", ...), or None."""
    return _ISOLATION_SPELLINGS.get(str(value).strip().lower().replace("_", "-"))


@dataclass(frozen=True, repr=False)
class Settings:
    """All settings of a cluster; an attribute is the setting's name with underscores for dots.

    Attributes:
        bootstrap_servers: Kafka brokers, as ``host:port,...``. Empty: none were given.
        processing_guarantee: "exactly-once", or "at-least-once" (no transactions).
        commit_interval_min_ms: the shortest time between the starts of two epochs; it applies while there is
            no backlog.
        commit_interval_max_ms: the longest time between the starts of two epochs; it applies while there is a
            backlog. `commit.interval.ms` is another name for it.
        checkpoint_timeout_ms: a worker that doesn't answer for this long during an epoch is evicted.
        checkpoint_straggler_ms: how long an epoch waits for its slowest workers before it completes for the
            others.
        record_timeout_ms: how long a handler may take for one record. If it takes longer, the process writes
            a stack dump that names the record, and exits. If the same record takes that long again, the
            step's `on_error` applies to it. 0: the limit is how long a transaction may be open
            (`record_bound_ms`).
        dead_letters_max: the job stops if all workers together write more dead letters than this to a topic,
            since the job's start. 0: no limit.
        epoch_failures_max: the job stops if an epoch fails this many times in a row for the same reason,
            unless that reason may be temporary.
        snapshot_interval_ms: time between two snapshots of a shard.
        snapshot_changelog_bytes_max: a shard with more bytes of deltas than this since its last snapshot is
            snapshotted early, so that a restore never has to replay much more. 0: only the interval counts.
        heartbeat_interval_ms: time between two of a worker's heartbeats.
        session_timeout_ms: a worker without heartbeats for this long is dead.
        offset_refresh_interval_ms: how often offsets of idle shards are committed again, so that the brokers
            don't expire them.
        transaction_timeout_ms: the brokers abort a transaction that is open for longer than this.
        state_dir: directory of local state.
        snapshots: directory or URL of the snapshot store. Default: `snapshots` in `state_dir`.
        state_memory_bytes: what the state of a worker process may take in memory: RocksDB's cache and write
            buffers, and values that are kept decoded. What the open epoch changes comes on top.
        num_standby_replicas: number of warm copies of each shard on other workers, if possible on other
            hosts. With a copy, a takeover has next to nothing to restore. 1 is recommended for large state.
        workers: number of worker processes that `fcluster up` starts.
        coordinator_address: the address at which workers reach the coordinator. Empty: they read it from the
            journal.
        coordinator_bind: the address on which the coordinator listens.
        coordinator_advertised_address: ``host`` or ``host:port`` that the coordinator announces to other
            processes. Set it if they can't reach the coordinator by the name or address that it finds itself.
            Empty: the address that it finds.
        http_bind: ``host:port`` of the HTTP port with `/live`, `/ready` and `/status`. Port 0: any free port,
            which the log names. Empty: no HTTP port.
        isolation_level: isolation level of sources that don't declare one.
        source_gap: what to do if source records were deleted before they were processed: "fail" or
            "continue".
        sink_missing: what to do if an output topic was deleted, or deleted and created again, since the job
            wrote to it: "stop" (the job stops and names the topic) or "create" (the topic is created again
            and the job goes on).
        torn_transaction: what to do with a shard if Kafka committed one part of a transaction and aborted
            another: stop the shard ("stop"), or continue from one of the parts ("offsets", "delta"). See
            docs/guarantee.md.
        replication_factor: replicas of topics that the cluster creates. -1: 3, or the brokers' default if
            that is higher, but at most the number of brokers.
        insecure: allow control connections beyond loopback without keys.
        security_keys_dir: directory with the keys of control connections. Empty: no keys.
        epoch_records_max: the most records in an open epoch.
        max_task_idle_ms: a shard that reads several topics processes the record with the smallest timestamp
            next. If one of the topics has no more records at the brokers, the shard waits this long for it
            before it processes records of the others. It always waits for records that are known to be at the
            brokers. -1: it never waits.
        initial_rebalance_delay_ms: how long to wait for more workers before the first assignment.
        coordinator_loss_bound_ms: how long workers keep processing without a coordinator.
        worker_leave_timeout_ms: how long a worker that was asked to leave (SIGTERM) waits for its shards to
            move to warm copies. After that it commits what it has processed and exits. 0: at once.
        kafka: passed through to librdkafka, by its own names, without the prefix `kafka.`.
        schema_registry: settings of the schema registry's client, by confluent-kafka's own names, without the
            prefix `schema.registry.`: `url`, `basic.auth.user.info`, `ssl.ca.location` and so on.
        reading_group: the consumer group of consumers that neither join nor commit, because a broker checks
            whether they may read as that group. Not a user's setting: the program sets it. Empty: no
            particular group.
    """

    bootstrap_servers: str = _text("")
    processing_guarantee: Guarantee = _choice("exactly-once", "at-least-once")  # noqa: RUF009
    commit_interval_min_ms: int = _duration(10, least=0, most=3_600_000)
    commit_interval_max_ms: int = _duration(1000, least=1, most=3_600_000)
    checkpoint_timeout_ms: int = _duration(30_000, least=100, most=3_600_000)
    checkpoint_straggler_ms: int = _duration(100, least=1, most=3_600_000)
    record_timeout_ms: int = _duration(300_000, least=0, most=86_400_000)
    dead_letters_max: int = _integer(0, least=0, most=_INT_MAX)
    epoch_failures_max: int = _integer(10, least=1, most=_INT_MAX)
    snapshot_interval_ms: int = _duration(60_000, least=100)
    snapshot_changelog_bytes_max: int = _integer(256 * 1024 * 1024, least=1024 * 1024, most=2**50, also=0)
    heartbeat_interval_ms: int = _duration(500, least=10, most=600_000)
    session_timeout_ms: int = _duration(3000, least=50, most=3_600_000)
    offset_refresh_interval_ms: int = _duration(21_600_000, least=1000)
    transaction_timeout_ms: int = _duration(341_000, least=1000)
    state_dir: str = _text(".fcluster")
    snapshots: str = _text("")
    state_memory_bytes: int = _integer(256 * 1024 * 1024, least=8 * 1024 * 1024, most=2**50)
    num_standby_replicas: int = _integer(0, least=0, most=16)
    workers: int = _integer(4, least=1, most=10_000)
    coordinator_address: str = _text("")
    coordinator_bind: str = _text("tcp://127.0.0.1:0")
    coordinator_advertised_address: str = _advertised_address()
    http_bind: str = _listening_address("")
    isolation_level: Isolation = _choice("read-committed", "read-uncommitted")  # noqa: RUF009
    source_gap: SourceGapPolicy = _choice("fail", "continue")  # noqa: RUF009
    sink_missing: SinkMissingPolicy = _choice("stop", "create")  # noqa: RUF009
    torn_transaction: TornPolicy = _choice("stop", "offsets", "delta")  # noqa: RUF009
    replication_factor: int = _integer(-1, least=1, most=32_767, also=-1)
    insecure: bool = _boolean(False)
    security_keys_dir: str = _text("")
    epoch_records_max: int = _integer(500_000, least=1, most=_INT_MAX)
    max_task_idle_ms: int = _duration(0, least=0, also=-1)
    initial_rebalance_delay_ms: int = _duration(3000, least=0, most=3_600_000)
    coordinator_loss_bound_ms: int = _duration(30_000, least=100)
    worker_leave_timeout_ms: int = _duration(20_000, least=0, most=3_600_000)
    kafka: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    schema_registry: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    reading_group: str = ""

    def __post_init__(self) -> None:
        if not self.snapshots:
            object.__setattr__(self, "snapshots", str(Path(self.state_dir) / "snapshots"))

    def __repr__(self) -> str:
        return f"Settings({self.redacted()})"

    @property
    def record_bound_ms(self) -> int:
        """How long a handler may take for one record. 0 means no limit.

        That is `record_timeout_ms`. If it is 0, a transaction still limits it: earlier records may have begun
        one, which the broker aborts each time that they are processed again.
        """
        if self.record_timeout_ms or self.processing_guarantee == "at-least-once":
            return self.record_timeout_ms
        return max(1, self.transaction_timeout_ms - self.commit_interval_max_ms - self.checkpoint_timeout_ms)

    def as_mapping(self) -> dict[str, str]:
        """All values as text by their dotted names. Passed to `resolve` as flags, they give equal settings.

        This includes secrets. Use it to pass settings to another process, never for logs.
        """
        values = {_dotted(name): _as_text(getattr(self, name)) for name in _ATTRIBUTES}
        values |= {f"kafka.{key}": value for key, value in self.kafka.items()}
        return values | {f"{_REGISTRY}{key}": value for key, value in self.schema_registry.items()}

    def redacted(self) -> dict[str, str]:
        """`as_mapping` for logs and status: secrets, and credentials in URLs, are replaced."""
        return {name: redact(name, value) for name, value in self.as_mapping().items()}


_PARSERS: Final[dict[str, Callable[[Any], Any]]] = {
    f.name: f.metadata["parse"] for f in fields(Settings) if "parse" in f.metadata
}
_ATTRIBUTES: Final = tuple(_PARSERS)
_ALIASES: Final = {
    "commit.interval.ms": "commit_interval_max_ms",
    "brokers": "bootstrap_servers",
    "kafka.consumer.isolation.level": "isolation_level",
    "kafka.isolation.level": "isolation_level",
    "kafka.bootstrap.servers": "bootstrap_servers",
    "kafka.metadata.broker.list": "bootstrap_servers",
    "kafka.transaction.timeout.ms": "transaction_timeout_ms",
    "kafka.producer.transaction.timeout.ms": "transaction_timeout_ms",
}
_ATTRIBUTE_BY_NAME: Final = {name.replace("_", "."): name for name in _ATTRIBUTES} | _ALIASES

_REGISTRY: Final = "schema.registry."
_REGISTRY_URL = re.compile(r"\s*(https?|mock)://")
_REGISTRY_KEYS: Final = (
    "url",
    "basic.auth.user.info",
    "bearer.auth.credentials.source",
    "bearer.auth.token",
    "bearer.auth.logical.cluster",
    "bearer.auth.identity.pool.id",
    "bearer.auth.client.id",
    "bearer.auth.client.secret",
    "bearer.auth.scope",
    "bearer.auth.issuer.endpoint.url",
    "ssl.ca.location",
    "ssl.certificate.location",
    "ssl.key.location",
    "ssl.key.password",
    "proxy",
    "timeout",
    "max.retries",
    "retries.wait.ms",
    "retries.max.wait.ms",
    "cache.capacity",
)
"""What confluent-kafka's client of a schema registry takes as text or a number."""
_KAFKA_KEYS_WITH_UNDERSCORE: Final = ("log_level", "ssl_key", "ssl_certificate", "ssl_ca")
_KAFKA_KEYS_OWNED: Final = {
    "group.id": "it is the job's name",
    "group.instance.id": "workers choose their partitions themselves",
    "transactional.id": "fcluster chooses the id for each worker slot",
    "enable.idempotence": "it follows from processing.guarantee",
    "enable.auto.commit": "offsets are committed with their epoch",
    "enable.auto.offset.store": "offsets are committed with their epoch",
    "auto.offset.reset": "the committed offsets decide, and source.gap decides about gaps",
}


def redact(name: str, value: str) -> str:
    """`value` of the setting `name`, or a placeholder if the name looks like a secret."""
    secret = _SECRET.search(name) and name not in _NO_SECRETS
    return REDACTED if value and secret else _USER_INFO.sub(REDACTED, value)


def is_secret(name: str, value: str) -> bool:
    """Whether the value of the setting `name` must not be shown unchanged."""
    return redact(name, value) != value


def hand_over(flags: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Flags for another process: those to pass as arguments, and those to pass in its environment
    (`handed_flags`).
    """
    secret = {name: value for name, value in flags.items() if is_secret(name, value)}
    return {name: value for name, value in flags.items() if name not in secret}, (
        {HANDED_FLAGS: json.dumps(secret)} if secret else {}
    )


def handed_flags(env: Mapping[str, str]) -> dict[str, str]:
    """The flags that the parent process passed in the environment."""
    flags: dict[str, str] = json.loads(env.get(HANDED_FLAGS) or "{}")
    return flags


def default_toml(directory: Path) -> Path | None:
    """The `fcluster.toml` in `directory`, or None."""
    path = directory / DEFAULT_TOML_NAME
    return path if path.is_file() else None


def resolve(
    job_settings: Mapping[str, Any],
    toml_path: Path | None,
    env: Mapping[str, str],
    flags: Mapping[str, Any],
) -> Settings:
    """The effective settings. The arguments are in order of precedence, lowest first.

    Args:
        job_settings: from the job file.
        toml_path: an existing `fcluster.toml`, or None (see `default_toml`).
        env: the environment. Only names that begin with ``FCLUSTER_`` are read; empty values are ignored.
        flags: by setting name. Values that are None are ignored.

    Raises:
        SettingsError: a name is unknown, a value is bad, or two values contradict each other. The message
            names the origin of each value that it mentions.
    """
    resolution = _Resolution()
    for name, value in _flat(job_settings):
        resolution.take(name, value, "in the job file")
    if toml_path is not None:
        for name, value in _flat(_read_toml(toml_path)):
            resolution.take(name, value, f"in {toml_path}")
    for name, value in env.items():
        if name.startswith(ENVIRONMENT_PREFIX) and value and not _NOT_A_SETTING.fullmatch(name):
            setting = name.removeprefix(ENVIRONMENT_PREFIX).lower()
            resolution.take(setting, value, f"in the environment variable {name}")
    for name, value in _flat(flags):
        if value is not None:
            resolution.take(name, value, "in the command's flags")
    return resolution.settings()


class _Resolution:
    """Collects values and remembers where each came from."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._kafka: dict[str, str] = {}
        self._registry: dict[str, str] = {}
        self._origins: dict[str, str] = {}

    def take(self, name: str, value: Any, origin: str) -> None:
        plain = re.sub(r"[-_]", ".", name.strip().lower())
        attribute = _ATTRIBUTE_BY_NAME.get(plain)
        if attribute is not None:
            try:
                self._values[attribute] = _PARSERS[attribute](value)
            except _BadValueError as expected:
                raise SettingsError(
                    f"{name} = {redact(name, str(value))!r} {origin} is not {expected}.",
                    remedy=f"Give {_dotted(attribute)} {expected}.",
                ) from None
            self._origins[attribute] = origin
        elif plain.startswith("kafka."):
            self._take_kafka(name.strip()[len("kafka.") :], value, origin)
        elif plain.startswith(_REGISTRY):
            self._take_registry(plain.removeprefix(_REGISTRY), value, origin)
        else:
            raise _unknown(name, plain, origin)

    def _take_kafka(self, key: str, value: Any, origin: str) -> None:
        if "." not in key and key not in _KAFKA_KEYS_WITH_UNDERSCORE:
            key = key.replace("_", ".")
        bare = key.removeprefix("consumer.").removeprefix("producer.").lower()
        if bare in _KAFKA_KEYS_OWNED:
            raise SettingsError(
                f"kafka.{key} {origin} can't be set: {_KAFKA_KEYS_OWNED[bare]}.", remedy="Remove it."
            )
        if bare == "partitioner" and str(value) == "random":
            raise SettingsError(
                f"kafka.{key} = 'random' {origin} would spread records of one key over several partitions.",
                remedy="Remove it, or choose a partitioner that uses the key.",
            )
        if not isinstance(value, str | int | float):
            raise SettingsError(
                f"kafka.{key} {origin} is neither text nor a number.",
                remedy="Write it in the form that librdkafka accepts.",
            )
        self._kafka[key] = _as_text(value)

    def _take_registry(self, key: str, value: Any, origin: str) -> None:
        if key not in _REGISTRY_KEYS:
            near = near_names(key, _REGISTRY_KEYS)
            raise SettingsError(
                f"There is no setting {_REGISTRY + key!r} ({origin}).",
                remedy=f"Did you mean {_REGISTRY}{near[0]}?"
                if near
                else f"Known are {_REGISTRY}url, basic.auth.user.info, ssl.ca.location, timeout and others.",
            )
        if not isinstance(value, str | int | float):
            raise SettingsError(
                f"{_REGISTRY}{key} {origin} is neither text nor a number.", remedy="Write it as text."
            )
        text = _as_text(value).strip()
        if key == "url" and text and not all(_REGISTRY_URL.match(one) for one in text.split(",")):
            # What is no URL isn't shown: it may have a password, which is only found in a URL.
            raise SettingsError(
                f"{_REGISTRY}url {origin} isn't a URL.",
                remedy=f'Write it as {_REGISTRY}url = "http://HOST:8081"; several with commas between them.',
            )
        self._registry[key] = text

    def settings(self) -> Settings:
        defaults = Settings()
        values: dict[str, Any] = {name: getattr(defaults, name) for name in _ATTRIBUTES}
        values |= {"snapshots": "", **self._values}
        self._follow(values)
        self._check(values)
        return Settings(**values, kafka=self._kafka, schema_registry=self._registry)

    def _follow(self, values: dict[str, Any]) -> None:
        """Adjust defaults to the values that were set, so that one setting can be changed alone."""

        def at_most(name: str, bound: int) -> None:
            if name not in self._values:
                values[name] = min(values[name], bound)

        def at_least(name: str, bound: int) -> None:
            if name not in self._values:
                values[name] = max(values[name], bound)

        at_most("commit_interval_min_ms", values["commit_interval_max_ms"])
        at_least("commit_interval_max_ms", values["commit_interval_min_ms"])
        at_most("heartbeat_interval_ms", values["session_timeout_ms"] // 3)
        at_least("session_timeout_ms", values["heartbeat_interval_ms"] * 3)
        at_most("checkpoint_straggler_ms", values["checkpoint_timeout_ms"])
        at_least("checkpoint_timeout_ms", values["checkpoint_straggler_ms"])
        open_ms = values["commit_interval_max_ms"] + values["checkpoint_timeout_ms"]
        if "transaction_timeout_ms" in self._values:
            at_most("record_timeout_ms", max(1, values["transaction_timeout_ms"] - open_ms - 1))
        at_least("transaction_timeout_ms", open_ms + values["record_timeout_ms"] + 10_000)

    def _check(self, values: Mapping[str, Any]) -> None:
        if values["commit_interval_min_ms"] > values["commit_interval_max_ms"]:
            self._contradiction(
                values,
                ("commit_interval_min_ms", "commit_interval_max_ms"),
                "the minimum is above the maximum",
                "Raise the maximum or lower the minimum.",
            )
        if values["heartbeat_interval_ms"] >= values["session_timeout_ms"]:
            self._contradiction(
                values,
                ("heartbeat_interval_ms", "session_timeout_ms"),
                "healthy workers would be taken for dead",
                "Set the session timeout to at least three heartbeat intervals.",
            )
        if values["checkpoint_straggler_ms"] > values["checkpoint_timeout_ms"]:
            self._contradiction(
                values,
                ("checkpoint_straggler_ms", "checkpoint_timeout_ms"),
                "a worker would be evicted before it could be late",
                "Raise the timeout or lower the straggler bound.",
            )
        others = ("commit_interval_max_ms", "checkpoint_timeout_ms", "record_timeout_ms")
        if values["transaction_timeout_ms"] <= sum(values[name] for name in others):
            self._contradiction(
                values,
                ("transaction_timeout_ms", *others),
                "transactions would expire while they wait for a record or for their epoch's commit",
                "Set transaction.timeout.ms above the sum of the other three.",
            )

    def _contradiction(
        self, values: Mapping[str, Any], names: tuple[str, ...], why: str, remedy: str
    ) -> NoReturn:
        said = ", ".join(
            f"{_dotted(name)} = {values[name]} ({self._origins.get(name, 'the default')})" for name in names
        )
        raise SettingsError(f"These settings contradict each other: {said}: {why}.", remedy=remedy)


def _unknown(name: str, plain: str, origin: str) -> SettingsError:
    near = near_names(plain, _ATTRIBUTE_BY_NAME)
    if near:
        remedy = f"Did you mean {near[0]}?"
    else:
        remedy = "Remove it; librdkafka's own settings go under kafka."
    return SettingsError(f"There is no setting {name!r} ({origin}).", remedy=remedy)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """TOML nests dotted names: `commit.interval.ms = 5` and the same setting in tables are equal."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"The settings file {path} can't be read: {error.strerror}.",
            remedy="Check its path and permissions.",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The settings file {path} isn't valid TOML: {error}.", remedy="Correct it; text needs quotes."
        ) from error


def _dotted(attribute: str) -> str:
    return attribute.replace("_", ".")


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_settings(settings: Settings, **changes: Any) -> Settings:
    """A copy with some attributes changed. Only for the program's own use: the values aren't checked."""
    return dataclasses.replace(settings, **changes)
