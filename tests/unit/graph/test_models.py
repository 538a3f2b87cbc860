"""Models as values, keys and state: what fits, what doesn't and how that is said."""

from __future__ import annotations

import enum
import json
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster import Job, ListState, MapState, Record, Tumbling, ValueState, last
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.engine.kinds import state_codec
from fcluster.engine.values import UnkeptError
from fcluster.graph.codecs import ModelError, decoding_trouble, key_codec, value_codec
from fcluster.graph.compatibility import incompatibility
from fcluster.graph.models import model_codec
from fcluster.testing import Driver, JobStopped


@dataclass
class Item:
    amount: int
    name: str = ""


@dataclass
class Order:
    items: list[Item]
    by_name: dict[str, dict[str, Item]] = field(default_factory=dict)
    status: Literal["new", "paid"] = "new"
    pair: tuple[int, str] | None = None
    price: float = 0.0

    def __post_init__(self) -> None:
        if len(self.items) > 5:
            raise ValueError("too many items")


class ItemStruct(msgspec.Struct):
    amount: int
    name: str = ""


class OrderStruct(msgspec.Struct, forbid_unknown_fields=True):
    items: list[ItemStruct]
    price: float = 0.0


class ItemModel(pydantic.BaseModel):
    amount: int
    name: str = ""


class OrderModel(pydantic.BaseModel):
    items: list[ItemModel]
    price: float = 0.0
    customer: str = pydantic.Field("", alias="customerName")


MODELS: list[tuple[type, Callable[..., Any], Callable[[int], Any]]] = [
    (Order, Order, Item),
    (OrderStruct, OrderStruct, ItemStruct),
    (OrderModel, lambda items, **more: OrderModel(items=items, **more), lambda n: ItemModel(amount=n)),
]
models = pytest.mark.parametrize(("model", "order", "item"), MODELS, ids=["dataclass", "struct", "pydantic"])


def explained(model: type, raw: bytes) -> str:
    codec = model_codec(model)
    with pytest.raises(Exception, match=r".+") as caught:
        codec.decode(raw)
    return str(decoding_trouble(codec, raw, caught.value))


# --- what comes back --------------------------------------------------------------------------------------


@models
def test_object_comes_back_as_it_was(model: Any, order: Any, item: Any) -> None:
    decode, encode = value_codec(model_codec(model))
    value = order([item(1), item(-(10**30))], price=1.5)
    assert decode(encode(value)) == value
    assert type(decode(encode(value))) is model
    assert json.loads(encode(value))["items"][1]["amount"] == -(10**30)


@models
def test_object_of_another_class_is_refused(model: Any, order: Any, item: Any) -> None:
    encode = value_codec(model_codec(model))[1]
    for value in ({"items": []}, item(1), None, type("Special", (model,), {})(items=[])):
        with pytest.raises(TypeError, match=f"is of type .*, but {model.__name__} is declared there"):
            encode(value)


@models
def test_what_could_not_be_read_again_is_refused_with_the_field(model: Any, order: Any, item: Any) -> None:
    encode = value_codec(model_codec(model))[1]
    value = order([item(1), item(2)])
    value.items[1].amount = "many"
    with pytest.raises(ValueError, match=r"amount.*many|many.*amount|expected.*int"):
        encode(value)


@models
def test_what_json_can_not_hold_is_refused_with_its_place(model: Any, order: Any, item: Any) -> None:
    encode = value_codec(model_codec(model))[1]
    with pytest.raises(ValueError, match=r"the value\.price is nan, which JSON can't hold"):
        encode(order([], price=math.nan))


def test_aliases_are_written_and_read() -> None:
    decode, encode = value_codec(model_codec(OrderModel))
    value = OrderModel(items=[], customerName="ann")
    assert json.loads(encode(value))["customerName"] == "ann"
    assert decode(encode(value)) == value


def test_alias_for_reading_alone_is_noticed_when_something_is_written() -> None:
    class OneWay(pydantic.BaseModel):
        amount: int = pydantic.Field(validation_alias="amt")

    with pytest.raises(
        ModelError, match=r"could not be read again: amt: is missing, at \$ \(declared as OneWay"
    ):
        value_codec(model_codec(OneWay))[1](OneWay(amt=1))  # type: ignore[call-arg]


