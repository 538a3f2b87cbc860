"""Conversion between bytes and the values that handlers see.

Responsible for: codecs. They decode and encode keys and values of topics, and values of state, for each
declared kind. Invariants: the same key always encodes to the same bytes, because these choose the partition
and identify the state; a value that is decoded and encoded again is the same value, including integers of any
size; a value that can't be encoded as declared, such as NaN in JSON, raises TypeError or ValueError with a
message for the job's author. A codec never gets a null key or a null value (a tombstone): the caller handles
None. Pure.

A codec is an object with a name and two functions. fcluster's own codecs are found by their names (`"json"`,
`"text"`, `"bytes"`, `"int"`, `"msgpack"`); a user's own is a `Codec`. `models` makes one of a user's class.

JSON is read by msgspec, since orjson rounds integers beyond 64 bits to floats. It is written by orjson, which
is faster and wrote the keys of existing state. Values that orjson refuses (long integers) or changes (NaN and
infinity become null) are detected and handled here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from functools import cache
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar, cast

import msgspec
import orjson

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr, describe_exception, type_of

CodecName = Literal["json", "text", "bytes", "int", "msgpack"]
CODEC_NAMES: tuple[CodecName, ...] = ("json", "text", "bytes", "int", "msgpack")
_LEGAL_NAME = re.compile(r"[a-zA-Z0-9._-]{1,100}")
_T = TypeVar("_T")

Decode = Callable[[bytes], Any]
Encode = Callable[[Any], bytes]

decode_json: Decode = msgspec.json.Decoder().decode
"""The value of a JSON document. Raises ValueError, or RecursionError; `decoding_trouble` says more."""
decode_msgpack: Decode = msgspec.msgpack.Decoder().decode
_pack = msgspec.msgpack.Encoder().encode
_BITS_64_MIN, _BITS_64_MAX = -(2**63), 2**64 - 1
_AS_TEXT = Decimal | timedelta
_TOO_LONG = "Integer exceeds 64-bit range"
"""orjson's message for integers that it refuses although they are valid JSON."""


