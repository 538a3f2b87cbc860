"""Questions to the brokers as a whole: whether they answer, and what their settings allow.

Responsible for: a first connection that fails with a reason and a remedy, and reading single numbers from the
settings of brokers and topics.
"""

from __future__ import annotations

import time

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (
    AdminClient,
    ConfigResource,  # pyright: ignore[reportPrivateImportUsage]
)

from fcluster.common.errors import KafkaUnavailable, SettingsError
from fcluster.common.settings import Settings
from fcluster.kafka.asking import (
    REFUSALS,
    REQUEST_TIMEOUT_S,
    asking,
    cause_of,
    remaining_s,
    remedy_for,
    said_by,
    untyped,
)


def connect_or_raise(admin: AdminClient, settings: Settings, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
    """Check that the brokers answer, and allow what the settings ask for.

    Raises:
        KafkaUnavailable: they don't answer within `timeout_s` seconds, or none are given.
        SettingsError: `transaction.timeout.ms` is higher than they allow.
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
        said = f"answered within {timeout_s:g} s" if cause.name() not in REFUSALS else "accepts this client"
        raise KafkaUnavailable(
            f"No Kafka broker at {brokers} {said}: {said_by(cause)}.", remedy=remedy
        ) from error
    if settings.processing_guarantee == "exactly-once":
        _check_transaction_timeout(admin, settings)


def _list_topics_unless_refused(admin: AdminClient, timeout_s: float) -> None:
    """Raise KafkaException when the brokers have rejected us, or haven't answered in time. librdkafka itself
    would keep trying a wrong password until then.
    """
    deadline = time.monotonic() + timeout_s
    wait_s = 0.5
    while True:
        try:
            admin.list_topics(timeout=min(wait_s, remaining_s(deadline)))
            return
        except KafkaException:
            admin.poll(0)  # notes the reasons
            last_error: KafkaError | None = getattr(admin, "last_error", None)
            if time.monotonic() >= deadline or (last_error is not None and last_error.name() in REFUSALS):
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
    """A number in a broker's configuration. None if we lack the permission to see it."""
    with asking(admin, "listing the brokers"):
        broker = next(iter(admin.list_topics(timeout=REQUEST_TIMEOUT_S).brokers))
    return _number_in(admin, ConfigResource(ConfigResource.Type.BROKER, str(broker)), name)


def largest_batch(admin: AdminClient, topic: str) -> int | None:
    """The largest batch of records that a topic accepts, in bytes. None if we lack the permission to see
    it.
    """
    return _number_in(admin, ConfigResource(ConfigResource.Type.TOPIC, topic), "max.message.bytes")


def _number_in(admin: AdminClient, resource: ConfigResource, name: str) -> int | None:
    try:
        futures = untyped(admin).describe_configs([resource], request_timeout=REQUEST_TIMEOUT_S)
        entries = futures[resource].result()
        return int(entries[name].value)
    except (KafkaException, KeyError, TypeError, ValueError):
        return None