# --- what is said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (
            b'{"items":[{"amount":1},{"amount":2},{"amount":"3"}]}',
            "amount: expected int, got str ('3'), at $.items[2].amount (declared as Order)",
        ),
        (b'{"items":[{"name":"a"}]}', "amount: is missing, at $.items[0] (declared as Order)"),
        (b"{}", "items: is missing, at $ (declared as Order)"),
        (b"[]", "expected object, got array, at $ (declared as Order)"),
        (b"5", "expected object, got int (5), at $ (declared as Order)"),
        (b'{"items":null}', "items: expected array, got null (None), at $.items (declared as Order)"),
        (
            b'{"items":[],"by_name":{"a":{"b":{"amount":1}},"c":{"d":{"amount":2},"e":{"amount":1.5}}}}',
            "amount: expected int, got float (1.5), at $.by_name['c']['e'].amount (declared as Order)",
        ),
        (
            b'{"items":[],"status":"lost"}',
            "status: invalid enum value 'lost' ('lost'), at $.status (declared as Order)",
        ),
        (b'{"items":[],"pair":[1,2]}', "pair: expected str, got int (2), at $.pair[1] (declared as Order)"),
        (
            b'{"items":[{"amount":1},{"amount":1},{"amount":1},{"amount":1},{"amount":1},{"amount":1}]}',
            "too many items, at $ (declared as Order)",
        ),
        (b'{"items":', "it isn't JSON: unexpected end of data: line 1 column 10 (char 9)"),
    ],
)
def test_message_names_the_field_and_what_was_found(raw: bytes, text: str) -> None:
    assert explained(Order, raw) == text


def test_message_names_an_unknown_field() -> None:
    assert (
        explained(OrderStruct, b'{"items":[],"x":1}') == "x: is not a field, at $ (declared as OrderStruct)"
    )


def test_message_names_a_wrong_key_of_an_object() -> None:
    class Counts(msgspec.Struct):
        counts: dict[int, int]

    text = explained(Counts, b'{"counts":{"a":1}}')
    assert text == "counts: a key: expected int, got str, at $.counts (declared as Counts)"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (
            b'{"items":[{"amount":1},{"amount":"x3"}]}',
            (
                "amount: expected a valid integer, unable to parse string as an integer, got str ('x3'), at "
                "$.items[1].amount (declared as OrderModel)"
            ),
        ),
        (
            b'{"items":[{}], "price": []}',
            "amount: is missing, at $.items[0], and 1 more (declared as OrderModel)",
        ),
        (b'{"items":', "it isn't JSON: unexpected end of data: line 1 column 10 (char 9)"),
    ],
)
def test_message_of_a_pydantic_model_names_the_field(raw: bytes, text: str) -> None:
    assert explained(OrderModel, raw) == text


def test_long_values_are_cut_in_messages() -> None:
    text = explained(Order, json.dumps({"items": [{"amount": "x" * 10_000}]}).encode())
    assert len(text) < 200


def test_entry_of_a_large_object_is_found() -> None:
    entries = {f"n{number}": {"x": {"amount": 1 if number != 700 else None}} for number in range(1_000)}
    raw = json.dumps({"items": [], "by_name": entries}).encode()
    assert "at $.by_name['n700']['x'].amount" in explained(Order, raw)


# --- in a job ---------------------------------------------------------------------------------------------


def spend(**options: Any) -> tuple[Job, Any, Any]:
    job = Job("spend")
    source = job.topic("orders", value=Order, **options)
    out = job.topic("totals", value=Item)
    job.stream(source).map(lambda order: Item(sum(item.amount for item in order.items))).to(out)
    return job, source, out


def test_record_that_does_not_fit_stops_the_job_and_is_named() -> None:
    job, source, _ = spend()
    with Driver(job) as driver:
        driver.send(source, Order([Item(1)]), partition=2)
        with pytest.raises(JobStopped) as caught:
            driver.send_raw(source, b'{"items":[{"amount":"1"}]}', partition=2)
    stopped = caught.value
    assert stopped.message == (
        "record orders/2 at offset 1 can't be decoded: amount: expected int, got str ('1'), at "
        "$.items[0].amount (declared as Order)"
    )
    assert (stopped.topic, stopped.partition, stopped.offset) == ("orders", 2, 1)


