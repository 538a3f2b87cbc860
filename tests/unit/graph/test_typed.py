"""Values that JSON lacks come back from state as they were."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.engine.values import (
    TYPED_MARK,
    UnkeptError,
    decode_state,
    decode_value,
    describe_unkept,
    encode_states,
    encode_values,
)
from fcluster.graph.typed import holds_typed, in_part, of_part, tagged, untagged, with_fixed_offset

offsets = st.integers(-86_399, 86_399).map(lambda seconds: timezone(timedelta(seconds=seconds)))
zones = st.none() | offsets
typed = st.one_of(
    st.decimals(allow_nan=False, allow_infinity=False),
    st.sampled_from([Decimal("0.00"), Decimal("-0"), Decimal("1E+30"), Decimal("1." + 40 * "3")]),
    st.datetimes(timezones=zones, allow_imaginary=False),
    st.dates(),
    st.times(timezones=zones),
    st.timedeltas(),
    st.uuids(),
    st.binary(max_size=5),
)
plain = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False, width=16)
finite = plain.filter(lambda value: value not in (float("inf"), float("-inf")))
names = st.sampled_from(["a", "$", "$decimal", "$date", "$kept", ""])
values = st.recursive(
    finite | typed,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=2),
    max_leaves=8,
)


def shown(value: Any) -> str:
    """Tells apart what is equal: 1 and Decimal(1), 1.0 and 1.00, times with other offsets."""
    if isinstance(value, dict):
        return str({name: shown(item) for name, item in value.items()})  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list):
        return str([shown(item) for item in value])  # pyright: ignore[reportUnknownVariableType]
    offset = value.utcoffset() if isinstance(value, datetime | time) else ""
    return f"{type(value).__name__} {value!r} {offset}"


@given(st.lists(values, max_size=4))
def test_values_come_back_as_they_were(kept: list[Any]) -> None:
    encoded = encode_values(kept)
    assert [shown(decode_value(raw)) for raw in encoded] == list(map(shown, kept))
    assert encode_values([decode_value(raw) for raw in encoded]) == encoded


@given(st.dictionaries(names, values, max_size=3))
def test_states_come_back_as_they_were(state: dict[str, Any]) -> None:
    (raw,) = encode_states([state])
    assert shown(decode_state(raw)) == shown(state)
    assert raw.startswith(TYPED_MARK) == holds_typed(state)


@given(values)
def test_parts_of_windows_come_back_as_they_were(kept: Any) -> None:
    part = in_part(kept)
    assert shown(of_part(part)) == shown(kept)
    assert not holds_typed(part)


@pytest.mark.parametrize("kept", [{"$decimal": "1.10"}, {"$": {"$decimal": "1"}}, [{"$date": 5}]])
def test_state_without_such_values_has_the_bytes_of_earlier_versions(kept: Any) -> None:
    (raw,) = encode_values([kept])
    assert not raw.startswith(TYPED_MARK)
    assert decode_value(raw) == kept == untagged(tagged(kept))


def test_local_time_that_comes_twice_keeps_which_one_it_is() -> None:
    for value in (LOCAL.replace(hour=2, fold=1), time(2, 30, fold=1)):
        (raw,) = encode_values([value])
        assert decode_value(raw).fold == 1


def test_time_zone_of_a_library_with_a_fixed_offset_comes_back_as_one_of_python() -> None:
    at = pydantic.TypeAdapter(datetime).validate_python("2026-01-01T00:00:00+02:00")
    back = decode_value(encode_values([at])[0])
    assert (back, type(back.tzinfo)) == (at, timezone)


LOCAL = datetime(2026, 10, 25)  # noqa: DTZ001  it is about them
BERLIN = datetime(2026, 7, 1, tzinfo=ZoneInfo("Europe/Berlin"))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Decimal("NaN"), r"state\['a'\]\[0\] is Decimal\('NaN'\), which can't be encoded"),
        (Decimal("-Infinity"), "which can't be encoded"),
        (
            BERLIN,
            r"a datetime in the time zone Europe/Berlin, which would not come back .* with .astimezone",
        ),
        (BERLIN.timetz(), "is a time in the time zone Europe/Berlin, which"),
        ({Decimal(1)}, r"state\['a'\]\[0\] is a set, which would not come back"),
        ({Decimal(1): 1}, r"has the key Decimal\('1'\), a Decimal; keys must be str"),
        ((Decimal(1),), "is a tuple"),
        (float("nan"), "is nan, which can't be encoded"),
    ],
)
def test_what_would_be_different_is_refused_with_its_place(value: Any, why: str) -> None:
    for also in (1, Decimal("1.10")):
        state = {"a": [value], "also": also}
        with pytest.raises(UnkeptError):
            encode_states([{"fine": 1}, state])
        with pytest.raises(UnkeptError):
            encode_values([[1], [state]])
        assert re.search(why, describe_unkept(state) or "")


def test_moment_in_a_time_zone_gets_the_offset_that_it_has_then() -> None:
    fixed = with_fixed_offset(BERLIN)
    assert (fixed, fixed.isoformat()) == (BERLIN, "2026-07-01T00:00:00+02:00")
    assert encode_values([fixed])
    for value in (datetime(2026, 1, 1, tzinfo=UTC), LOCAL, date(2026, 1, 1), UUID(int=5)):
        assert with_fixed_offset(value) is value
