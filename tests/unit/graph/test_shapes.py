"""Shapes of models: which changes fit what was stored before."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import msgspec
import pydantic
import pytest

from fcluster import Job, ListState, MapState, ValueState
from fcluster.common.settings import Settings
from fcluster.graph.compatibility import incompatibility
from fcluster.graph.shapes import shape_difference, shape_of


class Color(enum.Enum):
    RED = "red"


class Colors(enum.Enum):
    BLUE = "blue"
    RED = "red"


PAIR: Any = NamedTuple("Pair", [("a", int), ("b", int)])
SWAPPED: Any = NamedTuple("Swapped", [("b", int), ("a", int)])


class Triple(NamedTuple):
    a: int
    b: int
    c: int = 0


TRIPLE: Any = Triple


@dataclass
class Item:
    amount: int


@dataclass
class Node:
    name: str
    children: list[Node] = field(default_factory=list)


def struct_of(name: str = "Total", **fields: Any) -> type:
    """A Struct. A field is a type, or a pair of a type and its default."""
    made = [(one, *given) if isinstance(given, tuple) else (one, given) for one, given in fields.items()]
    return msgspec.defstruct(name, made)


def model_of(**fields: Any) -> type:
    made = {one: given if isinstance(given, tuple) else (given, ...) for one, given in fields.items()}
    return pydantic.create_model("Total", **made)


MAKERS = pytest.mark.parametrize("make", [struct_of, model_of], ids=["struct", "pydantic"])


@MAKERS
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": int}, {"a": int, "b": (int, 0)}),
        ({"a": int}, {"a": (int, 5)}),
        ({"a": int, "b": str}, {"b": str, "a": int}),
        ({"a": int}, {"a": (int | None, None)}),
        ({"a": int | str}, {"a": str | int | None}),
        ({"a": dict[str, int]}, {"a": dict[str, int | None]}),
        ({"a": int}, {"a": float}),
        ({"a": int}, {"a": Decimal}),
        ({"a": float}, {"a": Decimal}),
        ({"a": list[int]}, {"a": list[float | None]}),
        ({"a": Literal["x"]}, {"a": Literal["y", "x"]}),
        ({"a": Literal["x"]}, {"a": Literal["x"] | None}),
        ({"a": Literal["x", "y"]}, {"a": str}),
        ({"a": Literal[1, 2]}, {"a": int}),
        ({"a": Color}, {"a": Colors}),
        ({"a": Color}, {"a": Literal["red", "blue"]}),
        ({"a": Literal["red"]}, {"a": Colors}),
        ({"a": Color}, {"a": str}),
        ({"a": set[int]}, {"a": list[int]}),
        ({"a": set[int]}, {"a": frozenset[int]}),
        ({"a": list[int]}, {"a": tuple[int, ...]}),
        ({"a": tuple[int, int]}, {"a": list[int]}),
        ({"a": int}, {"a": Any}),
        ({"a": list[int]}, {"a": list[Any]}),
        ({"a": PAIR}, {"a": TRIPLE}),
    ],
)
def test_change_that_fits_former_values_is_no_difference(make: Any, before: Any, after: Any) -> None:
    assert shape_difference(shape_of(make(**before)), shape_of(make(**after))) is None


@MAKERS
@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"a": int, "b": int}, {"a": int}, "the field 'b' is gone"),
        ({"a": int}, {"a": int, "b": int}, "the new field 'b' has no default"),
        ({"a": (int, 0)}, {"a": int}, "the field 'a' has lost its default"),
        ({"a": int | None}, {"a": int}, "a was "),
        ({"a": list[int]}, {"a": list[str]}, "a[] was int"),
        ({"a": dict[str, int]}, {"a": dict[str, str]}, "a{} was int"),
        ({"a": Literal["x", "y"]}, {"a": Literal["x"]}, "a was one of 'x', 'y', and is one of 'x'"),
        ({"a": int}, {"a": list[int]}, "and is an array"),
        ({"a": float}, {"a": int}, "a was float, and is int"),
        ({"a": Decimal}, {"a": float}, "a was decimal, and is float"),
        ({"a": bool}, {"a": int}, "a was bool, and is int"),
        ({"a": str}, {"a": Literal["x"]}, "a was str, and is one of 'x'"),
        ({"a": Literal["x", 1]}, {"a": str}, "and is str"),
        ({"a": Colors}, {"a": Color}, "a was one of 'blue', 'red', and is one of 'red'"),
        ({"a": bytes}, {"a": str}, "and is str"),
        ({"a": str}, {"a": bytes}, "a was str"),
        ({"a": UUID}, {"a": str}, "a was uuid, and is str"),
        ({"a": date}, {"a": datetime}, "a was date, and is datetime"),
        ({"a": Any}, {"a": int}, "a was any, and is int"),
        ({"a": list[int]}, {"a": set[int]}, "a has a new limit, unique=True"),
        ({"a": list[int]}, {"a": tuple[int, int]}, "a was an array, and is an array of 2"),
        ({"a": tuple[int, int]}, {"a": tuple[int, int, int]}, "a was an array of 2, and is an array of 3"),
        ({"a": tuple[int, int]}, {"a": tuple[int, str]}, "a[1] was int, and is str"),
        ({"a": tuple[int, str]}, {"a": list[int]}, "a[] was str, and is int"),
        ({"a": dict[int, str]}, {"a": dict[str, str]}, "a{key} was int, and is str"),
        ({"a": dict[str, str]}, {"a": dict[date, str]}, "a{key} was str, and is date"),
        ({"a": TRIPLE}, {"a": PAIR}, "the field 'a.c' is gone"),
        ({"a": PAIR}, {"a": SWAPPED}, "the field 'a.a' is at another place"),
    ],
)
def test_change_that_does_not_fit_is_named(make: Any, before: Any, after: Any, said: str) -> None:
    difference = shape_difference(shape_of(make(**before)), shape_of(make(**after)))
    assert difference is not None
    assert said in difference


@pytest.mark.parametrize("make", [struct_of, model_of], ids=["struct", "pydantic"])
def test_models_within_models_are_compared_too(make: Any) -> None:
    inner, more, less = make(a=int), make(a=int, b=(int, 0)), make(b=(int, 0))
    before = shape_of(make(items=list[inner]))  # type: ignore[valid-type]
    assert shape_difference(before, shape_of(make(items=list[more]))) is None  # type: ignore[valid-type]
    found = shape_difference(before, shape_of(make(items=list[less])))  # type: ignore[valid-type]
    assert found == "the field 'items[].a' is gone"


LIMITS = [
    (int, {"ge": 0}, "ge=0"),
    (float, {"gt": 0}, "gt=0"),
    (float, {"lt": 9}, "lt=9"),
    (int, {"multiple_of": 3}, "multiple_of=3"),
    (str, {"min_length": 1}, "min_length=1"),
    (str, {"max_length": 9}, "max_length=9"),
    (str, {"pattern": "^a"}, "pattern='^a'"),
    (list[int], {"min_length": 1}, "min_length=1"),
    (dict[str, int], {"max_length": 9}, "max_length=9"),
]


@pytest.mark.parametrize("of", [msgspec.Meta, pydantic.Field], ids=["struct", "pydantic"])
@pytest.mark.parametrize(("kind", "limit", "said"), LIMITS)
def test_new_limit_is_named_and_one_that_is_gone_fits(of: Any, kind: Any, limit: Any, said: str) -> None:
    make = struct_of if of is msgspec.Meta else model_of
    free, limited = shape_of(make(a=kind)), shape_of(make(a=Annotated[kind, of(**limit)]))
    assert free != limited
    assert shape_difference(limited, free) is None
    assert shape_difference(free, limited) == f"a has a new limit, {said}"


@pytest.mark.parametrize("of", [msgspec.Meta, pydantic.Field], ids=["struct", "pydantic"])
@pytest.mark.parametrize(
    ("kind", "looser", "tighter"),
    [
        (int, {"ge": 0}, {"ge": 1}),
        (int, {"gt": -1}, {"ge": 1}),
        (int, {"le": 9}, {"lt": 9}),
        (float, {"ge": 0}, {"gt": 0}),
        (float, {"lt": 9}, {"le": 8}),
        (int, {"multiple_of": 3}, {"multiple_of": 6}),
        (str, {"min_length": 1}, {"min_length": 2}),
        (str, {"max_length": 9}, {"max_length": 8}),
    ],
)
def test_limit_may_be_looser_and_not_tighter(of: Any, kind: Any, looser: Any, tighter: Any) -> None:
    make = struct_of if of is msgspec.Meta else model_of
    one, other = (shape_of(make(a=Annotated[kind, of(**limit)])) for limit in (looser, tighter))
    assert shape_difference(other, one) is None
    assert "a has a new limit, " in (shape_difference(one, other) or "")
    assert shape_difference(one, shape_of(make(a=Annotated[kind, of(**looser)]))) is None


@pytest.mark.parametrize("kind", [datetime, time])
def test_time_zone_may_be_freed_and_not_demanded(kind: Any) -> None:
    free = shape_of(struct_of(a=kind))
    aware, naive = (shape_of(struct_of(a=Annotated[kind, msgspec.Meta(tz=tz)])) for tz in (True, False))
    assert shape_difference(aware, free) is None
    assert shape_difference(free, aware) == "a has a new limit, tz=True"
    assert shape_difference(aware, naive) == "a has a new limit, tz=False"


def test_time_zone_of_pydantic_may_be_freed_and_not_demanded() -> None:
    kinds = (datetime, pydantic.AwareDatetime, pydantic.NaiveDatetime)
    free, aware, naive = (shape_of(model_of(a=kind)) for kind in kinds)
    assert shape_difference(aware, free) is None
    assert shape_difference(free, aware) == "a has a new limit, tz=True"
    assert shape_difference(aware, naive) == "a has a new limit, tz=False"


def test_decimals_of_pydantic_have_limits() -> None:
    def made(**limits: Any) -> Any:
        return shape_of(model_of(a=Annotated[Decimal, pydantic.Field(**limits)]))

    assert shape_difference(made(max_digits=5), made(max_digits=6)) is None
    assert shape_difference(made(), made(decimal_places=2)) == "a has a new limit, decimal_places=2.0"
    assert shape_difference(made(ge=0), made(ge=Decimal("0.5"))) == "a has a new limit, ge=0.5"


def array_of(fields: list[Any], **options: Any) -> type:
    return msgspec.defstruct("Total", fields, array_like=True, **options)


def test_struct_that_is_an_array_gets_new_fields_at_its_end() -> None:
    before = shape_of(array_of([("a", int), ("b", int)]))
    assert shape_difference(before, shape_of(array_of([("a", int), ("b", float), ("c", int, 0)]))) is None
    for fields, said in (
        ([("a", int), ("b", int), ("c", int)], "the new field 'c' has no default"),
        ([("a", int), ("c", int), ("b", int)], "the field 'b' is at another place"),
        ([("a", int), ("c", int)], "the field 'b' is gone"),
        ([("a", int), ("b", str)], "b was int, and is str"),
    ):
        assert said in (shape_difference(before, shape_of(array_of(fields))) or "")


@pytest.mark.parametrize("array_like", [False, True])
def test_tag_of_a_struct_belongs_to_it(array_like: bool) -> None:
    def made(**options: Any) -> Any:
        return shape_of(msgspec.defstruct("Total", [("a", int)], array_like=array_like, **options))

    assert shape_difference(made(tag="x"), made(tag="x")) is None
    assert shape_difference(made(tag="x"), made(tag="y")) == "type was one of 'x', and is one of 'y'"
    assert shape_difference(made(tag="x"), made(tag="x", tag_field="kind")) is not None
    assert shape_difference(made(tag=1), made(tag=2)) is not None


def test_union_of_structs_may_gain_one_and_not_lose_one() -> None:
    one, two, three = (msgspec.defstruct(name, [("a", int)], tag=name) for name in "xyz")
    more = msgspec.defstruct("x", [("a", int), ("b", int, 0)], tag="x")
    less = msgspec.defstruct("x", [("b", int, 0)], tag="x")
    before = shape_of(struct_of(a=one | two))  # type: ignore[operator]
    assert shape_difference(before, shape_of(struct_of(a=three | two | more))) is None  # type: ignore[operator]
    assert "a was an object or an object" in (
        shape_difference(before, shape_of(struct_of(a=two | three))) or ""
    )  # type: ignore[operator]
    assert shape_difference(before, shape_of(struct_of(a=two | less))) is not None  # type: ignore[operator]


def test_difference_within_what_may_be_missing_is_named() -> None:
    before, after = (shape_of(struct_of(a=struct_of(**{name: int}) | None)) for name in "bc")  # type: ignore[operator]
    assert shape_difference(before, after) == "the field 'a.b' is gone"


def test_renamed_field_is_another_one() -> None:
    before = shape_of(struct_of(a=int))
    renamed = msgspec.defstruct("Total", [("b", int, msgspec.field(name="a"))])
    assert shape_difference(before, shape_of(renamed)) is None
    camel = msgspec.defstruct("Total", [("a_b", int)], rename="camel")
    assert shape_difference(shape_of(struct_of(a_b=int)), shape_of(camel)) == "the field 'a_b' is gone"


@pytest.mark.parametrize(
    "fields",
    [
        {"a": int, "b": (float | None, None)},
        {"a": date, "b": datetime, "c": time, "d": UUID, "e": Decimal},
        {"a": dict[int, list[str]], "b": tuple[int, bool], "c": set[str], "d": PAIR, "e": Color},
    ],
)
def test_struct_may_become_a_pydantic_model_of_the_same_fields(fields: Any) -> None:
    one, other = shape_of(struct_of(**fields)), shape_of(model_of(**fields))
    assert shape_difference(one, other) is None
    assert shape_difference(other, one) is None


def test_shape_is_data_for_json_and_ends_for_a_class_within_itself() -> None:
    shape = shape_of(Node)
    assert msgspec.json.decode(msgspec.json.encode(shape)) == shape
    assert shape == {"fields": {"name": [True, "str"], "children": [False, {"each": {"again": "Node"}}]}}


def test_all_types_of_fields_have_a_shape() -> None:
    class Pair(msgspec.Struct, array_like=True):
        left: int
        right: str

    model = struct_of(
        color=Color, day=date, parts=tuple[int, str], some=frozenset[int], pair=Pair, many=tuple[int, ...]
    )
    assert shape_of(model) == {
        "fields": {
            "color": [True, {"one of": ["'red'"]}],
            "day": [True, "date"],
            "parts": [True, {"parts": ["int", "str"]}],
            "some": [True, {"each": "int", "limits": {"unique": True}}],
            "pair": [True, {"row": [["left", True, "int"], ["right", True, "str"]]}],
            "many": [True, {"each": "int"}],
        }
    }


def test_class_whose_shape_is_not_known_is_not_compared() -> None:
    class Odd(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
        value: object
        other: Job

    assert shape_of(Odd) is None


@pytest.mark.parametrize("kind", [ValueState, ListState, MapState])
def test_change_of_a_states_model_is_incompatible_unless_it_fits(kind: Any) -> None:
    def described(model: Any) -> Any:
        job = Job("j")
        state = kind("total", value=model)
        job.stream(job.topic("in")).process(lambda ctx, value: None, name="add", states=[state])
        return job.build(Settings())

    total, other = struct_of(a=int), struct_of(b=int)
    before = msgspec.json.decode(msgspec.json.encode(described(total).describe()))
    assert incompatibility(before, described(struct_of("Renamed", a=int, b=(int, 0)))) is None
    reason = incompatibility(before, described(other)) or ""
    assert (
        "The state 'total' of the handler 'add' has a model that has changed: the field 'a' is gone" in reason
    )
    assert "declare it with version=2 and migrate={1: ('json', function)}" in reason
    assert incompatibility(before, described("json")) is None
    assert described(total).fingerprint == described("json").fingerprint == described(other).fingerprint
    del before["stages"]["in"]["models"]  # as older versions have described it
    assert incompatibility(before, described(other)) is None