def test_record_that_does_not_fit_is_skipped() -> None:
    job, source, out = spend(on_error="skip")
    with Driver(job) as driver:
        driver.send_raw(source, b"{}")
        driver.send(source, Order([Item(1), Item(2)]))
        assert driver.read_values(out) == [Item(3)]
        assert driver.skipped == 1


def test_record_that_does_not_fit_becomes_a_dead_letter_with_its_bytes() -> None:
    job = Job("spend")
    dead = job.topic("dead", value="bytes")
    source = job.topic("orders", value=OrderStruct, on_error=dead)
    job.stream(source).to(job.topic("out", value=OrderStruct))
    with Driver(job) as driver:
        driver.send_raw(source, b'{"items":[], "price": "0"}')
        (letter,) = driver.dead_letters(dead)
        assert letter.record.value == b'{"items":[], "price": "0"}'
        assert letter.error == ("price: expected float, got str ('0'), at $.price (declared as OrderStruct)")


def test_output_of_another_class_fails_by_the_rule_of_its_step() -> None:
    job = Job("spend")
    source, out = job.topic("orders"), job.topic("out", value=Item)
    job.stream(source).map(lambda value: Item(value) if value else {"amount": value}, on_error="skip").to(out)
    with Driver(job) as driver:
        driver.send(source, 0)
        driver.send(source, 1)
        assert driver.read_values(out) == [Item(1)]
        assert driver.skipped == 1


def test_tombstone_stays_null() -> None:
    job = Job("spend")
    source, out = job.topic("orders", value=Order), job.topic("out", value=Order)
    job.stream(source).to(out)
    with Driver(job) as driver:
        driver.send(source, None, key="a")
        (record,) = driver.read(out)
        assert record.raw_value is None


def test_filter_keeps_bytes_with_fields_that_the_class_does_not_know() -> None:
    job = Job("spend")
    source, out = job.topic("orders", value=Order), job.topic("out", value=Order)
    job.stream(source).filter(lambda order: order.status == "new").to(out)
    raw = b'{ "items": [], "more": 1 }'
    with Driver(job) as driver:
        driver.send_raw(source, raw)
        assert driver.read(out)[0].raw_value == raw


@models
def test_json_topic_takes_models_alone_and_inside_others(model: Any, order: Any, item: Any) -> None:
    job = Job("spend")
    source, out = job.topic("orders", value=model), job.topic("out")
    job.stream(source).flat_map(lambda one: [one, {"order": one, "big": 2**70}]).to(out)
    with Driver(job) as driver:
        driver.send(source, order([item(1)]))
        plain, inside = driver.read_values(out)
        assert plain["items"] == [{"amount": 1, "name": ""}]
        assert inside == {"order": plain, "big": 2**70}


def test_late_records_of_a_model_go_to_a_json_topic() -> None:
    job = Job("spend")
    source, late = job.topic("orders", value=ItemStruct), job.topic("late")
    (
        job.stream(source)
        .window(Tumbling(timedelta(seconds=1)), name="w", late=late)
        .aggregate(amount=last(lambda item: item.amount))
        .to(job.topic("out"))
    )
    with Driver(job) as driver:
        for at in (5_000, 9_000, 100):
            driver.send(source, ItemStruct(at), key="a", timestamp=at, partition=0)
        assert driver.read_values(late) == [{"amount": 100, "name": ""}]


def test_model_goes_through_a_key_by_as_it_is() -> None:
    job = Job("spend")
    source, out = job.topic("orders", value=ItemStruct), job.topic("out", value=ItemStruct)
    seen: list[Any] = []
    job.stream(source).key_by("name").filter(lambda item: seen.append(item) or True).to(out)
    with Driver(job) as driver:
        driver.send(source, ItemStruct(1, "a"))
        assert seen == [ItemStruct(1, "a")]
        assert driver.read(out)[0].key == "a"


