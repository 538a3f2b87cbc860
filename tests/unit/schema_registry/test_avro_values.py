"""Values of Avro that are rare: defaults, nothing behind the id, unions, times, ids that aren't some."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from io import BytesIO
from types import MappingProxyType
from typing import Any
from uuid import UUID

import fastavro
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster import Codec, CodecUse, Job
from fcluster.common.errors import JobError
from fcluster.graph.codecs import ModelError, bound_codec
from fcluster.schema_registry import Avro
from fcluster.schema_registry.defaults import compile_defaults
from fcluster.testing import Driver

TIME = {"type": "long", "logicalType": "timestamp-millis"}
DAY = {"type": "int", "logicalType": "date"}
MONEY = {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2}
FIXED_MONEY = {**MONEY, "type": "fixed", "name": "Money", "size": 2, "precision": 4}
FIXED_DURATION = {"type": "fixed", "name": "D", "size": 12, "logicalType": "duration"}
DAYTIME = {"type": "long", "logicalType": "time-micros"}
UUID_TEXT = {"type": "string", "logicalType": "uuid"}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NAIVE = EPOCH.replace(tzinfo=None)
INNER = {
    "type": "record",
    "name": "Inner",
    "fields": [{"name": "x", "type": "int", "default": 3}, {"name": "at", "type": TIME, "default": 0}],
}
OLD_INNER = {**INNER, "fields": INNER["fields"][:1]}


def opened(schema: Any, topic: str = "t", **options: Any) -> Codec[Any]:
    use = CodecUse(topic, "value", MappingProxyType({"schema.registry.url": "mock://test"}))
    found: Any = bound_codec(Avro(schema, **options), use)
    return found


def record(*fields: tuple[Any, ...]) -> dict[str, Any]:
    """A schema with a field `a`, and fields with a name, a type and perhaps a default."""
    more = [dict(zip(("name", "type", "default"), field, strict=False)) for field in fields]
    return {"type": "record", "name": "R", "fields": [{"name": "a", "type": "int"}, *more]}


def like(name: str, *more: dict[str, Any]) -> dict[str, Any]:
    return {"type": "record", "name": f"shop.{name}", "fields": [{"name": "id", "type": "int"}, *more]}


@pytest.mark.parametrize(
    ("kind", "default", "expected"),
    [
        pytest.param(TIME, 0, EPOCH, id="time"),
        pytest.param(DAY, 5, date(1970, 1, 6), id="day"),
        pytest.param(MONEY, "\u0001", Decimal("0.01"), id="decimal"),
        pytest.param(FIXED_MONEY, "\u0000\u0001", Decimal("0.01"), id="fixed decimal"),
        pytest.param(UUID_TEXT, str(UUID(int=5)), UUID(int=5), id="uuid"),
        pytest.param("bytes", "\u00ff", b"\xff", id="bytes"),
        pytest.param(["bytes", "null"], "\u00ff", b"\xff", id="bytes in a union"),
        pytest.param("double", 1, 1.0, id="double"),
        pytest.param({"type": "array", "items": "bytes"}, ["\u00ff"], [b"\xff"], id="array"),
        pytest.param({"type": "map", "values": TIME}, {"k": 0}, {"k": EPOCH}, id="map"),
        pytest.param(INNER, {}, {"x": 3, "at": EPOCH}, id="record"),
        pytest.param(INNER, {"x": 4}, {"x": 4, "at": EPOCH}, id="a part of a record"),
        pytest.param(["null", "string"], None, None, id="null"),
        pytest.param("string", "new", "new", id="text"),
    ],
)
def test_field_that_the_writer_does_not_have_gets_its_default_as_if_that_was_written(
    kind: Any, default: Any, expected: Any
) -> None:
    raw = opened(record()).encode({"a": 1})
    found = opened(record(("b", kind, default))).decode(raw)
    assert found == {"a": 1, "b": expected}
    assert type(found["b"]) is type(expected)


def test_defaults_are_found_in_inner_records_and_in_those_that_contain_themselves() -> None:
    def node(inner: Any) -> dict[str, Any]:
        fields = [
            {"name": "inner", "type": ["null", inner], "default": None},
            {"name": "all", "type": {"type": "array", "items": "Inner"}, "default": []},
            {"name": "by_name", "type": ["null", {"type": "map", "values": "Inner"}], "default": None},
            {"name": "next", "type": ["null", "Node"], "default": None},
        ]
        return {"type": "record", "name": "Node", "fields": fields}

    old = {"inner": {"x": 1}, "all": [{"x": 2}], "by_name": {"k": {"x": 3}}, "next": None}
    raw = opened(node(OLD_INNER)).encode({**old, "next": old})
    now = {
        "inner": {"x": 1, "at": EPOCH},
        "all": [{"x": 2, "at": EPOCH}],
        "by_name": {"k": {"x": 3, "at": EPOCH}},
        "next": None,
    }
    assert opened(node(INNER)).decode(raw) == {**now, "next": now}


def test_list_of_a_default_is_not_shared_by_records() -> None:
    """Otherwise a handler that changes one changes all that come later, and a replay gives other results."""
    job = Job("j")
    source = job.topic("in", value=Avro(record(("seen", {"type": "array", "items": "int"}, []))))

    def note(ctx: Any, value: Any) -> Any:
        value["seen"].append(value["a"])
        return value["seen"]

    job.process(source, name="p", to=job.topic("out"))(note)
    with Driver(job) as driver:
        use = CodecUse("in", "value", MappingProxyType({"schema.registry.url": "mock://driver"}))
        writer: Any = bound_codec(Avro(record()), use)
        raw = [writer.encode({"a": number}) for number in (1, 2)]
        for one in raw:
            driver.send_raw(source, one)
        assert driver.read_values("out") == [[1], [2]]


@pytest.mark.parametrize(
    ("kind", "default"),
    [("bytes", "\u1234"), (MONEY, 5), ("long", "5"), ({"type": "array", "items": "int"}, 5)],
)
def test_default_that_is_none_is_refused_when_it_is_declared(kind: Any, default: Any) -> None:
    with pytest.raises(JobError, match="isn't valid"):
        Avro(record(("b", kind, default)))


@dataclass
class Model:
    a: int
    at: datetime
    price: Decimal
    tag: bytes


def test_defaults_fit_a_model() -> None:
    raw = opened(record()).encode({"a": 1})
    schema = record(("at", TIME, 0), ("price", MONEY, "\u0001"), ("tag", "bytes", "\u00ff"))
    assert opened(schema, model=Model).decode(raw) == Model(1, EPOCH, Decimal("0.01"), b"\xff")


DEFAULTS: st.SearchStrategy[Any] = st.deferred(
    lambda: (
        st.sampled_from([(TIME, 0), ("int", 1), ("string", "s"), (["null", "string"], None), (DAY, 2)])
        | st.tuples(DEFAULTS, st.integers(0, 2)).map(
            lambda drawn: ({"type": "array", "items": drawn[0][0]}, [drawn[0][1]] * drawn[1])
        )
        | DEFAULTS.map(lambda drawn: ({"type": "map", "values": drawn[0]}, {"k": drawn[1]}))
    )
)


@given(st.lists(DEFAULTS, max_size=3))
def test_defaults_are_what_is_read_where_they_were_written(drawn: list[tuple[Any, Any]]) -> None:
    fields = [(f"f{number}", kind, default) for number, (kind, default) in enumerate(drawn)]
    library: Any = fastavro
    schema, old = (library.parse_schema(copy.deepcopy(one)) for one in (record(*fields), record()))

    def written(with_schema: Any) -> BytesIO:
        buffer = BytesIO()
        library.schemaless_writer(buffer, with_schema, {"a": 1})
        buffer.seek(0)
        return buffer

    finish = compile_defaults(schema) or (lambda value: value)
    expected = library.schemaless_reader(written(schema), schema, None)
    assert finish(library.schemaless_reader(written(old), old, schema)) == expected
    assert finish(copy.deepcopy(expected)) == expected, "what was written stays as it is"


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "record", "name": "Ping", "fields": []}, {}),
        ({"type": "record", "name": "Nil", "fields": [{"name": "n", "type": "null"}]}, {"n": None}),
        ({"type": "bytes"}, b""),
    ],
)
def test_value_that_takes_no_bytes_comes_back(schema: Any, value: Any) -> None:
    codec = opened(schema)
    raw = codec.encode(value)
    assert len(raw) == 5, "only the id"
    assert codec.decode(raw) == value


def test_record_of_which_only_the_id_is_left_is_not_taken_for_one_with_empty_fields() -> None:
    codec = opened({"type": "record", "name": "R", "fields": [{"name": "s", "type": "string"}]})
    raw = codec.encode({"s": ""})
    with pytest.raises(ModelError, match="EOFError"):
        codec.decode(raw[:5])


def test_union_is_given_as_a_list() -> None:
    codec = opened(["null", "string", {"type": "record", "name": "R", "fields": []}])
    assert [codec.decode(codec.encode(value)) for value in ("x", {})] == ["x", {}]


def test_none_says_how_to_write_a_tombstone() -> None:
    with pytest.raises(ModelError, match=r"let a handler yield Record\(value=None\)"):
        opened(["null", "string"]).encode(None)


@pytest.mark.parametrize(
    ("schema", "value", "message"),
    [
        (record(("at", TIME)), {"a": 1, "at": NAIVE}, r"it\['at'\] is .*has no time zone"),
        (
            record(("all", {"type": "array", "items": ["null", TIME]})),
            {"a": 1, "all": [None, NAIVE]},
            r"it\['all'\]\[1\] is .*has no time zone",
        ),
        (record(("id", UUID_TEXT)), {"a": 1, "id": "nope"}, "badly formed hexadecimal UUID"),
    ],
)
def test_value_that_others_would_read_differently_is_not_written(
    schema: Any, value: Any, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        opened(schema).encode(value)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (record(("at", TIME)), {"a": 1, "at": EPOCH}),
        (
            record(("at", {"type": "long", "logicalType": "local-timestamp-millis"})),
            {"a": 1, "at": NAIVE},
        ),
        (record(("id", UUID_TEXT)), {"a": 1, "id": UUID(int=5)}),
        (record(("day", DAY), ("at", DAYTIME)), {"a": 1, "day": date(2026, 1, 1), "at": time(1, 2, 3, 4)}),
        (record(("n", {"type": "long", "logicalType": "timestamp-nanos"})), {"a": 1, "n": 2**60 + 1}),
        (record(("d", FIXED_DURATION)), {"a": 1, "d": b"month.day..."}),
        (record(("id", {**FIXED_DURATION, "size": 16, "logicalType": "uuid"})), {"a": 1, "id": bytes(16)}),
        ([like("Paid"), like("Refunded")], {"id": 1}),
    ],
)
def test_times_and_ids_come_back(schema: Any, value: Any) -> None:
    codec = opened(schema)
    assert codec.decode(codec.encode(value)) == value


def test_records_of_a_union_that_look_alike_have_their_names() -> None:
    schema = record(("event", ["null", like("Paid"), like("Refunded", {"name": "at", "type": TIME})]))
    newer = record(
        ("event", ["null", like("Paid", {"name": "x", "type": TIME, "default": 0}), like("Refunded")])
    )
    codec, later = opened(schema, return_record_name=True), opened(newer, return_record_name=True)
    for value in (None, ("shop.Paid", {"id": 1}), ("shop.Refunded", {"id": 1, "at": EPOCH})):
        raw = codec.encode({"a": 1, "event": value})
        assert codec.decode(raw) == {"a": 1, "event": value}
        assert codec.encode(codec.decode(raw)) == raw
    whole = opened([like("Paid"), like("Refunded")], return_record_name=True)
    assert whole.decode(whole.encode(("shop.Refunded", {"id": 1}))) == ("shop.Refunded", {"id": 1})
    raw = codec.encode({"a": 1, "event": ("shop.Paid", {"id": 1})})
    assert later.decode(raw) == {"a": 1, "event": ("shop.Paid", {"id": 1, "x": EPOCH})}
    with pytest.raises(JobError, match="a model has no place for the names"):
        opened(schema, return_record_name=True, model=Model)


ZONE = timezone(timedelta(hours=2))
LOCAL = {"type": "long", "logicalType": "local-timestamp-millis"}


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (LOCAL, EPOCH.astimezone(ZONE), "whose time zone would be lost"),
        (DAYTIME, time(1, 2, tzinfo=ZONE), "whose time zone would be lost"),
        (DAY, EPOCH, r"has only a date: give \.date\(\) of it"),
        (MONEY, Decimal("NaN"), "which a decimal of Avro can't be"),
        ("float", 1e300, "which is too large for a float"),
        ("double", 2**60 + 1, "of which a double doesn't have all digits"),
        (["null", DAY], EPOCH, "has only a date"),
        ({"type": "map", "values": LOCAL}, {"k": EPOCH}, r"it\['b'\]\['k'\] is .*would be lost"),
        (
            {"type": "array", "items": INNER},
            [{"x": 1, "at": NAIVE}],
            r"it\['b'\]\[0\]\['at'\] is .*no time zone",
        ),
    ],
)
def test_value_that_would_be_another_is_not_written(kind: Any, value: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        opened(record(("b", kind))).encode({"a": 1, "b": value})


def test_time_without_a_zone_is_refused_also_if_another_field_has_none() -> None:
    """It was written as one of the machine's zone, so two workers could write different ones."""
    codec = opened(record(("at", TIME), ("local", LOCAL)))
    good = {"a": 1, "at": EPOCH, "local": NAIVE}
    assert codec.decode(codec.encode(good)) == good
    with pytest.raises(ModelError, match=r"it\['at'\] is .*has no time zone"):
        codec.encode({**good, "at": NAIVE})


