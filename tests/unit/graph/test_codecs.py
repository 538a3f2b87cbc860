from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster import Codec, CodecUse, Job, ListState, MapState, ValueState
from fcluster.common.errors import JobError
from fcluster.engine.kinds import state_codec
from fcluster.engine.values import UnkeptError
from fcluster.graph.codecs import CODEC_NAMES, key_codec, kind_title, may_take, value_codec
from fcluster.graph.models import model_codec
from fcluster.testing import Driver

texts = st.text(st.characters(exclude_categories=["Cs"]))
documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(documents)
def test_json_document_encoded_and_decoded_stays_equal(document: Any) -> None:
    for decode, encode in (key_codec("json"), value_codec("json")):
        assert decode(encode(document)) == document


@given(texts)
def test_text_encoded_and_decoded_stays_equal(text: str) -> None:
    for decode, encode in (key_codec("text"), value_codec("text")):
        assert decode(encode(text)) == text
        assert encode(text) == text.encode("utf-8")


@given(st.binary())
def test_bytes_encoded_and_decoded_stay_equal(data: bytes) -> None:
    for decode, encode in (key_codec("bytes"), value_codec("bytes")):
        assert decode(encode(data)) == data
        assert encode(bytearray(data)) == encode(memoryview(data)) == data


@pytest.mark.parametrize("kind", ["json", "int", "msgpack"])
@given(number=st.integers() | st.integers(2**62, 2**66) | st.integers(-(2**66), -(2**62)))
def test_integer_of_any_size_is_read_back_or_refused(kind: Any, number: int) -> None:
    for decode, encode in (key_codec(kind), value_codec(kind)):
        try:
            encoded = encode(number)
        except OverflowError:
            assert kind == "msgpack"
            assert not -(2**63) <= number < 2**64
        else:
            assert decode(encoded) == number
    codec = state_codec(kind)
    try:
        (kept,) = codec.encode_all([number])
    except UnkeptError:
        assert kind == "msgpack"
    else:
        assert codec.decode(kept) == number


@dataclass
class Part:
    number: int
    _hidden: int = 0


@dataclass(slots=True)
class Slotted:
    name: str
    parts: list[Part]
    _hidden: int = 0


@pytest.mark.parametrize("number", [7, 2**64, -(2**63) - 1, 10**40])
def test_dataclass_is_written_the_same_however_long_its_integers_are(number: int) -> None:
    value = {"of": (Slotted("a", [Part(number), Part(1)]), Part(number))}
    parts: list[Any] = [{"number": number}, {"number": 1}]
    for decode, encode in (key_codec("json"), value_codec("json")):
        assert decode(encode(value)) == {"of": [{"name": "a", "parts": parts}, {"number": number}]}


@pytest.mark.parametrize("wrong", [{1}, Part, 1j, Part(1j)])  # pyright: ignore[reportArgumentType]
def test_what_is_not_json_is_named_beside_a_long_integer(wrong: Any) -> None:
    for encode in (key_codec("json")[1], value_codec("json")[1]):
        for value in ({"a": wrong, "b": 2**64}, {"b": 2**64, "a": wrong}):
            with pytest.raises(TypeError, match=r"the value\['a'\](.number)? is of type .*, which JSON"):
                encode(value)


def test_int_is_encoded_like_kafkas_long_serializer() -> None:
    decode, encode = key_codec("int")
    assert encode(1) == bytes(7) + b"\x01"
    assert encode(-1) == b"\xff" * 8
    assert encode(-(2**63)) == b"\x80" + bytes(7)
    assert encode(2**63) == b"\0\x80" + bytes(7)
    assert decode(b"\0\0\0\x07") == 7  # written by an IntegerSerializer


@pytest.mark.parametrize("kind", ["json", "msgpack"])
@given(key=st.dictionaries(texts, st.integers(0, 9), min_size=2))
def test_keys_that_differ_in_order_only_have_equal_bytes(kind: Any, key: dict[str, int]) -> None:
    encode = key_codec(kind)[1]
    assert encode(dict(reversed(key.items()))) == encode(key)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("text", 5),
        ("text", b"a"),
        ("text", None),
        ("bytes", "a"),
        ("bytes", 5),
        ("int", "5"),
        ("int", 5.0),
        ("int", True),
        ("json", {1, 2}),
        ("json", {1: 2}),
    ],
)
def test_value_of_another_kind_is_refused(kind: Any, value: Any) -> None:
    for encode in (key_codec(kind)[1], value_codec(kind)[1]):
        with pytest.raises((TypeError, ValueError)):
            encode(value)


def test_number_as_a_text_key_is_refused_with_how_to_declare_it() -> None:
    with pytest.raises(TypeError, match=r"17 is of type int, but is written as 'text'.*'json'"):
        key_codec("text")[1](17)


@pytest.mark.parametrize(
    ("kind", "raw"),
    [("text", b"\xff"), ("int", b""), ("msgpack", b"\xc1"), ("json", b"{"), ("json", b""), ("json", b"\xff")],
)
def test_malformed_bytes_are_refused(kind: Any, raw: bytes) -> None:
    for decode in (key_codec(kind)[0], value_codec(kind)[0]):
        with pytest.raises(ValueError, match=r".+"):
            decode(raw)


def test_every_declared_kind_has_a_codec() -> None:
    assert all(key_codec(kind) and value_codec(kind) for kind in CODEC_NAMES)


# --- codecs of one's own ----------------------------------------------------------------------------------


def encode_pair(pair: tuple[int, int]) -> bytes:
    first, second = pair
    return f"{first}/{second}".encode()


