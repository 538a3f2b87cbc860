"""Requests to Kafka that are repeated until it knows the answer. Used for all requests besides reading and
writing.

Responsible for: recognising answers that say nothing, so that the request is repeated for a bounded time; and
turning errors into an `FclusterError` that says what was requested and what to do. Messages contain no
secrets. Must not know what the requests are for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from fcluster.common.errors import KafkaUnavailable
from fcluster.common.offsets import NotKnownYetError
from fcluster.common.settings import Settings

REQUEST_TIMEOUT_S: Final = 10.0
ANSWER_TIMEOUT_S: Final = 30.0
"""How long to repeat a request that Kafka can't answer yet: three times as long as Kafka takes to get over a
broker's death.
"""
ATTEMPT_TIMEOUT_S: Final = 3.0
"""The time limit of one such request. A dead broker doesn't answer, and the next request goes to another
one.
"""
POLL_INTERVAL_S: Final = 0.02
_POLL_INTERVAL_S_MAX: Final = 0.5
_Answer = TypeVar("_Answer")

# Errors on which a client keeps retrying, although that won't help: somebody has to correct a setting.
REFUSALS: Final = frozenset(
    {
        "_AUTHENTICATION",
        "SASL_AUTHENTICATION_FAILED",
        "UNSUPPORTED_SASL_MECHANISM",
        "ILLEGAL_SASL_STATE",
        "_SSL",
    }
)


def reason_of(error: KafkaException) -> str:
    """librdkafka's text, with the error's name."""
    cause = cause_of(error)
    return f"{cause.str()} ({cause.name()})"


_DETAILS = re.compile(r" \(after [0-9]+ms in state \w+(, [0-9]+ identical error\(s\) suppressed)?\)")


def said_by(error: KafkaError) -> str:
    """librdkafka's text without durations, so that the same error always has the same text."""
    return _DETAILS.sub("", error.str())


def cause_of(error: KafkaException) -> KafkaError:
    """The error in the exception. It has the code, and knows whether it can be retried."""
    cause = error.args[0] if error.args else None
    return cause if isinstance(cause, KafkaError) else KafkaError(KafkaError._FAIL, str(error))


@contextmanager
def asking(settings_or_admin: Settings | AdminClient | Consumer, what: str) -> Generator[None]:
    """Turns librdkafka's exceptions into an error that says what was requested."""
    try:
        yield
    except KafkaException as error:
        raise unavailable(settings_or_admin, what, cause_of(error)) from error


def unavailable(
    settings_or_admin: Settings | AdminClient | Consumer, what: str, cause: KafkaError
) -> KafkaUnavailable:
    """The error for a failed request. `what` says what was requested."""
    brokers = settings_or_admin.bootstrap_servers if isinstance(settings_or_admin, Settings) else ""
    where = f" at {brokers}" if brokers else ""
    return KafkaUnavailable(
        f"A request to Kafka{where} failed ({what}): {cause.str()} ({cause.name()}).",
        remedy=remedy_for(cause),
    )


def untyped(admin: Any) -> Any:
    """An admin client without its types: according to those, its methods return futures without a result
    type.
    """
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


# A partition's leader, or the coordinator of a group or transaction, is moving or has just started; a broker
# has died; or the client's metadata is outdated, as after a broker's restart. Repeating the request helps.
_NOT_KNOWN_YET: Final = frozenset(
    {"NOT_LEADER_FOR_PARTITION", "LEADER_NOT_AVAILABLE", "NOT_COORDINATOR", "COORDINATOR_NOT_AVAILABLE"}
    | {"COORDINATOR_LOAD_IN_PROGRESS", "_WAIT_COORD", "FENCED_LEADER_EPOCH", "UNKNOWN_LEADER_EPOCH"}
    | {"_NOENT", "_NOOP", "_TRANSPORT", "_TIMED_OUT", "_TIMED_OUT_QUEUE", "_ALL_BROKERS_DOWN"}
    | {"_WAIT_CACHE", "_IN_PROGRESS", "_DESTROY_BROKER", "_RETRY", "REQUEST_TIMED_OUT", "NETWORK_EXCEPTION"}
    | {"OFFSET_NOT_AVAILABLE", "REPLICA_NOT_AVAILABLE", "BROKER_NOT_AVAILABLE", "KAFKA_STORAGE_ERROR"}
    | {"UNSTABLE_OFFSET_COMMIT", "NOT_ENOUGH_REPLICAS", "NOT_ENOUGH_REPLICAS_AFTER_APPEND"}
    | {"NOT_CONTROLLER", "UNKNOWN_SERVER_ERROR"}
)
# A broker that has just started may answer this only because it hasn't heard of the topic yet.
_MISSING: Final = frozenset(
    {"UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_PARTITION", "_UNKNOWN_TOPIC", "UNKNOWN_TOPIC_ID"}
)
MISSING_TIMEOUT_S: Final = 2.0
"""How long a topic has to be missing from the answers before it counts as missing."""


def is_not_known_yet(error: KafkaError) -> bool:
    """Whether the error says nothing about what was requested, so that the request should be repeated."""
    return error.name() in _NOT_KNOWN_YET


def ask_until_known(
    ask: Callable[[], _Answer], timeout_s: float, given_up: Callable[[], bool] = lambda: False
) -> _Answer:
    """Repeat a request to Kafka, at growing intervals, as long as the answer says nothing.

    Args:
        ask: raises KafkaException or NotKnownYetError if there is no answer. One call may take
            `ATTEMPT_TIMEOUT_S`.
        timeout_s: how long to repeat it.
        given_up: says whether the answer is no longer needed.

    Raises:
        KafkaException: the last error, if no answer came in time; or an error that repeating doesn't fix.
    """
    begun_s = time.monotonic()
    wait_s = POLL_INTERVAL_S
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


def remaining_s(deadline: float) -> float:
    """The time until the deadline on the monotonic clock, never 0, which means "now" to some calls."""
    return max(0.001, deadline - time.monotonic())
