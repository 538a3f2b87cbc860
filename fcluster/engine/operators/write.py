"""Write: the last step of a chain, which encodes its results and passes them to the port.

What no step has changed is written with its original bytes. A null value that was read as null is written as
null, whatever the codec. A handler's output isn't null unless a `Record` says so, also if steps follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from fcluster.common.failures import bounded_repr, type_of
from fcluster.common.ids import is_internal_topic
from fcluster.engine.operators.base import WriteRecord, field_of, without_field
from fcluster.engine.records import OUTPUT_TROUBLE, OutputPort, PassedRecord, SourceRecord
from fcluster.engine.steps import Place, RecordError, Step, StepFailure
from fcluster.graph.codecs import (
    Encode,
    encode_json,
    encode_json_without_models,
    key_codec,
    value_codec,
)
from fcluster.graph.description import rekey_description
from fcluster.graph.operators import Rekey, TopicSpec
from fcluster.graph.record import UNSET, Record

_dumps = orjson.dumps
_parted = bytes.partition
"""The fastest way to test what bytes contain, by 100 ns or more."""
ValueBytes = Callable[[SourceRecord, Any], bytes | None]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a chain ends.

    Attributes:
        topic: the topic that is written to.
        place: the place of failures while writing to it.
        gets_values_unchanged: no earlier step can have changed a value.
        is_behind_handler: an earlier step is a handler, so values aren't the source record's.
    """

    topic: TopicSpec
    place: Place
    gets_values_unchanged: bool
    is_behind_handler: bool


def discard(_record: SourceRecord, _key: bytes | None, _value: Any) -> None:
    """The last step of a chain that writes nothing."""


def compile_write(target: Target, source: TopicSpec, port: OutputPort) -> Step:
    """Write with the key that the record has."""
    sink, place = target.topic, target.place
    topic = sink.name
    value_bytes = _value_bytes(target, source)
    transcode = _key_transcoder(source, sink)
    nulls_stay = not target.is_behind_handler

    def write_unchanged(record: SourceRecord, key: bytes | None, _value: Any) -> None:
        try:
            port.produce(topic, record.value(), key, record.timestamp()[1], record.headers())
        except OUTPUT_TROUBLE as error:
            raise StepFailure(place, error) from error
        port.records += 1

    def write_json(record: SourceRecord, key: bytes | None, value: Any) -> None:
        try:
            if value is None and (nulls_stay or type(record) is PassedRecord) and record.value() is None:
                encoded = None
            else:
                encoded = _dumps(value)
                if _parted(encoded, b"null")[1]:
                    encoded = encode_json(value)
        except BaseException:  # noqa: BLE001  tried again in the slow path
            encoded = _encode_anew(value, place)
        try:
            port.produce(topic, encoded, key, record.timestamp()[1], record.headers())
        except OUTPUT_TROUBLE as error:
            raise StepFailure(place, error) from error
        port.records += 1

    def write(record: SourceRecord, key: bytes | None, value: Any) -> None:
        try:
            encoded = value_bytes(record, value)
            written_key = None if key is None else transcode(key) if transcode is not None else key
        except BaseException as error:
            raise StepFailure(place, error) from error
        try:
            port.produce(topic, encoded, written_key, record.timestamp()[1], record.headers())
        except OUTPUT_TROUBLE as error:
            raise StepFailure(place, error) from error
        port.records += 1

    if transcode is None and value_bytes is unchanged:
        return write_unchanged
    if transcode is None and sink.value == "json":
        return write_json
    return write


def compile_rekeyed_write(
    target: Target, source: TopicSpec, rekey: Rekey, rekey_place: Place, port: OutputPort
) -> Step:
    """Write with the key that `rekey` returns."""
    sink, place = target.topic, target.place
    topic = sink.name
    function = field_of(rekey, "key_by") if isinstance(rekey, str) else rekey
    encode_key = key_codec(sink.key)[1]
    value_bytes = _value_bytes(target, source)

    def write(record: SourceRecord, _key: bytes | None, value: Any) -> None:
        try:
            new_key = function(value)
            if new_key is None:
                raise _no_key(rekey, value)
            key = encode_key(new_key)
        except BaseException as error:
            raise StepFailure(rekey_place, error) from error
        try:
            encoded = value_bytes(record, value)
        except BaseException as error:
            raise StepFailure(place, error) from error
        try:
            port.produce(topic, encoded, key, record.timestamp()[1], record.headers())
        except OUTPUT_TROUBLE as error:
            raise StepFailure(place, error) from error
        port.records += 1

    return write