def _encode_text(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError(_wrong_kind(value, "text", "a str"))
    return value.encode()


def _encode_bytes(value: Any) -> bytes:
    # bytes(5) would be five zero bytes, so the type is checked first.
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(_wrong_kind(value, "bytes", "bytes"))
    return bytes(value)  # pyright: ignore[reportUnknownArgumentType]


def encode_json(value: Any) -> bytes:
    """`value` as JSON. It may be a model, or contain some. Decimals and timedeltas are the text that a model
    writes.

    Raises:
        TypeError: something in it isn't JSON. The message says where and what.
        ValueError: it contains NaN or infinity.
    """
    try:
        encoded = orjson.dumps(value, _of_model)
    except TypeError as error:
        encoded = _with_all_digits(value, error, _of_model, None)
    if b"null" in encoded:
        check_finite(value)
    return encoded


def encode_json_key(value: Any) -> bytes:
    """Like `encode_json`, but equal keys have equal bytes: names are sorted."""
    try:
        encoded = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:
        encoded = _with_all_digits(value, error, None, orjson.OPT_SORT_KEYS)
    if b"null" in encoded:
        check_finite(value)
    return encoded


def _with_all_digits(
    value: Any, error: TypeError, default: Callable[[Any], Any] | None, option: int | None
) -> bytes:
    """The JSON of a value that orjson has refused with `error`, if that was for long integers only.

    Raises:
        TypeError: as in `encode_json`.
    """
    if _TOO_LONG in str(error):
        with suppress(TypeError, RecursionError):  # then there is more that isn't JSON
            return orjson.dumps(_with_long_integers(value), default, option)
    raise _unencodable(value, error) from error


def encode_json_without_models(value: Any) -> bytes:
    """Like `encode_json`, for what the job itself reads again: a model would be a dict then, and a Decimal
    text, which is compared and added up in another way.

    Raises:
        TypeError: it is a model, or holds a Decimal or a timedelta.
    """
    try:
        encoded = orjson.dumps(value, None, orjson.OPT_PASSTHROUGH_DATACLASS)
    except TypeError as error:
        kind = type_of(value)
        if dataclasses.is_dataclass(value) or isinstance(value, msgspec.Struct) or _serializer_of(value):
            raise TypeError(
                f"{bounded_repr(value)} would be read as a dict behind it: name its model, "
                f"key_by(..., value={kind}), or let the map return a dict"
            ) from error
        place = None
        with suppress(RecursionError):  # it contains itself, which `encode_json` says
            place = _find_text(value, "the value")
        if place is not None:
            raise TypeError(
                f"{place}, which would be text behind it: let a map return an object of a model with such a "
                "field, and name the model, key_by(..., value=Model); or write str(...) of it"
            ) from error
        return encode_json(value)
    if b"null" in encoded:
        check_finite(value)
    return encoded


def _find_text(value: Any, path: str) -> str | None:
    """Where something is that `encode_json` would write as text without a way back, and of which type."""
    if isinstance(value, _AS_TEXT):
        return f"{path} is of type {type_of(value)}"
    found: Iterable[str | None] = ()
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        found = (_find_text(item, f"{path}[{bounded_repr(key, 40)}]") for key, item in items)
    elif isinstance(value, list | tuple):
        parts = enumerate(cast("Iterable[Any]", value))
        found = (_find_text(item, f"{path}[{number}]") for number, item in parts)
    elif dataclasses.is_dataclass(value):
        names = _attributes_of(value)
        found = (_find_text(getattr(value, name, None), f"{path}.{name}") for name in names)
    return next((one for one in found if one), None)


def _serializer_of(value: object) -> Any:
    """What writes a pydantic model as JSON. None for other values."""
    return getattr(cast("Any", type(value)), "__pydantic_serializer__", None)


def _of_model(value: Any) -> orjson.Fragment:
    """What orjson doesn't know: a Struct, a pydantic model, a Decimal or a timedelta. Dataclasses it knows.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(value, msgspec.Struct | _AS_TEXT):
        return orjson.Fragment(msgspec.json.encode(value))
    serializer = _serializer_of(value)
    if serializer is None:
        raise TypeError
    return orjson.Fragment(serializer.to_json(value, by_alias=True, warnings="error"))


def check_finite(value: Any) -> None:
    """Check that no float in `value` is NaN or infinite: orjson writes null for those.

    Called only if there is a null in the JSON, so its cost doesn't matter much.

    Raises:
        ValueError: one is. The message says where.
    """
    try:
        packed = _pack(value)
    except Exception:  # noqa: BLE001  what msgpack can't encode may be fine: search it instead
        packed = b""
    # A float is 0xcb and eight bytes, with all bits of the exponent set in NaN and infinity.
    if not packed or b"\xcb\x7f" in packed or b"\xcb\xff" in packed:
        _find_not_finite(value, "the value")


def _find_not_finite(value: Any, path: str) -> None:
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{path} is {value!r}, which JSON can't hold")
    elif isinstance(value, dict):
        for key, item in cast("dict[Any, Any]", value).items():
            _find_not_finite(item, f"{path}[{bounded_repr(key, 40)}]")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(cast("Iterable[Any]", value)):
            _find_not_finite(item, f"{path}[{number}]")
    else:
        for name in _attributes_of(value):
            _find_not_finite(getattr(value, name, None), f"{path}.{name}")


_TOO_DEEP: Final = "the value is nested more than 254 levels deep, or contains itself"


def _unencodable(value: Any, error: TypeError) -> TypeError:
    """The error to show for a value that orjson refuses. `error` itself if nothing more is known."""
    try:
        trouble = _find_unencodable(value, "the value", frozenset())
    except RecursionError:
        trouble = _TOO_DEEP
    if trouble is None and "ecursion limit" in str(error):  # orjson's own
        trouble = _TOO_DEEP
    return error if trouble is None else TypeError(trouble)


def _find_unencodable(value: Any, path: str, parents: frozenset[int]) -> str | None:
    """What isn't JSON, where it is, and what to write instead."""
    if id(value) in parents:
        return f"{path} contains itself, which JSON can't express"
    if type(value) is int:
        return None  # orjson refuses long ones
    if isinstance(value, str):
        return None if value.isascii() else _broken_text(value, path)
    if isinstance(value, dict):
        inside = parents | {id(cast("object", value))}
        for key, item in cast("dict[Any, Any]", value).items():
            if not isinstance(key, str):
                return (
                    f"{path} has the key {bounded_repr(key, 40)} of type {type_of(key)}; names in JSON are "
                    "text: write str(...) of it"
                )
            place = f"{path}[{bounded_repr(key, 40)}]"
            trouble = _broken_text(key, f"a key of {path}") or _find_unencodable(item, place, inside)
            if trouble is not None:
                return trouble
        return None
    if isinstance(value, list | tuple):
        inside = parents | {id(cast("object", value))}
        items = enumerate(cast("Iterable[Any]", value))
        found = (_find_unencodable(item, f"{path}[{number}]", inside) for number, item in items)
        return next((one for one in found if one), None)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = parents | {id(value)}
        items = ((name, getattr(value, name, None)) for name in _attributes_of(value))
        found = (_find_unencodable(item, f"{path}.{name}", inside) for name, item in items)
        return next((one for one in found if one), None)
    try:
        orjson.dumps(value, _of_model)
    except TypeError as error:
        if isinstance(value, msgspec.Struct) or _serializer_of(value):
            why = describe_exception(error.__cause__ or error)
            return f"{path} is of type {type_of(value)}, and can't be written: {why}"
        return f"{path} is of type {type_of(value)}, which JSON can't hold; {_instead_of(value)}"
    return None


def _broken_text(text: str, path: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return (
            f"{path} is {bounded_repr(text, 40)}, which has half of a surrogate pair and can't be written as "
            "UTF-8; write text.encode(errors='replace').decode()"
        )
    return None


def _instead_of(value: Any) -> str:
    """What to write instead of a value that JSON can't hold."""
    if isinstance(value, set | frozenset):
        return "write sorted(...) of it"
    if isinstance(value, bytes | bytearray | memoryview):
        return "decode it to text, or declare the topic with value='bytes'"
    if isinstance(value, Iterator):
        return "write list(...) of it, or yield its values from a handler or a flat_map"
    if isinstance(value, Coroutine):
        value.close()  # otherwise Python warns that it was never awaited
        return "give async functions to .map_async(...), or declare it with plain def"
    if type_of(value) == "Record":
        return "a handler that has several outputs yields them one by one"
    return "write it as text, a number, a list or a dict"


def _attributes_of(value: Any) -> Iterable[str]:
    """The names of a model's fields. Nothing for other values."""
    if isinstance(value, msgspec.Struct):
        return value.__struct_fields__
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return getattr(cast("Any", type(value)), "__pydantic_fields__", ())


def _with_long_integers(value: Any) -> Any:
    """`value`, with integers beyond 64 bits in a form that orjson writes digit for digit."""
    if type(value) is int and not _BITS_64_MIN <= value <= _BITS_64_MAX:
        return orjson.Fragment(str(value).encode())
    if isinstance(value, dict):
        return {key: _with_long_integers(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_with_long_integers(item) for item in cast("Iterable[Any]", value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # The attributes that orjson would write. Other models aren't written by orjson.
        fields: Any = getattr(value, "__dict__", None) or {
            name: getattr(value, name) for name in _attributes_of(value)
        }
        return {name: _with_long_integers(item) for name, item in fields.items() if not name.startswith("_")}
    return value


def _encode_int(value: Any) -> bytes:
    # A bool is an int to Python, but wouldn't come back as one.
    if type(value) is not int:
        raise TypeError(_wrong_kind(value, "int", "an int"))
    bytes_needed = (value if value >= 0 else ~value).bit_length() // 8 + 1
    return value.to_bytes(max(INT_BYTES_MIN, bytes_needed), "big", signed=True)


def _decode_int(raw: bytes) -> int:
    if not raw:
        raise ValueError("empty bytes are not an int")
    return int.from_bytes(raw, "big", signed=True)


INT_BYTES_MIN = 8
"""The size that Kafka's `LongSerializer` writes. Longer ints take as many bytes as they need."""


KEY_ID_HEADER: Final = "__key_schema_id"
VALUE_ID_HEADER: Final = "__value_schema_id"
"""The headers in which a schema's id may be. Those who decode with a schema registry look there first."""


UNNAMED_KEY_BY = "key_by"
"""The name in a `CodecUse` for a `key_by` without a name."""


@dataclass(frozen=True, slots=True)
class CodecUse:
    """What a codec is opened for.

    Attributes:
        name: the name of the topic, or of the state (``handler/state``). For a `key_by` without a name:
            "key_by".
        part: the part that is encoded: "key", "value", or "state".
        settings: the settings of this run, by dotted name.
    """

    name: str
    part: Literal["key", "value", "state"]
    settings: Mapping[str, Any]


class CodecNote(NamedTuple):
    """What is known about the use of a codec before a job starts.

    Attributes:
        level: "error": the job won't start, or stops soon. "warning": something should be done about it.
            "note": good to know. "ok": as it should be.
        message: what is known.
        remedy: what to do about it.
    """

    level: Literal["ok", "note", "warning", "error"]
    message: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Codec(Generic[_T]):
    """A user's own conversion between bytes and values.

    Attributes:
        name: identifies the codec when a changed job is compared with its state. Choose another name when the
            bytes change.
        encode: turns a value into bytes. It must raise TypeError or ValueError for a value that would be
            different when decoded. For keys: equal keys must have equal bytes, in every process.
        decode: turns the bytes back into the value.
        open: called with a `CodecUse` when a shard begins to use the codec, once for each topic or state in
            each process. It returns the codec to use there. For codecs that depend on the topic or on
            settings, such as the address of a schema registry.

    Null keys and values (tombstones) don't reach a codec.

    Raises:
        JobError: the name isn't valid, or is one of fcluster's own.
    """

    name: str
    encode: Callable[[_T], bytes]
    decode: Callable[[bytes], _T]
    open: Callable[[CodecUse], Codec[_T]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _LEGAL_NAME.fullmatch(self.name):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JobError(
                f"The codec name {self.name!r} isn't valid.",
                remedy="Use letters a-z and A-Z, digits, '.', '_' and '-'.",
            )
        if self.name in CODEC_NAMES:
            raise JobError(
                f"The codec name {self.name!r} is one of fcluster's own.", remedy="Give it another name."
            )

    def name_for(self, use: CodecUse) -> str:  # noqa: ARG002  for codecs whose names differ
        """Its name in one use, when that is declared.

        Raises:
            JobError: it isn't meant for this use.
        """
        return self.name

    def id_header(self, part: Literal["key", "value"]) -> str | None:  # noqa: ARG002  for codecs that have one
        """The name of a header that may have the first bytes of a key or value: the id of its schema."""
        return None

    def id_bytes(self, found: bytes) -> int:
        """How many of the first bytes of such a header are an id. 0: it has none."""
        return len(found)

    def header_bytes(self, raw: bytes) -> int:  # noqa: ARG002  for codecs that write some
        """How many of the first bytes of what `encode` returns are written to that header. 0: none."""
        return 0

    def notes_on(self, use: CodecUse, *, reads: bool, writes: bool) -> Iterable[CodecNote]:  # noqa: ARG002  for codecs that know some
        """What `fcluster check` says about one use. It may ask other services, and must change nothing.

        Raises:
            FclusterError: such a service doesn't answer.
        """
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundCodec(Codec[_T]):
    """A codec for one use.

    Attributes:
        declared: what the job has declared.
        use: the use.
    """

    declared: Codec[_T] = field(compare=False)
    use: CodecUse = field(compare=False)

    def id_header(self, part: Literal["key", "value"]) -> str | None:
        """See `Codec`."""
        return self.declared.id_header(part)

    def id_bytes(self, found: bytes) -> int:
        """See `Codec`."""
        return self.declared.id_bytes(found)

    def header_bytes(self, raw: bytes) -> int:
        """See `Codec`."""
        return self.declared.header_bytes(raw)


class ModelError(ValueError):
    """Data doesn't fit a model. The text is the whole explanation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCodec(Codec[_T]):
    """The codec of a user's class; see `models`.

    Its name is "json", because it writes what that codec writes: a topic or a state may go from "json" to a
    model, and from one model to another. Those who read it notice what doesn't fit.

    Attributes:
        model: the class.
        explain: returns the error to show for bytes that `decode` refused.
        encode_key: like `encode`, and equal keys have equal bytes.
        encode_state: like `encode`, and refuses what would be different when decoded.
    """

    model: type[_T]
    explain: Callable[[bytes, BaseException], BaseException]
    encode_key: Encode
    encode_state: Encode

    def __post_init__(self) -> None:
        """Its name is that of one of fcluster's own codecs, on purpose."""

    def decode_explained(self, raw: bytes) -> _T:
        """Like `decode`. Errors name the field."""
        try:
            return self.decode(raw)
        except Exception as error:
            raise self.explain(raw, error) from error


Kind = CodecName | Codec[Any]
"""How keys or values are encoded, as a job declares it."""


def codec_name(kind: Kind) -> str:
    """What tells kinds of different bytes from one another; the kind's name in descriptions."""
    return kind.name if isinstance(kind, Codec) else kind


def kind_title(kind: Kind) -> str:
    """The kind as the job's author wrote it, for messages. Different for each model."""
    return kind.model.__name__ if isinstance(kind, ModelCodec) else codec_name(kind)


def may_take(kind: Kind, values_of: Kind) -> bool:
    """Whether a topic of this kind may take values that were read as those of another one. False: never."""
    if kind_title(kind) == kind_title(values_of) or kind == "msgpack":
        return True
    if isinstance(values_of, Codec) and not isinstance(values_of, ModelCodec):
        return True  # nobody knows
    if isinstance(kind, Codec):
        return not isinstance(kind, ModelCodec)
    if kind == "json":
        return values_of != "bytes"
    if values_of == "json":
        return kind != "bytes"
    return values_of == "msgpack"


def may_carry(taken: Kind, keys_of: Kind) -> bool:
    """Whether a topic of this kind of keys may get keys that were read as those of another one. False: never.

    Bytes carry over as they are, and kinds with one name have the same bytes.
    """
    if "bytes" in (taken, keys_of) or codec_name(taken) == codec_name(keys_of):
        return True
    return may_take(taken, keys_of)


def id_header(kind: Kind, part: Literal["key", "value"]) -> str | None:
    """See `Codec.id_header`."""
    return kind.id_header(part) if isinstance(kind, Codec) else None


def codec_is_known(kind: object) -> bool:
    """Whether it is the name of one of fcluster's own codecs, or a `Codec`."""
    return isinstance(kind, Codec) or kind in CODEC_NAMES


def bound_codec(kind: Kind, use: CodecUse) -> Kind:
    """The codec for one use. Its `open` is called only when the first key or value is encoded or decoded."""
    if not isinstance(kind, Codec) or kind.open is None:
        return kind
    opener = kind.open
    opened: list[Codec[Any]] = []

    def codec() -> Codec[Any]:
        if not opened:
            opened.append(opener(use))
        return opened[0]

    def encode(value: Any) -> bytes:
        return codec().encode(value)

    def decode(raw: bytes) -> Any:
        return codec().decode(raw)

    return BoundCodec(kind.name_for(use), encode, decode, declared=kind, use=use)


def decoding_trouble(kind: Kind, raw: bytes, error: BaseException) -> BaseException:
    """The error to show for `raw`, which couldn't be decoded; for JSON with line and column, for a model with
    the field.
    """
    if isinstance(kind, ModelCodec):
        return kind.explain(raw, error)
    if kind == "json" and isinstance(error, ValueError):
        try:
            orjson.loads(raw)
        except orjson.JSONDecodeError as better:
            return better
    return error


def data_looks_like(kind: Kind, raw: bytes) -> str:
    """What data that can't be decoded as `kind` may be instead, for messages. Empty if it looks like nothing
    known.
    """
    if isinstance(kind, Codec) or kind == "int":
        return ""
    if not raw:
        return "it is empty, which isn't the same as null (a tombstone)"
    for beginning, what in _BEGINNINGS.items():
        if raw.startswith(beginning):
            return what
    is_json_like = raw[:1] in (b"{", b"[", b'"')
    if kind == "msgpack":
        return "it looks like JSON: value='json'" if is_json_like else ""
    if raw[0] >= 0x80 and _is_msgpack(raw):
        return "it looks like msgpack: value='msgpack'"
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        other = "" if is_json_like else "; value='bytes' takes any bytes"
        return f"it isn't UTF-8: see the byte 0x{raw[error.start]:02x} at position {error.start}{other}"
    if "NaN" in text or "Infinity" in text:
        return "NaN and Infinity aren't JSON: write null instead"
    return "it looks like plain text: value='text'" if text.isprintable() and not is_json_like else ""


def _is_msgpack(raw: bytes) -> bool:
    try:
        decode_msgpack(raw)
    except ValueError:
        return False
    return True


_BEGINNINGS: Mapping[bytes, str] = {
    b"\x00": "its first byte is 0, as of data with a schema registry: see Avro, JsonSchema and Protobuf in "
    "fcluster.schema_registry",
    b"\x1f\x8b": "it is compressed with gzip",
    b"\xef\xbb\xbf": "it begins with a byte order mark, which the program that writes it has to leave out",
    b"\xff\xfe": "it looks like UTF-16, but has to be UTF-8",
    b"\xfe\xff": "it looks like UTF-16, but has to be UTF-8",
    b"{'": "it looks like str(...) of a Python dict, which has to be written with json.dumps(...)",
}
"""How data begins that is often taken for JSON."""


def decode_value(kind: Kind, raw: bytes) -> Any:
    """The value that `raw` holds. Raises what the codec raises, explained as in `decoding_trouble`."""
    try:
        return value_codec(kind)[0](raw)
    except Exception as error:
        raise decoding_trouble(kind, raw, error) from error


def _wrong_kind(value: Any, kind: str, expected: str) -> str:
    return (
        f"{bounded_repr(value)} is of type {type_of(value)}, but is written as {kind!r}, which takes "
        f"{expected}; convert it, or declare the kind of the topic or key_by as 'json'"
    )


# These run once or twice for each record, so they are built-in functions where possible.
_TEXT: tuple[Decode, Encode] = (bytes.decode, _encode_text)
_BYTES: tuple[Decode, Encode] = (bytes, _encode_bytes)
_INT: tuple[Decode, Encode] = (_decode_int, _encode_int)
_KEY_CODECS: dict[str, tuple[Decode, Encode]] = {
    "text": _TEXT,
    "bytes": _BYTES,
    "int": _INT,
    "json": (decode_json, encode_json_key),
    "msgpack": (decode_msgpack, msgspec.msgpack.Encoder(order="deterministic").encode),
}
_VALUE_CODECS: dict[str, tuple[Decode, Encode]] = {
    "json": (decode_json, encode_json),
    "text": _TEXT,
    "bytes": _BYTES,
    "int": _INT,
    "msgpack": (decode_msgpack, _pack),
}


def key_codec(kind: Kind) -> tuple[Decode, Encode]:
    """Decodes and encodes keys of that kind. Equal keys have equal bytes: the names in JSON objects are
    sorted.
    """
    if isinstance(kind, ModelCodec):
        return kind.decode_explained, kind.encode_key
    return (kind.decode, _checked(kind)) if isinstance(kind, Codec) else _KEY_CODECS[kind]


def value_codec(kind: Kind) -> tuple[Decode, Encode]:
    """Decodes and encodes values of that kind."""
    if isinstance(kind, ModelCodec):
        return kind.decode, kind.encode
    return (kind.decode, _checked(kind)) if isinstance(kind, Codec) else _VALUE_CODECS[kind]


@cache
def _checked(codec: Codec[Any]) -> Encode:
    encode, name = codec.encode, codec.name

    def checked(value: Any) -> bytes:
        encoded: object = encode(value)
        if type(encoded) is not bytes:
            raise TypeError(
                f"the codec {name!r} returned {bounded_repr(encoded)}, a {type_of(encoded)}, not bytes"
            )
        return encoded

    return checked