def test_model_after_a_map_has_to_be_named_at_the_key_by() -> None:
    for value in (Item(1, "a"), ItemStruct(1, "a"), ItemModel(amount=1, name="a")):
        job = Job("spend")
        source, out = job.topic("orders"), job.topic("out")
        job.stream(source).map(lambda _: value).key_by(lambda item: item.name).process(  # noqa: B023
            lambda ctx, item: item["amount"], name="h", to=out
        )
        with Driver(job) as driver, pytest.raises(JobStopped) as caught:
            driver.send(source, 1)
        name = type(value).__name__
        assert f"would be read as a dict behind it: name its model, key_by(..., value={name})" in str(
            caught.value
        )

        job = Job("spend")
        source, out = job.topic("orders"), job.topic("out")
        job.stream(source).map(lambda _: value).key_by("name", value=type(value)).process(  # noqa: B023
            lambda ctx, item: [ctx.key, item.amount], name="h", to=out
        )
        with Driver(job) as driver:
            driver.send(source, 1)
            assert driver.read_values(out) == [["a", 1]]


def joined(returned: Any, **named: Any) -> list[Any]:
    """What a join gets of a value that a map returned, with a `key_by` behind the map if `named` says so."""
    job = Job("spend")
    left, right, out = job.topic("left"), job.topic("right"), job.topic("out")
    mapped = job.stream(left).map(lambda _: returned)
    keyed = mapped.key_by("name", **named) if named else mapped
    keyed.join(
        job.stream(right).key_by(lambda _: "a", name="other") if named else job.stream(right),
        lambda one, _other: type(one).__name__,
        within=timedelta(seconds=1),
        name="both",
    ).to(out)
    with Driver(job, partitions=1) as driver:
        driver.send(left, 1, key="a")
        driver.send(right, 1, key="a")
        return driver.read_values(out)


def test_model_after_a_map_has_to_be_named_before_a_join() -> None:
    with pytest.raises(JobStopped, match="would be read as a dict behind it: name its model"):
        joined(ItemStruct(1, "a"))
    assert joined(ItemStruct(1, "a"), value=ItemStruct) == ["ItemStruct"]


def test_model_is_kept_by_a_table() -> None:
    job = Job("spend")
    rows, source, out = job.topic("rows", value=ItemStruct), job.topic("in", value=Item), job.topic("out")
    join = job.stream(source).join(job.table(rows), lambda item, row: [item.amount, row.amount])
    join.to(out)
    with Driver(job) as driver:
        driver.send(rows, ItemStruct(5), key="a")
        driver.send(source, Item(1), key="a")
        assert driver.read_values(out) == [[1, 5]]


def test_dataclass_inside_a_dict_goes_through_a_key_by_as_before() -> None:
    job = Job("spend")
    source, out = job.topic("orders"), job.topic("out")
    job.stream(source).map(lambda n: {"k": "a", "item": Item(n), "long": 2**70}).key_by("k").process(
        lambda ctx, value: value, name="h", to=out
    )
    with Driver(job) as driver:
        driver.send(source, 1)
        assert driver.read_values(out) == [{"k": "a", "item": {"amount": 1, "name": ""}, "long": 2**70}]


def test_record_with_a_model_is_written_by_its_topic() -> None:
    job = Job("spend")
    source, out = job.topic("orders"), job.topic("out", value=Item)

    @job.process(source)
    def handler(ctx: Any, value: Any) -> Any:
        return Record(topic=out, value=Item(value))

    with Driver(job) as driver:
        driver.send(source, 3, key="a")
        assert driver.read_values(out) == [Item(3)]


# --- declaring --------------------------------------------------------------------------------------------


class Opaque:
    pass


@dataclass
class WithOpaque:
    inner: list[dict[str, Opaque]]


@dataclass
class WithUnknownName:
    inner: Nowhere  # type: ignore[name-defined]  # noqa: F821