@pytest.mark.parametrize(
    ("kind", "default", "expected"),
    [
        ("bytes", "\u00ff", b"\xff"),
        ({"type": "fixed", "name": "F", "size": 1}, "\u00ff", b"\xff"),
        (MONEY, "\u0001", Decimal("0.01")),
        (TIME, 0, EPOCH),
        (INNER, {}, {"x": 3, "at": EPOCH}),
        ("string", "new", "new"),
    ],
)
def test_field_with_a_default_may_be_left_out(kind: Any, default: Any, expected: Any) -> None:
    codec = opened(record(("b", kind, default)))
    value = {"a": 1}
    assert codec.decode(codec.encode(value)) == {"a": 1, "b": expected}
    assert value == {"a": 1}, "the job's own value isn't changed"


def test_decimal_at_the_top_is_refused() -> None:
    """confluent-kafka takes it for plain bytes."""
    with pytest.raises(JobError, match="can't write as a whole key or value"):
        Avro(MONEY)


@pytest.mark.parametrize(
    ("written", "declared", "value", "expected"),
    [
        ("int", "long", 1, 1),
        ("int", "double", 1, 1.0),
        ("float", "double", 1.5, 1.5),
        ("int", ["null", "long"], 1, 1),
        (["null", "int"], "long", 1, 1),
        ("string", "bytes", "x", b"x"),
        (
            {"type": "enum", "name": "E", "symbols": ["A", "C"]},
            {"type": "enum", "name": "E", "symbols": ["A", "B"], "default": "B"},
            "C",
            "B",
        ),
    ],
)
def test_type_may_become_a_wider_one(written: Any, declared: Any, value: Any, expected: Any) -> None:
    found = opened(record(("b", declared))).decode(
        opened(record(("b", written))).encode({"a": 1, "b": value})
    )
    assert found == {"a": 1, "b": expected}
    assert type(found["b"]) is type(expected)


