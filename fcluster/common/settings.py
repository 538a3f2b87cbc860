"""The settings of a cluster: their names, defaults, checks, and where each value came from.

Responsible for: one frozen `Settings`, resolved from the job file, `fcluster.toml`, the environment and
flags, later ones winning. Keeps the invariants: an unknown or bad setting is an error that names its origin
and never a silent default; secrets never appear in `repr`, in messages or in `redacted()`. Must not touch
the network, nor read anything but the TOML file it is given.

Names follow the Kafka ecosystem and are forgiving about dots, dashes, underscores and case. What begins
with `kafka.` passes through to librdkafka; `kafka.consumer.` and `kafka.producer.` to one kind of client.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, cast

from fcluster.common.errors import SettingsError
from fcluster.common.topology import Isolation

Guarantee = Literal["exactly-once", "at-least-once"]
SourceGapPolicy = Literal["fail", "continue"]
SinkMissingPolicy = Literal["stop", "create"]
TornPolicy = Literal["stop", "offsets", "delta"]

DEFAULT_TOML_NAME: Final = "fcluster.toml"
ENVIRONMENT_PREFIX: Final = "FCLUSTER_"
HANDED_FLAGS: Final = "FCLUSTER__FLAGS"
"""Environment variable in which a process hands flags with secrets to its children: unlike arguments, other
users can't see it."""
REDACTED: Final = "********"

_INT_MAX: Final = 2**31 - 1
_SECRET = re.compile(r"password|passphrase|secret|key|token|jaas|credential|oauthbearer|pem", re.IGNORECASE)
_NO_SECRETS: Final = {"security.keys.dir"}  # says where they are
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")
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
# Most of these Kubernetes puts into every pod for a service whose name begins with "fcluster".
_NOT_A_SETTING = re.compile(
    r"FCLUSTER_CACHE_DIR|FCLUSTER__.*|FCLUSTER_TEST_.*|FCLUSTER_(.*_)?(SERVICE_(HOST|PORT.*)|PORT(_[0-9]+_.*)?)"
)


class _BadValueError(Exception):
    """Says what would have been right: 'a whole number from 1 to 10'."""


def _setting(default: Any, parse: Callable[[Any], Any]) -> Any:
    return field(default=default, metadata={"parse": parse})