class Unfinished(pydantic.BaseModel):
    inner: Nowhere  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            WithOpaque,
            r"WithOpaque can't be read from JSON: WithOpaque.inner\[\]\[\] is of type Opaque,",
        ),
        (
            WithUnknownName,
            r"WithUnknownName can't be read from JSON: NameError: name 'Nowhere'",
        ),
        (Unfinished, r"Unfinished can't be read from JSON: .*Nowhere"),
        (
            Opaque,
            r"(?s)value=<class .*Opaque'> is unknown\..*a dataclass, a msgspec.Struct or",
        ),
        (str, r"(?s)value=<class 'str'> is unknown\..*For str that is 'text'"),
        (dict, r"For dict that is 'json'"),
        (Item(1), r"(?s)value=Item\(amount=1, name=''\) is unknown.*\(the class\)"),
    ],
)
def test_class_that_can_not_be_used_is_refused(value: Any, text: str) -> None:
    with pytest.raises(JobError, match=text):
        Job("j").topic("t", value=value)
    with pytest.raises(JobError, match=text.replace("is unknown", "of the state 's' is unknown")):
        ValueState("s", value)


def test_topic_may_be_declared_again_with_the_same_model() -> None:
    job = Job("j")
    assert job.topic("t", value=Order) is job.topic("t", value=Order)
    with pytest.raises(JobError, match="declared twice"):
        job.topic("t", value=Item)


def test_misspelt_field_of_a_key_by_is_named_at_the_start() -> None:
    job = Job("j")
    job.stream(job.topic("t", value=Item)).key_by("nam").to(job.topic("out", value=Item))
    with pytest.raises(JobError, match=r"(?s)names the field 'nam', but Item has.*Did you mean 'name'\?"):
        job.build(Settings())


def test_merged_paths_with_different_models_are_refused() -> None:
    job = Job("j")
    streams = [job.stream(job.topic(name, value=kind)) for name, kind in (("a", Item), ("b", ItemStruct))]
    keyed = [stream.key_by("name") for stream in streams]
    job.merge(*keyed).process(lambda ctx, value: None, name="h")
    job.build(Settings())  # each has its own topic

    job = Job("j")
    streams = [job.stream(job.topic(name, value=kind)) for name, kind in (("a", Item), ("b", ItemStruct))]
    job.merge(*streams).key_by("name").process(lambda ctx, value: None, name="h")
    with pytest.raises(JobError, match="would write ItemStruct values for some of its inputs, and Item val"):
        job.build(Settings())


# --- keys -------------------------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    z: int
    a: str


@dataclass(frozen=True)
class Key:
    text: str
    number: int
    inner: Inner
    flag: bool = False
    day: date = date(2026, 1, 1)
    color: Color = Color.RED
    ident: uuid.UUID | None = None


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(-(2**63), 2**64 - 1), st.booleans())
def test_keys_bytes_are_those_of_a_json_key(text: str, number: int, flag: bool) -> None:
    decode, encode = key_codec(model_codec(Key))
    key = Key(text, number, Inner(number, text), flag)
    plain = {
        "text": text,
        "number": number,
        "inner": {"a": text, "z": number},
        "flag": flag,
        "day": "2026-01-01",
        "color": "red",
        "ident": None,
    }
    assert encode(key) == key_codec("json")[1](plain)
    assert decode(encode(key)) == key


def test_key_identifies_state() -> None:
    job = Job("j")
    source = job.topic("in", key=Inner, value="int")
    out = job.topic("out", key=Inner, value="int")

    @job.process(source, to=out)
    def total(ctx: Any, value: int) -> Any:
        ctx.state["n"] = ctx.state.get("n", 0) + value
        assert type(ctx.key) is Inner
        return ctx.state["n"]

    with Driver(job) as driver:
        driver.send(source, 1, key=Inner(1, "x"))
        driver.send(source, 2, key=Inner(1, "x"))
        driver.send(source, 4, key=Inner(2, "x"))
        assert [(record.key, record.value) for record in driver.read(out)] == [
            (Inner(1, "x"), 1),
            (Inner(1, "x"), 3),
            (Inner(2, "x"), 4),
        ]
        assert driver.state("total", Inner(1, "x")) == {"n": 3}


def test_key_that_does_not_fit_names_the_field() -> None:
    with pytest.raises(ModelError, match=r"z: expected int, got str \('1'\), at \$\.z \(declared as Inner\)"):
        key_codec(model_codec(Inner))[0](b'{"z":"1","a":"x"}')


@dataclass
class FloatKey:
    parts: list[float]


@dataclass
class TimeKey:
    at: datetime