def decode_pair(raw: bytes) -> tuple[int, int]:
    first, second = raw.split(b"/")
    return int(first), int(second)


PAIR = Codec("pair", encode_pair, decode_pair)


def test_custom_codec_works_for_keys_values_and_state() -> None:
    job = Job("j")
    source = job.topic("in", key=PAIR, value=PAIR)
    out = job.topic("out", key="json", value=PAIR)
    last: ValueState[tuple[int, int]] = ValueState("last", PAIR)
    by_pair: MapState[tuple[int, int], int] = MapState("by-pair", key=PAIR, value="int")

    @job.process(source, to=out, states=[last, by_pair])
    def handler(ctx: Any, value: tuple[int, int]) -> Any:
        before = ctx.value(last).get((0, 0))
        ctx.value(last).set(value)
        ctx.map(by_pair)[value] = ctx.key[0]
        return tuple(map(sum, zip(before, value, strict=True)))

    with Driver(job) as driver:
        driver.send(source, (1, 2), key=(7, 8))
        driver.crash()
        driver.send(source, (10, 20), key=(7, 8))
        assert driver.read_values(out) == [(1, 2), (11, 22)]
        assert driver.state("handler", (7, 8), by_pair) == {(1, 2): 7, (10, 20): 7}


def test_record_fails_if_a_custom_codec_cannot_decode_it() -> None:
    job = Job("j", on_error="skip")
    source, out = job.topic("in", value=PAIR), job.topic("out", value=PAIR)
    job.stream(source).map(lambda pair: pair if pair[0] else 5).to(out)
    with Driver(job) as driver:
        driver.send_raw(source, b"no pair")
        driver.send(source, (0, 1))
        driver.send(source, (1, 1))
        assert driver.read_values(out) == [(1, 1)]


def test_codec_that_does_not_return_bytes_is_refused() -> None:
    with pytest.raises(TypeError, match="the codec 'bad' returned 'text', a str, not bytes"):
        value_codec(Codec("bad", str, str))[1]("text")


def test_codec_is_opened_once_for_each_use_when_the_first_value_comes() -> None:
    uses: list[CodecUse] = []

    def opened(use: CodecUse) -> Codec[Any]:
        uses.append(use)
        mark = use.settings["bootstrap.servers"] + use.part[0]
        return Codec("marked", lambda text: f"{mark}{text}".encode(), lambda raw: raw.decode()[len(mark) :])

    registry: Codec[str] = Codec("registry", opened, opened, open=opened)  # type: ignore[arg-type]
    job = Job("j", settings={"bootstrap.servers": "kafka:1"})
    source, out = job.topic("in", value=registry), job.topic("out", key=registry, value=registry)
    texts_seen: ListState[str] = ListState("texts", registry)

    @job.process(source, to=out, states=[texts_seen])
    def handler(ctx: Any, value: str) -> Any:
        ctx.list(texts_seen).append(value)
        return value.upper()

    assert job.topic("in", value=registry) is source
    with Driver(job) as driver:
        assert uses == []
        driver.send(source, "a", key="k")
        driver.send(source, "b", key="k")
        assert driver.read_values(out) == ["A", "B"]
        assert driver.state("handler", "k", texts_seen) == ["a", "b"]
    assert sorted((use.name, use.part) for use in uses) == [
        ("handler/texts", "state"),
        ("in", "value"),
        ("out", "key"),
        ("out", "value"),
    ]


@pytest.mark.parametrize("name", ["", "a b", "json", 5])
def test_name_of_a_codec_is_checked(name: Any) -> None:
    with pytest.raises(JobError, match="codec name"):
        Codec(name, bytes, bytes)


@pytest.mark.parametrize(
    "declare",
    [
        lambda: ValueState("a/b"),
        lambda: ValueState("a", "yaml"),  # type: ignore[arg-type]
        lambda: ValueState("a", ttl=5),  # type: ignore[arg-type]
        lambda: MapState("a", key="json"),
        lambda: MapState("a", key=()),
        lambda: MapState("a", key=("int", "json")),
        lambda: Job("j").topic("in", value="yaml"),  # type: ignore[arg-type]
    ],
)
def test_wrong_declaration_is_an_error_of_the_job(declare: Any) -> None:
    with pytest.raises(JobError):
        declare()


@pytest.mark.parametrize("states", [5, [5], "seen", [ValueState("a"), MapState("a")]])
def test_states_of_a_handler_are_checked(states: Any) -> None:
    job = Job("j")
    with pytest.raises(JobError, match="of the handler 'h'"):
        job.process(job.topic("in"), name="h", states=states)(lambda ctx, value: None)


@dataclass
class Bid:
    cents: int


@dataclass
class Ask:
    cents: int


VALUES: dict[Any, Any] = {
    "json": {"cents": 5},
    "text": "a",
    "bytes": b"a",
    "int": 5,
    "msgpack": {"cents": 5},
    model_codec(Bid): Bid(5),
    model_codec(Ask): Ask(5),
}


@pytest.mark.parametrize("kind", VALUES, ids=kind_title)
@pytest.mark.parametrize("values_of", VALUES, ids=kind_title)
def test_kind_that_never_takes_values_of_another_one_refuses_them(kind: Any, values_of: Any) -> None:
    if not may_take(kind, values_of):
        with pytest.raises((TypeError, ValueError)):
            value_codec(kind)[1](VALUES[values_of])


def test_kinds_that_nobody_knows_may_take_all() -> None:
    own = Codec("own", encode=str.encode, decode=bytes.decode)
    assert may_take(own, "json")
    assert may_take("text", own)
    assert may_take(model_codec(Bid), own)
