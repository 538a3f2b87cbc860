"""The client of a schema registry, and what its failures mean.

Responsible for: one client for each registry and process, made when the first key or value is read or
written; and for telling what a record is to blame for from what it isn't. Invariant: as long as a registry
doesn't answer, nothing is known about a schema. So no record becomes a dead letter because of that: the
client asks again, with growing pauses, then the worker tries the record again, for as long as it takes.
"""

from __future__ import annotations

import atexit
import json
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

from fcluster.common.errors import FormatUnavailable, FormatUnusable
from fcluster.common.failures import bounded_repr, bounded_text, describe_exception
from fcluster.common.settings import redact
from fcluster.graph.codecs import CodecUse

EXTRA: Final = "pip install 'fcluster[schema-registry]'"
_PREFIX: Final = "schema.registry."
_URL: Final = f"{_PREFIX}url"
_NUMBERS: Final[Mapping[str, Callable[[str], float]]] = {
    "timeout": float,
    "max.retries": int,
    "retries.wait.ms": int,
    "retries.max.wait.ms": int,
    "cache.capacity": int,
}
_DEFAULTS: Final[Mapping[str, float]] = {
    "timeout": 5.0,  # seconds
    "max.retries": 3,
    "retries.wait.ms": 250,
    "retries.max.wait.ms": 10_000,
}
"""For one attempt: about a second if nothing listens, 20 seconds if the registry is silent."""
_SHARE_OF_RECORD: Final = 0.2
"""What one request may take of the time for a record: a few may be needed for one."""
_RECORD_TIMEOUT: Final = "record.timeout.ms"
_RECORD_TIMEOUT_MS: Final = 300_000
"""If there is no limit."""
_ASKING: Final = (
    "get_schema",
    "get_schema_by_guid",
    "get_version",
    "lookup_schema",
    "register_schema_full_response",
)
"""The methods with which the serializers ask the registry."""
_SCHEMES: Final = ("http", "https", "mock")
_STAND_IN: Final = "mock://"
_NOT_FOUND: Final = 404
_UNKNOWN_SCHEMA: Final = (40403, 40402, 40401, 40400)
"""A registry's own codes for a schema, a version or a subject that it doesn't have; the last is that of the
client's stand-in. Whatever else answers with 404 (a proxy, or a registry at another path) has none of them.
"""
_CONFLICT: Final = 409
_CONFLICT_PAUSES_S: Final = (0.05, 0.2, 0.8)
_INVALID: Final = 422
_NOT_ALLOWED: Final = (401, 403)
_IN_TROUBLE: Final = (408, 429, 500, 502, 503, 504)

_registries: dict[tuple[Any, ...], Registry] = {}
_making = threading.Lock()


class UnknownSchemaError(Exception):
    """The registry has no schema with the id that a record names, or none that is registered as asked."""


class UnknownReferenceError(UnknownSchemaError):
    """The registry doesn't have a schema to which another one refers."""