@dataclass
class MoneyKey:
    amount: Decimal


@dataclass
class SetKey:
    names: set[str]


class AnyKey(msgspec.Struct):
    what: Any


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (FloatKey, r"FloatKey\.parts\[\] is of the kind float"),
        (TimeKey, r"TimeKey\.at is of the kind datetime"),
        (MoneyKey, r"MoneyKey\.amount is of the kind decimal"),
        (SetKey, r"SetKey\.names is of the kind set"),
        (AnyKey, r"AnyKey\.what is of the kind any"),
        (ItemModel, r"The pydantic model ItemModel can't be the key of 't'"),
    ],
)
def test_class_whose_equal_objects_may_have_different_bytes_is_no_key(key: Any, text: str) -> None:
    job = Job("j")
    with pytest.raises(JobError, match=text):
        job.topic("t", key=key)
    with pytest.raises(JobError, match="can't be the key of"):
        job.stream(job.topic("u")).key_by(lambda value: value, key=key)


# --- state ------------------------------------------------------------------------------------------------


@models
def test_models_are_kept_as_state(model: Any, order: Any, item: Any) -> None:
    job = Job("j")
    source = job.topic("in", value="int")
    newest: ValueState[Any] = ValueState("newest", model)
    by_number: MapState[int, Any] = MapState("by-number", model, key="int")
    history: ListState[Any] = ListState("history", model)

    @job.process(source, states=[newest, by_number, history])
    def keep(ctx: Any, value: int) -> None:
        kept = ctx.value(newest).get(order([]))
        kept.items.append(item(value))
        ctx.value(newest).set(kept)
        ctx.map(by_number)[value] = order([item(value)])
        ctx.list(history).append(order([item(value)]))

    with Driver(job) as driver:
        driver.send(source, 1, key="a")
        driver.crash()
        driver.send(source, 2, key="a")
        assert driver.state("keep", "a", newest) == order([item(1), item(2)])
        assert driver.state("keep", "a", by_number) == {1: order([item(1)]), 2: order([item(2)])}
        assert driver.state("keep", "a", history) == [order([item(1)]), order([item(2)])]


def test_change_in_place_is_kept() -> None:
    job = Job("j")
    source = job.topic("in", value="int")
    state: ValueState[Item] = ValueState("item", Item)

    @job.process(source, states=[state])
    def keep(ctx: Any, value: int) -> None:
        kept = ctx.value(state).get()
        if kept is None:
            ctx.value(state).set(Item(value))
        else:
            kept.amount += value

    with Driver(job) as driver:
        driver.send(source, 1, key="a")
        driver.send(source, 2, key="a")
        driver.crash()
        assert driver.state("keep", "a", state) == Item(3)


def test_object_that_would_come_back_different_is_not_kept() -> None:
    codec = state_codec(model_codec(Order))
    value = Order((Item(1),))  # type: ignore[arg-type]
    with pytest.raises(UnkeptError, match="would come back as"):
        codec.encode_all([value])
    assert "Order can't store the value: ModelError" in (codec.describe_unkept(value) or "")


def test_state_that_does_not_fit_the_model_any_more_fails_where_it_is_read() -> None:
    codec = state_codec(model_codec(Item))
    with pytest.raises(ModelError, match=r"amount: is missing, at \$ \(declared as Item\)"):
        codec.decode(b'{"name":"a"}')


def test_model_may_take_the_place_of_json() -> None:
    def build(kind: Any) -> Any:
        job = Job("j")
        job.stream(job.topic("in", value=kind)).key_by("name").process(
            lambda ctx, value: None, name="h", states=[ValueState("s", kind), ListState("l", kind)]
        )
        return job.build(Settings())

    old, new = build("json"), build(Item)
    assert incompatibility(old.describe(), new) is None
    assert old.fingerprint == new.fingerprint
    assert incompatibility(new.describe(), build("msgpack")) is not None


def test_datetimes_and_decimals_are_kept() -> None:
    @dataclass
    class Bill:
        at: datetime
        amount: Decimal

    codec = state_codec(model_codec(Bill))
    bill = Bill(datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC), Decimal("1.10"))
    (raw,) = codec.encode_all([bill])
    assert codec.decode(raw) == bill