def test_renamed_record_and_field_have_aliases() -> None:
    raw = opened(record(("b", "int"))).encode({"a": 1, "b": 2})
    renamed = {
        "type": "record",
        "name": "shop.New",
        "aliases": ["R"],
        "fields": [{"name": "count", "aliases": ["b"], "type": "long"}],
    }
    assert opened(renamed).decode(raw) == {"count": 2}
    without = {**renamed, "aliases": []}
    with pytest.raises(ModelError, match=r"it is of the type R, not of the type shop\.New"):
        opened(without).decode(raw)


class Color(Enum):
    RED = "RED"


@dataclass
class AsDataclass:
    id: UUID
    at: datetime
    day: date
    price: Decimal
    tag: bytes
    color: Color
    by_name: dict[str, int]


class AsPydantic(pydantic.BaseModel):
    id: UUID
    at: datetime
    day: date
    price: Decimal
    tag: bytes
    color: Color
    by_name: dict[str, int]


@pytest.mark.parametrize("model", [AsDataclass, AsPydantic])
def test_models_have_all_types_of_fields(model: Any) -> None:
    color = {"type": "enum", "name": "Color", "symbols": ["RED"]}
    kinds = [UUID_TEXT, TIME, DAY, MONEY, "bytes", color, {"type": "map", "values": "int"}]
    names = ("id", "at", "day", "price", "tag", "color", "by_name")
    fields = [{"name": name, "type": kind} for name, kind in zip(names, kinds, strict=True)]
    codec = opened({"type": "record", "name": "All", "fields": fields}, model=model)
    value = model(
        id=UUID(int=5),
        at=EPOCH,
        day=date(2026, 1, 1),
        price=Decimal("1.50"),
        tag=b"\xff",
        color=Color.RED,
        by_name={"a": 1},
    )
    assert codec.decode(codec.encode(value)) == value


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (UUID_TEXT, [UUID(int=10), str(UUID(int=10)), str(UUID(int=10)).upper(), UUID(int=10).hex]),
        (MONEY, [Decimal("1.5"), Decimal("1.50"), Decimal("15E-1")]),
        (TIME, [EPOCH, EPOCH.astimezone(ZONE), 0]),
    ],
)
def test_equal_keys_have_equal_bytes_however_they_are_given(kind: Any, values: list[Any]) -> None:
    use = CodecUse("t", "key", MappingProxyType({"schema.registry.url": "mock://test"}))
    codec: Any = bound_codec(Avro(record(("k", kind))), use)
    assert len({codec.encode({"a": 1, "k": value}) for value in values}) == 1