class Registry:
    """A schema registry.

    Args:
        client: confluent-kafka's client of it.
        url: for messages.
    """

    def __init__(self, client: Any, url: str) -> None:
        self.client = client
        self.url = url
        for name in _ASKING:
            setattr(client, name, self._asking(getattr(client, name)))
        client.get_version = self._resolving(client.get_version)
        client.get_schema_by_guid = self._finding_guids(client.get_schema_by_guid)

    def call(self, function: Callable[..., Any], argument: Any, context: Any, subject: str) -> Any:
        """What a serializer or deserializer of the client returns.

        Raises:
            UnknownSchemaError: the registry says that it doesn't have the schema.
            FormatUnusable: the registry can't be asked, doesn't answer as one does, or refuses the schema.
            Whatever else the function raises: the argument is to blame.
        """
        from confluent_kafka.schema_registry import SchemaRegistryError
        from confluent_kafka.schema_registry.common._httpx_compat import httpx
        from confluent_kafka.schema_registry.error import OAuthTokenError

        try:
            for pause_s in _CONFLICT_PAUSES_S:
                try:
                    return function(argument, context)
                except SchemaRegistryError as error:
                    if error.http_status_code != _CONFLICT:
                        raise
                    # Or another worker is registering the same schema at this moment.
                    time.sleep(pause_s)
            return function(argument, context)
        except SchemaRegistryError as error:
            if error.http_status_code == _NOT_FOUND and error.error_code in _UNKNOWN_SCHEMA:
                raise UnknownSchemaError(error.error_message) from error
            raise self._refused(error, subject) from error
        except (httpx.HTTPError, OAuthTokenError, OSError) as error:
            is_silent = isinstance(error, httpx.TransportError | ConnectionError | TimeoutError)
            may_pass = is_silent and not isinstance(error, httpx.UnsupportedProtocol)
            kind = FormatUnavailable if may_pass and not _is_distrust(error) else FormatUnusable
            raise kind(
                f"the schema registry {self.url} can't be reached: {describe_exception(error)}",
                remedy="Start the registry, or correct schema.registry.url, and start the job again if it "
                "has stopped: it goes on with this record.",
            ) from error

    def ask(self, method: str, *arguments: Any, subject: str) -> Any:
        """What a method of the client returns.

        Raises:
            UnknownSchemaError, FormatUnusable: see `call`.
        """
        from confluent_kafka.schema_registry import SchemaRegistryError
        from confluent_kafka.schema_registry.common._httpx_compat import httpx
        from confluent_kafka.schema_registry.error import OAuthTokenError

        def asked(_argument: Any, _context: Any) -> Any:
            try:
                return getattr(self.client, method)(*arguments)
            except (FormatUnusable, UnknownSchemaError):
                raise
            except (SchemaRegistryError, httpx.HTTPError, OAuthTokenError, OSError):
                raise
            except Exception as error:
                raise self._no_registry(f"its answer can't be read ({describe_exception(error)})") from error

        return self.call(asked, None, None, subject)

    def _asking(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the client, of which no failure is taken for one of the argument.

        Only so can they be told apart: a login page isn't JSON, and neither is many a broken record.
        """
        from confluent_kafka.schema_registry import SchemaRegistryError
        from confluent_kafka.schema_registry.common._httpx_compat import httpx
        from confluent_kafka.schema_registry.error import OAuthTokenError

        def ask(*arguments: Any, **options: Any) -> Any:
            try:
                answer = method(*arguments, **options)
            except (SchemaRegistryError, httpx.HTTPError, OAuthTokenError, OSError):
                raise  # `call` knows these
            except json.JSONDecodeError as error:
                raise self._no_registry(f"it answered {bounded_repr(error.doc)}") from error
            except Exception as error:
                raise self._no_registry(f"its answer can't be read ({describe_exception(error)})") from error
            if getattr(answer, "schema_str", None) is None and getattr(answer, "schema_id", None) is None:
                self.client.clear_caches()  # the client keeps whatever was answered
                raise self._no_registry("its answer has neither a schema nor an id")
            return answer

        return ask

    def _resolving(self, get_version: Callable[..., Any]) -> Callable[..., Any]:
        """The method with which the deserializers ask for what a schema refers to."""
        from confluent_kafka.schema_registry import SchemaRegistryError

        def resolve(subject: str, version: Any, *options: Any, **named: Any) -> Any:
            try:
                return get_version(subject, version, *options, **named)
            except SchemaRegistryError as error:
                if error.http_status_code == _NOT_FOUND and error.error_code in _UNKNOWN_SCHEMA:
                    raise UnknownReferenceError(f"version {version} of {subject!r}") from error
                raise

        return resolve

    def _finding_guids(self, get_schema_by_guid: Callable[..., Any]) -> Callable[..., Any]:
        """The method with which the deserializers ask for the schema of an id that was in a header."""
        from confluent_kafka.schema_registry import SchemaRegistryError

        def find(guid: str, *options: Any, **named: Any) -> Any:
            try:
                return get_schema_by_guid(guid, *options, **named)
            except SchemaRegistryError as error:
                if error.http_status_code != _NOT_FOUND or error.error_code in _UNKNOWN_SCHEMA:
                    raise
                raise FormatUnusable(
                    f"the schema registry {self.url} doesn't know schemas by their GUIDs, which records have "
                    f"in headers (HTTP status {_NOT_FOUND} for {guid})",
                    remedy="Use a registry that does, or let the producer write ids in front of the data "
                    "(prefix_schema_id_serializer). If another address was meant, correct "
                    "schema.registry.url.",
                ) from error

        return find

    def _no_registry(self, what: str) -> FormatUnusable:
        return FormatUnusable(
            f"{self.url} doesn't answer as a schema registry does: {what}",
            remedy="Check schema.registry.url: it needs the path of the registry, if that has one "
            "(/apis/ccompat/v7 of Apicurio), and a proxy in front has to let workers through. Then start the "
            "job again: it goes on with this record.",
        )

    def _refused(self, error: Any, subject: str) -> FormatUnusable:
        status, message = error.http_status_code, bounded_text(str(error.error_message or "no message"), 300)
        if status == _NOT_FOUND:
            return self._no_registry(f"HTTP status {status}, {message}")
        if status in _NOT_ALLOWED:
            return FormatUnusable(
                f"the schema registry {self.url} refuses access (HTTP status {status}): {message}",
                remedy="Set schema.registry.basic.auth.user.info to NAME:PASSWORD, or what else it asks for.",
            )
        if status == _CONFLICT:
            return FormatUnusable(
                f"the schema registry {self.url} refuses the schema of {subject!r}, because it "
                f"doesn't go with those that are registered: {message}",
                remedy="Give new fields a default, and keep those that readers need; or change the "
                "compatibility level of the subject in the registry.",
            )
        if status == _INVALID:
            return FormatUnusable(
                f"the schema registry {self.url} refuses the schema of {subject!r} as invalid: {message}",
                remedy="Correct the schema.",
            )
        kind = FormatUnavailable if status in _IN_TROUBLE else FormatUnusable
        return kind(
            f"the schema registry {self.url} can't answer (HTTP status {status}): {message}",
            remedy="Check schema.registry.url, look for the reason in the registry's log, and start the job "
            "again if it has stopped: it goes on with this record.",
        )


def _is_distrust(error: BaseException) -> bool:
    """Whether a certificate is to blame."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, ssl.SSLCertVerificationError):
        found = found.__cause__ or found.__context__
    return found is not None


def registry_for(use: CodecUse, *, is_patient: bool = True) -> Registry:
    """The registry that the settings name.

    Args:
        use: has the settings.
        is_patient: whether it is asked again for as long as the settings say.

    Raises:
        FormatUnusable: they name none, or the client doesn't accept them.
    """
    given = {
        name.removeprefix(_PREFIX): str(value)
        for name, value in use.settings.items()
        if name.startswith(_PREFIX)
    }
    if not given.get("url"):
        raise FormatUnusable(
            f"the {use.part} of the topic {use.name!r} needs a schema registry, but schema.registry.url "
            "isn't set",
            remedy=f'Set it in fcluster.toml ({_URL} = "http://HOST:8081"), in the environment '
            "(FCLUSTER_SCHEMA_REGISTRY_URL), or with --set.",
        )
    if not is_patient:
        given |= {"max.retries": "1"}
    limit_ms = float(use.settings.get(_RECORD_TIMEOUT, 0)) or _RECORD_TIMEOUT_MS
    limit_s = limit_ms * _SHARE_OF_RECORD / 1000
    identity = (limit_s, *sorted(given.items()))
    with _making:
        known = _registries.get(identity)
        if known is None:
            known = _registries[identity] = _connect(given, limit_s)
    return known


def close_registries() -> None:
    """Close the connections of all clients. They are made anew when they are needed again."""
    with _making:
        registries = list(_registries.values())
        _registries.clear()
    for registry in registries:
        registry.client.close()


atexit.register(close_registries)


def _connect(given: Mapping[str, str], limit_s: float) -> Registry:
    from confluent_kafka.schema_registry import SchemaRegistryClient

    _check_url(given["url"])
    _check_files(given)
    try:
        numbers = {name: number(given[name]) for name, number in _NUMBERS.items() if name in given}
        conf = within_limit({**_DEFAULTS, **given, **numbers}, limit_s)
        client = cast("Any", SchemaRegistryClient).new_client(conf)
    except (ValueError, TypeError, OSError) as error:
        raise FormatUnusable(
            f"the settings {_PREFIX}* can't be used: {describe_exception(error)}",
            remedy="Correct them in fcluster.toml, the environment or the command's flags.",
        ) from error
    if given["url"].startswith(_STAND_IN):
        _number_as_registries_do(client)
    return Registry(client, redact(_URL, given["url"]))


def within_limit(conf: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
    """The client's configuration, with so few retries that a request ends by `limit_s`, whatever happens.

    A record that takes longer than `record.timeout.ms` is taken for one that hangs, and in the end its
    `on_error` applies. A registry that is down must not lead to that. The worker tries the record again
    anyway.
    """
    urls = str(conf["url"]).count(",") + 1
    timeout_s = min(conf["timeout"], limit_s)
    retries, left_s, pause_s = 0, limit_s - urls * timeout_s, conf["retries.wait.ms"] / 1000
    while retries < conf["max.retries"]:
        left_s -= urls * (timeout_s + min(pause_s, conf["retries.max.wait.ms"] / 1000))
        if left_s < 0:
            break
        retries, pause_s = retries + 1, pause_s * 2
    return {**conf, "timeout": timeout_s, "max.retries": retries}


def _number_as_registries_do(client: Any) -> None:
    """Let the client's stand-in for a registry give equal schemas one id, whatever their subjects are.

    Otherwise equal keys of two topics would have different bytes, and a join that works would find nothing.
    """
    ids: dict[str, tuple[Any, Any]] = {}

    def numbered(method: Callable[..., Any]) -> Callable[..., Any]:
        def answer(subject: str, schema: Any, *options: Any, **named: Any) -> Any:
            given = method(subject, schema, *options, **named)
            schema_id, guid = ids.setdefault(json.dumps(schema.to_dict()), (given.schema_id, given.guid))
            return type(given)(given.subject, given.version, schema_id, guid, given.schema)

        return answer

    for name in ("register_schema_full_response", "lookup_schema"):
        setattr(client, name, numbered(getattr(client, name)))


def _check_files(given: Mapping[str, str]) -> None:
    """Check that files can be read: the client's own messages don't say which one is missing.

    Raises:
        FormatUnusable: one can't be.
    """
    for name, path in given.items():
        if not name.startswith("ssl.") or not name.endswith(".location"):
            continue
        try:
            readable = Path(path).is_dir() or bool(Path(path).read_bytes())
            why = "it is empty"
        except OSError as error:
            readable, why = False, describe_exception(error)
        if not readable:
            raise FormatUnusable(
                f"the settings {_PREFIX}* can't be used: {_PREFIX}{name} is {path!r}, and {why}",
                remedy="Correct the path. A relative one begins in the directory in which workers run.",
            )


def _check_url(url: str) -> None:
    """Check it here: the client's own messages show passwords in it.

    Raises:
        FormatUnusable: it isn't a URL, or one of several isn't.
    """
    from confluent_kafka.schema_registry.common._httpx_compat import httpx

    try:
        valid = all(httpx.URL(one.strip()).scheme in _SCHEMES for one in url.split(","))
    except httpx.InvalidURL:
        valid = False
    if not valid:
        raise FormatUnusable(
            f"the settings {_PREFIX}* can't be used: {_URL} isn't a URL",
            remedy=f'Write it as {_URL} = "http://HOST:8081"; several with commas between them.',
        )