def compile_record_writer(
    target: TopicSpec | None,
    own_topic_place: Place,
    sink_place: Place,
    port_at: Callable[[Place], OutputPort],
    declared: frozenset[str],
    pass_on: WriteRecord | None = None,
) -> WriteRecord:
    """Write a `Record` to its own topic, or to `target` if it may go there.

    Args:
        own_topic_place: the handler's place. Its rule applies to mistakes in the record's fields, and to
            topics that the record names.
        sink_place: the place whose rule applies to `target`.
        port_at: returns the port of a place.
        declared: see `Stage.declared`; and the topics of the chain.
        pass_on: takes the records that name no topic, if steps follow.
    """
    own_port, sink_port = port_at(own_topic_place), port_at(sink_place)

    def write(source: SourceRecord, key: bytes | None, record: Record) -> None:
        topic = record.topic or target
        place, port = (own_topic_place, own_port) if record.topic is not None else (sink_place, sink_port)
        try:
            if topic is None:
                raise RecordError(
                    "a Record without a topic was yielded by a handler that has no target; give the Record a "
                    "topic, or the handler to=..."
                )
            if type(topic) is not TopicSpec or (declared and topic.name not in declared):
                named = topic.name if type(topic) is TopicSpec else topic
                raise RecordError(
                    f"a Record's topic is {bounded_repr(named)}, which isn't a topic of this job; it takes "
                    "what job.topic('...') returns"
                )
            if record.key is not UNSET:
                key = None if record.key is None else key_codec(topic.key)[1](record.key)
            if record.value is UNSET:
                raw = source.value()
            else:
                raw = None if record.value is None else value_codec(topic.value)[1](record.value)
            timestamp = (
                source.timestamp()[1] if record.timestamp is UNSET else checked_timestamp(record.timestamp)
            )
            headers = source.headers() if record.headers is UNSET else checked_headers(record.headers)
        except BaseException as error:
            raise StepFailure(own_topic_place if topic is None else place, error) from error
        try:
            port.produce(topic.name, raw, key, timestamp, headers)
        except OUTPUT_TROUBLE as error:
            raise StepFailure(place, error) from error
        port.records += 1

    def write_or_pass_on(source: SourceRecord, key: bytes | None, record: Record) -> None:
        if record.topic is None and pass_on is not None:
            pass_on(source, key, record)
        else:
            write(source, key, record)

    return write if pass_on is None else write_or_pass_on


def compile_passing_on(following: Step, source: TopicSpec, place: Place) -> WriteRecord:
    """Pass a `Record` without a topic to the steps that follow its handler, which is at `place`."""
    decode = value_codec(source.value)[0]

    def pass_on(record: SourceRecord, key: bytes | None, output: Record) -> None:
        try:
            if output.key is not UNSET:
                raise RecordError(
                    "a Record that sets a key was yielded, and steps follow the handler, whose state belongs "
                    "to the key of the shard; put key_by() behind the handler, or give the Record a topic"
                )
            if output.value is UNSET:
                raw = record.value()
                value = None if raw is None else decode(raw)
            else:
                value = output.value
            at_ms = None if output.timestamp is UNSET else checked_timestamp(output.timestamp)
            headers = () if output.headers is UNSET else (checked_headers(output.headers),)
            passed = PassedRecord(record, at_ms, headers, value is None)
        except BaseException as error:
            raise StepFailure(place, error) from error
        following(passed, key, value)

    return pass_on


def unchanged(record: SourceRecord, _value: Any) -> bytes | None:
    """The original bytes of the value."""
    return record.value()


def _value_bytes(target: Target, source: TopicSpec) -> ValueBytes:
    sink = target.topic
    if target.gets_values_unchanged and source.value == sink.value:
        return unchanged
    encode = value_codec(sink.value)[1]
    if sink.value == "json" and is_internal_topic(sink.name):
        encode = encode_json_without_models

    def behind_handler(record: SourceRecord, value: Any) -> bytes | None:
        if value is None and type(record) is PassedRecord and record.is_tombstone:
            return None
        return encode(value)

    def null_stays(record: SourceRecord, value: Any) -> bytes | None:
        # A null that was read, not JSON's null or a None that a map returned.
        return None if value is None and record.value() is None else encode(value)

    return behind_handler if target.is_behind_handler else null_stays


def _encode_anew(value: Any, place: Place) -> bytes:
    try:
        return encode_json(value)
    except BaseException as error:
        raise StepFailure(place, error) from error


def _key_transcoder(source: TopicSpec, sink: TopicSpec) -> Encode | None:
    """Turns a key's bytes in the source into its bytes in the sink. None if they are the same."""
    if source.key == sink.key:
        return None
    decode, encode = key_codec(source.key)[0], key_codec(sink.key)[1]
    return lambda key: encode(decode(key))


def _no_key(rekey: Rekey, value: Any) -> RecordError:
    lacks = without_field(rekey, value) if isinstance(rekey, str) else ""
    fields = f": {lacks}" if lacks else ""
    return RecordError(
        f"key_by by {rekey_description(rekey)} returned no key{fields}; correct it, or filter such records "
        "out before it"
    )


def checked_timestamp(timestamp: Any, what: str = "a Record's timestamp") -> int:
    """A timestamp that somebody gave.

    Args:
        what: what it is, for the message.

    Raises:
        TypeError, ValueError: Kafka doesn't take it.
    """
    if not isinstance(timestamp, int):
        raise TypeError(
            f"{what} is {bounded_repr(timestamp)}, a {type_of(timestamp)}; "
            "it takes milliseconds since 1970 as an int"
        )
    if not -1 <= timestamp < 2**63:
        raise ValueError(f"{what} is {bounded_repr(timestamp)}; Kafka takes 0 to 2**63 - 1")
    return timestamp


def checked_headers(headers: Any, what: str = "a Record's headers") -> list[tuple[str, bytes | None]] | None:
    """Headers that somebody gave. If the client doesn't accept them, that would show only when it is too
    late.

    Args:
        what: what they are, for the message.

    Raises:
        TypeError, ValueError: Kafka doesn't take them.
    """
    if headers is None:
        return None
    try:
        pairs: list[tuple[Any, Any]] = [(name, value) for name, value in headers]
    except (TypeError, ValueError):
        pairs = [(None, None)]
    checked: list[tuple[str, bytes | None]] = []
    for name, value in pairs:
        if isinstance(value, str):
            value = value.encode()
        if not isinstance(name, str) or not (value is None or isinstance(value, bytes)):
            raise TypeError(f"{what} are {bounded_repr(headers)}; they take pairs of a str and bytes or None")
        name.encode()  # half of a surrogate pair can't be written
        checked.append((name, value))
    return checked