def parse_duration_ms(value: Any) -> int:
    """Milliseconds of a duration: a whole number of them, or a text such as "500ms", "10s", "1min", "2h".

    Raises:
        ValueError: it isn't a duration, or isn't a whole number of milliseconds.
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


def _duration(default: int, *, least: int, most: int = _INT_MAX) -> Any:
    def parse(value: Any) -> int:
        expected = f"a duration from {least} ms to {most} ms, as milliseconds or like '500ms', '10s', '1min'"
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
            raise _BadValueError("a text")
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
            raise _BadValueError("a host and a port, like '127.0.0.1:8080' or '[::]:8080', or nothing")
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
        # Kafka's own name for its exactly-once ends in v2.
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
    """The isolation level that `value` spells ("READ_COMMITTED", "read-committed", ...), None if none."""
    return _ISOLATION_SPELLINGS.get(str(value).strip().lower().replace("_", "-"))


@dataclass(frozen=True, repr=False)
class Settings:
    """All settings of a cluster; an attribute is the setting's name with underscores for dots.

    Attributes:
        bootstrap_servers: brokers as ``host:port,...``; empty: none were given.
        processing_guarantee: "exactly-once", or "at-least-once" (no transactions).
        commit_interval_min_ms: an epoch begins no sooner after the one before, when caught up.
        commit_interval_max_ms: nor later, with a backlog (`commit.interval.ms` sets it as well).
        checkpoint_timeout_ms: a worker silent in an epoch for longer is evicted.
        checkpoint_straggler_ms: an epoch doesn't wait longer for the last of its workers.
        record_timeout_ms: a handler may take so long for one record. Then its process ends, with a stack
            dump that names the record; if the same record takes as long once more, the step's `on_error`
            applies to it. 0: no bound.
        epoch_failures_max: an epoch that fails so often in a row, for the same reason and one that doesn't
            pass, stops the job.
        snapshot_interval_ms: between a shard's snapshots.
        snapshot_changelog_bytes_max: a shard whose deltas since its last snapshot are more than that is
            snapshotted before, so that a restore never has to replay much more; 0: only time decides.
        heartbeat_interval_ms: between a worker's signs of life.
        session_timeout_ms: a worker without any for so long is dead.
        offset_refresh_interval_ms: idle shards' offsets are committed again so often.
        transaction_timeout_ms: the broker aborts a transaction that is open for longer.
        state_dir: directory of local state.
        snapshots: directory or URL of the snapshot store; default: `snapshots` in `state_dir`.
        state_cache_entries_max: clean values kept decoded, for each shard and store.
        num_standby_replicas: warm copies of each shard on other workers, on other hosts if there are some: a
            take-over then has next to nothing to restore. 1 is recommended for state that takes long to copy.
        workers: processes that `fcluster up` starts.
        coordinator_address: where workers find the coordinator; empty: the journal says.
        coordinator_bind: where the coordinator listens.
        coordinator_advertised_address: ``host`` or ``host:port`` that others are told instead, where it can't
            be reached by the name or address that it sees itself; empty: what it sees.
        http_bind: ``host:port`` where the process answers `/live`, `/ready` and `/status`; port 0: any free
            one, which the log names; empty: nowhere.
        isolation_level: of the sources that name none themselves.
        source_gap: what deleted but unprocessed source records lead to: "fail" or "continue".
        sink_missing: what an output topic leads to that was deleted, or deleted and made again, since the
            job wrote to it: "stop" (the job stops and names it) or "create" (it is made anew, and the job
            goes on).
        torn_transaction: what becomes of a shard of which Kafka has committed one part of a transaction and
            aborted another: it is stopped ("stop"), or goes on from what one part says ("offsets",
            "delta"); see docs/guarantee.md.
        replication_factor: of topics the cluster creates; -1: 3, or the brokers' default if that is more,
            as far as there are so many brokers.
        insecure: allow control connections beyond loopback without keys.
        security_keys_dir: directory with the keys of control connections (`keys`); empty: they go without.
        epoch_records_max: an open epoch takes no more records.
        initial_rebalance_delay_ms: wait for more workers before the first assignment.
        coordinator_loss_bound_ms: workers go on without a coordinator for so long.
        worker_leave_timeout_ms: a worker that was asked to leave (SIGTERM) waits so long for its shards to
            move away warm; then it commits what it has processed and goes. 0: at once.
        kafka: passed through to librdkafka, by its own names, without the prefix `kafka.`.
        reading_group: no setting, but for the program to say: the group of consumers that neither
            join nor commit, since a broker asks even those whether they may read as that group.
            Empty: none in particular.
    """

    bootstrap_servers: str = _text("")
    processing_guarantee: Guarantee = _choice("exactly-once", "at-least-once")  # noqa: RUF009
    commit_interval_min_ms: int = _duration(10, least=0, most=3_600_000)
    commit_interval_max_ms: int = _duration(1000, least=1, most=3_600_000)
    checkpoint_timeout_ms: int = _duration(30_000, least=100, most=3_600_000)
    checkpoint_straggler_ms: int = _duration(100, least=1, most=3_600_000)
    record_timeout_ms: int = _duration(300_000, least=0, most=86_400_000)
    epoch_failures_max: int = _integer(10, least=1, most=_INT_MAX)
    snapshot_interval_ms: int = _duration(60_000, least=100)
    snapshot_changelog_bytes_max: int = _integer(256 * 1024 * 1024, least=1024 * 1024, most=2**50, also=0)
    heartbeat_interval_ms: int = _duration(500, least=10, most=600_000)
    session_timeout_ms: int = _duration(3000, least=50, most=3_600_000)
    offset_refresh_interval_ms: int = _duration(21_600_000, least=1000)
    transaction_timeout_ms: int = _duration(341_000, least=1000)
    state_dir: str = _text(".fcluster")
    snapshots: str = _text("")
    state_cache_entries_max: int = _integer(200_000, least=0, most=_INT_MAX)
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
    initial_rebalance_delay_ms: int = _duration(3000, least=0, most=3_600_000)
    coordinator_loss_bound_ms: int = _duration(30_000, least=100)
    worker_leave_timeout_ms: int = _duration(20_000, least=0, most=3_600_000)
    kafka: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    reading_group: str = ""

    def __post_init__(self) -> None:
        if not self.snapshots:
            object.__setattr__(self, "snapshots", str(Path(self.state_dir) / "snapshots"))

    def __repr__(self) -> str:
        return f"Settings({self.redacted()})"

    def as_mapping(self) -> dict[str, str]:
        """All values as texts by their dotted names: given to `resolve` as flags they make equal settings.

        Secrets are in it: for handing settings to another process, never for logs.
        """
        values = {_dotted(name): _as_text(getattr(self, name)) for name in _ATTRIBUTES}
        return values | {f"kafka.{key}": value for key, value in self.kafka.items()}

    def redacted(self) -> dict[str, str]:
        """`as_mapping` for logs and status: secrets are replaced, credentials in URLs too."""
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

_KAFKA_KEYS_WITH_UNDERSCORE: Final = ("log_level", "ssl_key", "ssl_certificate", "ssl_ca")
_KAFKA_KEYS_OWNED: Final = {
    "group.id": "it is the job's name",
    "group.instance.id": "workers assign their partitions themselves",
    "transactional.id": "ids belong to worker slots",
    "enable.idempotence": "processing.guarantee decides it",
    "enable.auto.commit": "offsets are committed with their epoch",
    "enable.auto.offset.store": "offsets are committed with their epoch",
    "auto.offset.reset": "the committed offsets decide, and source.gap what a gap leads to",
}


def redact(name: str, value: str) -> str:
    """`value` of the setting `name`, or a placeholder if the name sounds like a secret's."""
    secret = _SECRET.search(name) and name not in _NO_SECRETS
    return REDACTED if value and secret else _USER_INFO.sub(REDACTED, value)


