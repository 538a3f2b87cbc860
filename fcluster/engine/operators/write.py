"""Write: the last step of a chain, which encodes its results and passes them to the port.

What no step has changed is written with its original bytes. A null value that was read as null is written as
null, whatever the codec. A handler's output isn't null unless a `Record` says so, also if steps follow.

Invariant: equal keys are equal bytes in a topic, whichever output of the job they belong to: results, a
`Record` without a key, a late record. A key carries over to all of them in the same way, or to none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from fcluster.common.failures import bounded_repr, type_of
from fcluster.common.ids import is_internal_topic
from fcluster.engine.framing import ID_HEADERS, compile_parting, without_stale_ids
from fcluster.engine.operators.base import WriteRecord, without_field
from fcluster.engine.records import OUTPUT_TROUBLE, Headers, OutputPort, PassedRecord, SourceRecord
from fcluster.engine.steps import Place, RecordError, Step, StepFailure
from fcluster.graph.codecs import (
    KEY_ID_HEADER,
    VALUE_ID_HEADER,
    Decode,
    Encode,
    Kind,
    ModelCodec,
    codec_name,
    encode_json,
    encode_json_without_models,
    id_header,
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
    transcode, part = _compile_carrying(source.key, sink.key), compile_parting(sink)
    nulls_stay = not target.is_behind_handler

    def write_unchanged(record: SourceRecord, key: bytes | None, _value: Any) -> None:
        try:
            value, headers = record.value(), record.headers()
            if headers:
                headers = without_stale_ids(headers, record, key, value)
            port.produce(topic, value, key, record.timestamp()[1], headers)
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
            headers = record.headers()
            if headers:
                headers = without_stale_ids(headers, record, key, encoded)
            port.produce(topic, encoded, key, record.timestamp()[1], headers)
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
            headers = record.headers()
            if headers:
                headers = without_stale_ids(headers, record, written_key, encoded)
            if part is not None:
                written_key, encoded, headers = part(written_key, encoded, headers)
            port.produce(topic, encoded, written_key, record.timestamp()[1], headers)
        except OUTPUT_TROUBLE as error:
            raise StepFailure(place, error) from error
        port.records += 1

    if transcode is not None or part is not None:
        return write
    if value_bytes is unchanged:
        return write_unchanged
    return write_json if sink.value == "json" else write


def compile_rekeyed_write(
    target: Target,
    source: TopicSpec,
    rekey: Rekey,
    key_of: Callable[[Any], Any],
    rekey_place: Place,
    port: OutputPort,
) -> Step:
    """Write with the key that `key_of` returns, which is what `rekey` says."""
    sink, place = target.topic, target.place
    topic = sink.name
    encode_key, part = key_codec(sink.key)[1], compile_parting(sink)
    value_bytes = _value_bytes(target, source)

    def write(record: SourceRecord, _key: bytes | None, value: Any) -> None:
        try:
            new_key = key_of(value)
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
            headers = record.headers()
            if headers:
                headers = without_stale_ids(headers, record, key, encoded)
            if part is not None:
                key, encoded, headers = part(key, encoded, headers)
            port.produce(topic, encoded, key, record.timestamp()[1], headers)
        except OUTPUT_TROUBLE as error:
            raise StepFailure(place, error) from error
        port.records += 1

    return write


class _Outlet:
    """How a `Record` of a handler is written to a topic.

    Args:
        topic: the topic.
        source: the topic that the chain reads.

    Attributes:
        encode_key, encode_value: encode what the `Record` sets.
        carry_key, carry_value: turn bytes of the source, which carry over, into those of the topic. None:
            they are the same.
        part: see `compile_parting`.
        checked: the headers that are left out of those that the `Record` sets, if they have a stale id.
    """

    __slots__ = ("carry_key", "carry_value", "checked", "encode_key", "encode_value", "part")

    def __init__(self, topic: TopicSpec, source: TopicSpec) -> None:
        self.encode_key, self.encode_value = key_codec(topic.key)[1], value_codec(topic.value)[1]
        self.carry_key = _compile_carrying(source.key, topic.key)
        self.carry_value = None
        has_value_ids = id_header(source.value, "value") or id_header(topic.value, "value")
        if has_value_ids and "bytes" not in (source.value, topic.value):
            self.carry_value = _transcoder(value_codec(source.value)[0], self.encode_value)
        self.part = compile_parting(topic)
        # Who writes bytes knows what their id is.
        kinds = {KEY_ID_HEADER: topic.key, VALUE_ID_HEADER: topic.value}
        self.checked = frozenset(header for header, kind in kinds.items() if kind != "bytes")


def compile_record_writer(
    target: TopicSpec | None,
    source: TopicSpec,
    own_topic_place: Place,
    sink_place: Place,
    port_at: Callable[[Place], OutputPort],
    declared: frozenset[str],
    pass_on: WriteRecord | None = None,
) -> WriteRecord:
    """Write a `Record` to its own topic, or to `target` if it may go there.

    Args:
        target: the topic of records that name none.
        source: the topic that the chain reads.
        own_topic_place: the handler's place. Its rule applies to mistakes in the record's fields, and to
            topics that the record names.
        sink_place: the place whose rule applies to `target`.
        port_at: returns the port of a place.
        declared: see `Stage.declared`; and the topics of the chain.
        pass_on: takes the records that name no topic, if steps follow.
    """
    own_port, sink_port = port_at(own_topic_place), port_at(sink_place)
    outlets: dict[str, _Outlet] = {}

    def outlet_of(topic: TopicSpec) -> _Outlet:
        outlet = outlets.get(topic.name)
        if outlet is None:
            outlet = outlets[topic.name] = _Outlet(topic, source)
        return outlet

    def write(read: SourceRecord, key: bytes | None, record: Record) -> None:
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
            outlet = outlet_of(topic)
            if record.key is not UNSET:
                key = None if record.key is None else outlet.encode_key(record.key)
            elif key is not None and outlet.carry_key is not None:
                key = outlet.carry_key(key)
            if record.value is not UNSET:
                raw = None if record.value is None else outlet.encode_value(record.value)
            else:
                raw = read.value()
                if raw is not None and outlet.carry_value is not None:
                    raw = outlet.carry_value(raw)
            timestamp = (
                read.timestamp()[1] if record.timestamp is UNSET else checked_timestamp(record.timestamp)
            )
            is_passed_on = record.headers is UNSET
            headers: Headers | None = read.headers() if is_passed_on else checked_headers(record.headers)
            if headers:
                checked = ID_HEADERS if is_passed_on else outlet.checked
                headers = without_stale_ids(headers, read, key, raw, checked)
            if outlet.part is not None:
                key, raw, headers = outlet.part(key, raw, headers)
        except BaseException as error:
            raise StepFailure(own_topic_place if topic is None else place, error) from error
        try:
            port.produce(topic.name, raw, key, timestamp, headers)
        except OUTPUT_TROUBLE as error:
            raise StepFailure(place, error) from error
        port.records += 1

    def write_or_pass_on(read: SourceRecord, key: bytes | None, record: Record) -> None:
        if record.topic is None and pass_on is not None:
            pass_on(read, key, record)
        else:
            write(read, key, record)

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


def _compile_carrying(read: Kind, written: Kind) -> Encode | None:
    """Turns bytes of a key that was read, and carries over, into those that are written. None: they are the
    same.

    `codecs.may_carry` says where this can't succeed.
    """
    if "bytes" in (read, written):
        return None  # who reads or writes bytes has them as they are
    decode, encode = key_codec(written)
    if id_header(read, "key") is None and codec_name(read) == codec_name(written):
        # The bytes are of one kind. Whether a model takes them is found out by reading them as one.
        is_known = read == written or not (isinstance(read, ModelCodec) or isinstance(written, ModelCodec))
        return None if is_known else _transcoder(decode, encode)
    # With ids, equal keys of one topic may have been written in several forms.
    return _transcoder(key_codec(read)[0], encode)


def _transcoder(decode: Decode, encode: Encode) -> Encode:
    return lambda raw: encode(decode(raw))


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
