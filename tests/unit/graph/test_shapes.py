"""Shapes of models: which changes fit what was stored before."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

import msgspec
import pydantic
import pytest

from fcluster import Job, ListState, MapState, ValueState
from fcluster.common.settings import Settings
from fcluster.graph.compatibility import incompatibility
from fcluster.graph.shapes import shape_difference, shape_of


class Color(enum.Enum):
    RED = "red"


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
            "some": [True, {"each": "int"}],
            "pair": [True, {"parts": ["int", "str"]}],
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