def is_secret(name: str, value: str) -> bool:
    """Whether the value of the setting `name` must not be shown, at least not as it is."""
    return redact(name, value) != value


def hand_over(flags: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Flags for another process: those for its arguments, and those for its environment (`handed_flags`)."""
    secret = {name: value for name, value in flags.items() if is_secret(name, value)}
    return {name: value for name, value in flags.items() if name not in secret}, (
        {HANDED_FLAGS: json.dumps(secret)} if secret else {}
    )


def handed_flags(env: Mapping[str, str]) -> dict[str, str]:
    """The flags that the parent process put into the environment."""
    flags: dict[str, str] = json.loads(env.get(HANDED_FLAGS) or "{}")
    return flags


def default_toml(directory: Path) -> Path | None:
    """The `fcluster.toml` in `directory`, None if there is none."""
    path = directory / DEFAULT_TOML_NAME
    return path if path.is_file() else None


def resolve(
    job_settings: Mapping[str, Any],
    toml_path: Path | None,
    env: Mapping[str, str],
    flags: Mapping[str, Any],
) -> Settings:
    """The settings that hold, from the weakest origin to the strongest.

    Args:
        job_settings: from the job file.
        toml_path: an existing `fcluster.toml`, None for none (see `default_toml`).
        env: the environment; only names that begin with ``FCLUSTER_`` count, empty values don't.
        flags: by setting's name; values that are None don't count.

    Raises:
        SettingsError: a name is unknown, a value is bad, or two values contradict each other. The message
            names the origin of each value it speaks of.
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
                f"kafka.{key} = 'random' {origin} would tear the records of one key apart.",
                remedy="Remove it, or choose a partitioner that goes by the key.",
            )
        if not isinstance(value, str | int | float):
            raise SettingsError(
                f"kafka.{key} {origin} is neither a text nor a number.",
                remedy="Write it as librdkafka takes it.",
            )
        self._kafka[key] = _as_text(value)

    def settings(self) -> Settings:
        defaults = Settings()
        values: dict[str, Any] = {name: getattr(defaults, name) for name in _ATTRIBUTES}
        values |= {"snapshots": "", **self._values}
        self._follow(values)
        self._check(values)
        return Settings(**values, kafka=self._kafka)

    def _follow(self, values: dict[str, Any]) -> None:
        """Defaults give way to what was set, so that one setting alone can always be changed."""

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
    near = difflib.get_close_matches(plain, _ATTRIBUTE_BY_NAME, 1, 0.6)
    if near:
        remedy = f"Did you mean {near[0]}?"
    else:
        remedy = "Remove it; librdkafka's own settings go under kafka."
    return SettingsError(f"There is no setting {name!r} ({origin}).", remedy=remedy)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """TOML nests what is written with dots: `commit.interval.ms = 5` and the same in tables are equal."""
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
            f"The settings file {path} isn't valid TOML: {error}.", remedy="Correct it; texts need quotes."
        ) from error


def _dotted(attribute: str) -> str:
    return attribute.replace("_", ".")


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_settings(settings: Settings, **changes: Any) -> Settings:
    """A copy with some attributes changed; for the program's own use, values aren't checked."""
    return dataclasses.replace(settings, **changes)
