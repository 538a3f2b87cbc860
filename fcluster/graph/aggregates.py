"""What a window computes from its records: counts, sums and so on, and any fold of the user's.

Responsible for: `Aggregate`, and the aggregates that come with fcluster. An aggregate is three functions over
what is kept while the window is open. That is state: it is stored as JSON, so it can hold what JSON can hold,
and the values of `typed`. Pure.
"""

from __future__ import annotations

import operator
import re
from bisect import bisect_left, bisect_right, insort, insort_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import Enum
from typing import Any, Generic, TypeVar, cast

import msgspec

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr, type_of
from fcluster.graph.codecs import decode_json, encode_json
from fcluster.graph.decimals import divided, joined, mixed, plus, spread, square
from fcluster.graph.exact import mean_of, rounded, shifted, squared, variance_of
from fcluster.graph.generics import T, V, V_contra
from fcluster.graph.models import is_model, model_codec
from fcluster.graph.signatures import counted_arguments, declared_otherwise, does_yield, is_async, name_of
from fcluster.graph.typed import TYPED, in_part, of_part, with_fixed_offset

_R_co = TypeVar("_R_co", covariant=True)

_LEGAL_NAME = re.compile(r"[a-zA-Z0-9._-]{1,200}")
_UNCHANGING_TYPES = frozenset({str, int, float, bool, type(None)})


def _same(kept: Any) -> Any:
    return kept


def plain(value: Any) -> Any:
    """`value`, for aggregates that keep it: an object of a model as what its JSON holds, a tuple as a list,
    an enum as its value, and dicts and lists as copies, which nobody else changes.
    """
    kind = cast("type[object]", type(value))
    if kind in _UNCHANGING_TYPES:
        return value
    if kind is dict:
        items = cast("dict[Any, Any]", value).items()
        return {name: item if type(item) in _UNCHANGING_TYPES else plain(item) for name, item in items}
    if kind is list or isinstance(value, tuple):
        return [plain(item) for item in cast("Sequence[Any]", value)]
    if kind in TYPED:
        return with_fixed_offset(value)
    if isinstance(value, Enum):
        return plain(value.value)
    return decode_json(encode_json(value)) if is_model(kind) else value


def unshared(value: Any) -> Any:
    """`value` with dicts and lists of its own."""
    if type(value) is dict:
        items = cast("dict[Any, Any]", value).items()
        return {name: item if type(item) in _UNCHANGING_TYPES else unshared(item) for name, item in items}
    if type(value) is list:
        return [unshared(item) for item in cast("list[Any]", value)]
    return value


def _compared(value: Any) -> Any:
    """`value`, for aggregates that compare it: a tuple as a list, which is compared in the same way, and an
    enum as its value.
    """
    if type(value) in _UNCHANGING_TYPES:
        return value
    if isinstance(value, tuple | list):
        return [_compared(item) for item in cast("Sequence[Any]", value)]
    return _compared(value.value) if isinstance(value, Enum) else with_fixed_offset(value)


def _of_model(value: Any) -> Any:
    """What msgspec doesn't know: a pydantic model.

    Raises:
        TypeError: it is none.
    """
    if not is_model(cast("type[object]", type(value))):
        raise TypeError(f"{bounded_repr(value)} is of type {type_of(value)}, which JSON can't hold")
    return plain(value)


text_of = msgspec.json.Encoder(order="deterministic", enc_hook=_of_model).encode
"""The JSON by which values are told apart."""


@dataclass(frozen=True, slots=True)
class Aggregate(Generic[_R_co, V_contra]):
    """A fold over the values of a window. For type checkers, it has the types of result and values.

    Args:
        name: identifies the aggregate. A job is refused if its open windows were filled by an aggregate with
            another name.
        init: called as `init()`. Returns what a window begins with.
        add: called as `add(kept, value)` for each record, or as `add(kept, value, timestamp_ms)` if
            `takes_time`. Returns what is kept from then on, which may be `kept` itself, changed in place.
        result: called as `result(kept)`. Returns the result. Default: what is kept.
        merge: called as `merge(kept, later)`. Returns what is kept of two windows that become one.
        takes_time: whether `add` also takes the timestamp of the record.
        subtract: called as `subtract(kept, value)`. Returns what is kept without a value that was added
            before: for groups of a table's rows, which change and leave.
        for_groups: another aggregate with `subtract`, which computes the same for such groups. It may have to
            keep more.
        takes_copies: whether `add` and `subtract` get dicts and lists of their own, which they may keep and
            change. False: they get the value itself. That is faster, and right if what is kept contains no
            dicts and lists of values.

    What is kept is saved as JSON: numbers, text, lists, dicts with text as keys, booleans and None; Decimals,
    datetimes, dates, times, timedeltas, UUIDs and bytes come back as such.

    Raises:
        JobError: the name isn't valid, or something isn't a function.
    """

    name: str
    init: Callable[[], Any]
    add: Callable[..., Any]
    result: Callable[[Any], _R_co] = _same
    merge: Callable[[Any, Any], Any] | None = None
    takes_time: bool = False
    subtract: Callable[[Any, Any], Any] | None = None
    for_groups: Aggregate[_R_co, V_contra] | None = None
    takes_copies: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _LEGAL_NAME.fullmatch(self.name):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JobError(
                f"The name {bounded_repr(self.name)} of an Aggregate isn't valid.",
                remedy="Use letters a-z and A-Z, digits, '.', '_' and '-'.",
            )
        adds = ("kept", "value", "timestamp_ms") if self.takes_time else ("kept", "value")
        for part, parameters in (
            ("init", ()),
            ("add", adds),
            ("result", ("kept",)),
            ("merge", ("kept", "later")),
            ("subtract", ("kept", "value")),
        ):
            function = getattr(self, part)
            if function is not None or part in ("init", "add", "result"):
                check_of(f"{part}= of the aggregate {self.name!r}", function, parameters)


def count() -> Aggregate[int]:
    """The number of records."""

    def add(kept: int, _value: Any) -> int:
        return kept + 1

    def subtract(kept: int, _value: Any) -> int:
        return kept - 1

    return Aggregate("count", int, add, merge=operator.add, subtract=subtract, takes_copies=False)


def sum_(of: Callable[[V], Any] = _same) -> Aggregate[Any, V]:
    """The sum of `of(value)`; of the values themselves by default. That of ints, Decimals and timedeltas is
    exact. For groups of a table that of floats is, too, and rounded once.
    """
    check_of("sum_()", of)

    def add(kept: Any, value: Any) -> Any:
        new = of(value)
        try:
            total = kept + new
        except _NOT_ADDED:
            return plus(kept, new)
        return total if type(total) is not Decimal else plus(kept, new)

    def put(kept: Any, value: Any) -> Any:
        return shifted(kept, of(value), 1)

    def subtract(kept: Any, value: Any) -> Any:
        return shifted(kept, of(value), -1)

    changing = Aggregate("sum", int, put, rounded, subtract=subtract, takes_copies=False)
    return Aggregate("sum", int, add, merge=joined, for_groups=changing, takes_copies=False)


def min_(of: Callable[[V], Any] = _same) -> Aggregate[Any, V]:
    """The smallest `of(value)`. None for a group of a table without rows; such groups keep all values."""
    check_of("min_()", of)
    return _chosen("min", of, min, 0)


def max_(of: Callable[[V], Any] = _same) -> Aggregate[Any, V]:
    """The greatest `of(value)`. None for a group of a table without rows; such groups keep all values."""
    check_of("max_()", of)
    return _chosen("max", of, max, -1)


def mean(of: Callable[[V], Any] = _same) -> Aggregate[Any, V]:
    """The arithmetic mean of `of(value)`: a Decimal of Decimals, a timedelta of timedeltas, otherwise a
    float. That of Decimals, and of a group of a table, is exact, rounded once; None for a group without rows.
    """
    check_of("mean()", of)

    def add(kept: list[Any], value: Any) -> list[Any]:
        new = of(value)
        try:
            total = kept[0] + new
        except _NOT_ADDED:
            total = plus(kept[0], new)
        else:
            if type(total) is Decimal:
                total = plus(kept[0], new)
        kept[0] = total
        kept[1] += 1
        return kept

    def put(kept: list[Any], value: Any) -> list[Any]:
        return [shifted(kept[0], of(value), 1), kept[1] + 1]

    def subtract(kept: list[Any], value: Any) -> list[Any]:
        return [shifted(kept[0], of(value), -1), kept[1] - 1]

    def result(kept: list[Any]) -> Any:
        return divided(kept[0], kept[1])

    def result_of_group(kept: list[Any]) -> Any:
        return mean_of(kept[0], kept[1]) if kept[1] else None

    return Aggregate(
        "mean",
        lambda: [0, 0],
        add,
        result,
        _added,
        for_groups=Aggregate(
            "mean", lambda: [0, 0], put, result_of_group, subtract=subtract, takes_copies=False
        ),
        takes_copies=False,
    )


def first(of: Callable[[V], T] = _same) -> Aggregate[T, V]:
    """`of(value)` of the record with the smallest timestamp; among equal ones, of the first one."""
    check_of("first()", of)

    def add(kept: list[Any], value: Any, timestamp_ms: int) -> list[Any]:
        return [timestamp_ms, plain(of(value))] if not kept or timestamp_ms < kept[0] else kept

    return Aggregate(
        "first",
        list,
        add,
        _second,
        lambda kept, later: later if later[0] < kept[0] else kept,
        takes_time=True,
        takes_copies=False,
    )


def last(of: Callable[[V], T] = _same) -> Aggregate[T, V]:
    """`of(value)` of the record with the greatest timestamp; among equal ones, of the last one."""
    check_of("last()", of)

    def add(kept: list[Any], value: Any, timestamp_ms: int) -> list[Any]:
        return [timestamp_ms, plain(of(value))] if not kept or timestamp_ms >= kept[0] else kept

    return Aggregate(
        "last",
        list,
        add,
        _second,
        lambda kept, later: later if later[0] >= kept[0] else kept,
        takes_time=True,
        takes_copies=False,
    )


def collect(of: Callable[[V], T] = _same) -> Aggregate[list[T], V]:
    """A list of all `of(value)`, in the order in which the records were read. When two sessions become one,
    the values of the earlier one come first.
    """
    check_of("collect()", of)

    def add(kept: list[Any], value: Any) -> list[Any]:
        kept.append(plain(of(value)))
        return kept

    def subtract(kept: list[Any], value: Any) -> list[Any]:
        del kept[_place_of(kept, 0, len(kept), plain(of(value)))]
        return kept

    return Aggregate(
        "collect", list, add, merge=lambda kept, later: kept + later, subtract=subtract, takes_copies=False
    )


def reduce(
    function: Callable[[Any, Any], Any],
    of: Callable[[V], Any] = _same,
    *,
    subtract: Callable[[Any, Any], Any] | None = None,
    model: type[Any] | None = None,
) -> Aggregate[Any, V]:
    """`function(function(a, b), c)` and so on, of all `of(value)` in the order in which they were read.

    Args:
        function: see above.
        of: returns what is reduced.
        subtract: called as `subtract(reduced, of(value))` to take a value away, for groups of a table's rows.
            None: it can't be used for these.
        model: a dataclass, msgspec Struct or pydantic model, if `of(value)` and what the functions return are
            objects of it. They are kept as JSON, which takes its time for each record.
    """
    check_of("reduce()", function, ("reduced", "value"))
    check_of("reduce(of=)", of)
    if subtract is not None:
        check_of("reduce(subtract=)", subtract, ("reduced", "value"))

    to_kept, of_kept = (_same, _same) if model is None else _kept_as(model)

    def take_away(kept: list[Any], value: Any) -> list[Any]:
        assert subtract is not None
        return [to_kept(subtract(of_kept(kept[0]), unshared(of(value))))]

    def add(kept: list[Any], value: Any) -> list[Any]:
        new = unshared(of(value))  # the function may change what it has reduced so far, and keep parts of it
        return [to_kept(function(of_kept(kept[0]), new) if kept else new)]

    return Aggregate(
        "reduce",
        list,
        add,
        lambda kept: of_kept(kept[0]),
        lambda kept, later: [to_kept(function(of_kept(kept[0]), of_kept(later[0])))],
        subtract=None if subtract is None else take_away,
        takes_copies=False,
    )


def _kept_as(model: type[Any]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """How an object of the model is kept as plain data, and how it comes back.

    Raises:
        JobError: it is no model.
    """
    if not is_model(model):
        raise JobError(
            f"reduce(model=) got {bounded_repr(model)}, which is no model.",
            remedy="Give it a dataclass, a msgspec Struct or a pydantic model. Other values need none.",
        )
    codec = model_codec(model)
    return (lambda value: decode_json(codec.encode(value))), (lambda kept: codec.decode(encode_json(kept)))


def variance(of: Callable[[V], Any] = _same, *, sample: bool = False) -> Aggregate[Any, V]:
    """The variance of `of(value)`.

    Args:
        of: returns a number.
        sample: whether the records are a sample: then the sum is divided by n - 1, and the result is None if
            there is only one record.

    That of Decimals is a Decimal. It is exact, rounded once, as that of a group of a table is.
    """
    check_of("variance()", of)

    # Welford's algorithm: the difference of two large sums would lose all digits. Sums of Decimals don't.
    def add(kept: list[Any], value: Any) -> list[Any]:
        number, average, squares = kept
        new = of(value)
        try:
            shifted = average + (new - average) / (number + 1)
            return [number + 1, shifted, squares + (new - average) * (new - shifted)]
        except TypeError:
            if not isinstance(new, Decimal) and not _has_decimals(kept):
                raise
        return _with_decimal(kept, new)

    def merge(kept: list[Any], later: list[Any]) -> list[Any]:
        have_decimals = _has_decimals(kept), _has_decimals(later)
        if all(have_decimals):
            return [kept[0] + later[0], _added(kept[1], later[1]), 0]
        if any(have_decimals):
            raise mixed("other")
        number, apart = kept[0] + later[0], later[1] - kept[1]
        average = kept[1] + apart * later[0] / number
        return [number, average, kept[2] + later[2] + apart * apart * kept[0] * later[0] / number]

    def result(kept: list[Any]) -> Any:
        divisor = kept[0] - 1 if sample else kept[0]
        if divisor <= 0:
            return None
        return spread(kept[0], kept[1][0], kept[1][1], divisor) if _has_decimals(kept) else kept[2] / divisor

    def put(kept: list[Any], value: Any) -> list[Any]:
        new = of(value)
        return [kept[0] + 1, shifted(kept[1], new, 1), squared(kept[2], new, 1)]

    def subtract(kept: list[Any], value: Any) -> list[Any]:
        gone = of(value)
        return [kept[0] - 1, shifted(kept[1], gone, -1), squared(kept[2], gone, -1)]

    def result_of_group(kept: list[Any]) -> Any:
        divisor = kept[0] - 1 if sample else kept[0]
        return variance_of(kept[0], kept[1], kept[2], divisor) if divisor > 0 else None

    return Aggregate(
        "variance",
        lambda: [0, 0.0, 0.0],
        add,
        result,
        merge,
        for_groups=Aggregate(
            "variance", lambda: [0, 0, 0], put, result_of_group, subtract=subtract, takes_copies=False
        ),
        takes_copies=False,
    )


def _with_decimal(kept: list[Any], new: Any) -> list[Any]:
    """What `variance` keeps of Decimals: how many, [their sum, the sum of their squares], and nothing."""
    if not isinstance(new, Decimal):
        raise mixed(type_of(new))
    number, total, squares = kept[0], 0, 0
    if number:
        if not _has_decimals(kept):
            raise mixed("other")
        total, squares = kept[1]
    return [number + 1, [plus(total, new), joined(squares, square(new))], 0]


def _has_decimals(kept: list[Any]) -> bool:
    """Whether `variance` keeps what `_with_decimal` returns."""
    return type(kept[1]) is list


def top_n(n: int, by: Callable[[V], Any], of: Callable[[V], T] = _same) -> Aggregate[list[T], V]:
    """The `n` values with the greatest `by(value)`, greatest first; among equal ones, those that came
    first. Groups of a table's rows keep all values.

    Args:
        n: how many values.
        by: returns what is compared, for example a number, or a tuple of several.
        of: returns what the result contains of each. Default: the values themselves.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise JobError(f"n={bounded_repr(n)} of top_n is not a number of values.", remedy="Use 1 or more.")
    check_of("top_n(by=)", by)
    check_of("top_n(of=)", of)

    def put(kept: list[Any], pair: list[Any]) -> None:
        # Sorted smallest first, and among equal ones the last one first: so the first one is removed.
        if len(kept) == n and not pair[0] > kept[0][0]:
            return
        insort_left(kept, pair, key=_first)
        if len(kept) > n:
            del kept[0]

    def add(kept: list[Any], value: Any) -> list[Any]:
        score = _compared(by(value))
        if len(kept) < n or score > kept[0][0]:
            put(kept, [score, plain(of(value))])
        return kept

    def merge(kept: list[Any], later: list[Any]) -> list[Any]:
        merged = list(kept)
        for pair in reversed(later):
            put(merged, pair)
        return merged

    def put_all(kept: list[Any], value: Any) -> list[Any]:
        insort_left(kept, [_compared(by(value)), plain(of(value))], key=_first)  # in the same order as `put`
        return kept

    def subtract(kept: list[Any], value: Any) -> list[Any]:
        return _without(kept, [_compared(by(value)), plain(of(value))], _first)

    return Aggregate(
        "top_n",
        list,
        add,
        lambda kept: [pair[1] for pair in reversed(kept)],
        merge,
        for_groups=Aggregate(
            "top_n",
            list,
            put_all,
            lambda kept: [pair[1] for pair in kept[: -n - 1 : -1]],
            subtract=subtract,
            takes_copies=False,
        ),
        takes_copies=False,
    )


def count_distinct(of: Callable[[V], Any] = _same) -> Aggregate[int, V]:
    """How many different `of(value)` there are, counted exactly: all of them are kept until the window
    closes.

    Two values are the same if their JSON is the same: 1 and 1.0 are different, as are the Decimals 1.0 and
    1.00, and the order of a dict's keys doesn't matter.
    """
    check_of("count_distinct()", of)

    def add(kept: dict[str, int], value: Any) -> dict[str, int]:
        text = text_of(of(value)).decode()
        kept[text] = kept.get(text, 0) + 1
        return kept

    def subtract(kept: dict[str, int], value: Any) -> dict[str, int]:
        text = text_of(of(value)).decode()
        kept[text] -= 1
        if not kept[text]:
            del kept[text]
        return kept

    def merge(kept: dict[str, int], later: dict[str, int]) -> dict[str, int]:
        return kept | {text: number + kept.get(text, 0) for text, number in later.items()}

    return Aggregate("count_distinct", dict, add, len, merge, subtract=subtract, takes_copies=False)


def check_aggregates(
    step: str, fields: dict[str, Any], *, merged: str = "", taken: Sequence[str] = ()
) -> tuple[tuple[str, Aggregate[Any]], ...]:
    """Check the fields of a window's results.

    Args:
        step: the window's name.
        fields: the aggregates, by name.
        taken: further names that each result has already.
        merged: if the aggregates of several windows become one: when that happens, in words.

    Raises:
        JobError: there are none, one has a reserved name, isn't an aggregate, or can't be merged.
    """
    _check_any(f"the window {step!r}", fields)
    for name, aggregate in fields.items():
        if name in (*RESULT_FIELDS, *taken):
            raise JobError(
                f"aggregate() of the window {step!r} has a field {name!r}, but each result has a field of "
                "that name already.",
                remedy="Choose another name.",
            )
        checked = _checked_aggregate(f"The field {name!r} of the window {step!r}", name, aggregate)
        if merged and checked.merge is None:
            raise JobError(
                f"The field {name!r} of the window {step!r} has an aggregate without merge=, but {merged}.",
                remedy="Give it merge=function, called as merge(kept, later).",
            )
    return tuple(fields.items())


def check_group_aggregates(table: str, fields: dict[str, Any]) -> tuple[tuple[str, Aggregate[Any]], ...]:
    """Check the fields of the rows of a table of groups.

    Args:
        table: the table's name.
        fields: the aggregates, by name.

    Raises:
        JobError: there are none, or one isn't an aggregate from which values can be taken away again.
    """
    _check_any(f"the groups {table!r}", fields)
    checked: dict[str, Aggregate[Any]] = {}
    for name, aggregate in fields.items():
        what = f"The field {name!r} of the groups {table!r}"
        found = _checked_aggregate(what, name, aggregate)
        found = found.for_groups or found
        if found.subtract is None or found.takes_time:
            raise JobError(
                f"{what} computes {found.name!r}, from which a row that changes can't be taken away.",
                remedy="Use count, sum_, mean, variance, min_, max_, top_n, collect, count_distinct, "
                "reduce(..., subtract=), or an Aggregate with subtract=. For the first or the last, take "
                "collect() of values with their times, and map the table.",
            )
        checked[name] = found
    return tuple(checked.items())


def check_running_aggregates(table: str, fields: dict[str, Any]) -> tuple[tuple[str, Aggregate[Any]], ...]:
    """Check the fields of the rows of a table that a stream's records are aggregated in.

    Args:
        table: the table's name.
        fields: the aggregates, by name.

    Raises:
        JobError: there are none, or one isn't an aggregate.
    """
    _check_any(f"the table {table!r}", fields, f"aggregate(n=count(), name={table!r})")
    for name, aggregate in fields.items():
        _checked_aggregate(f"The field {name!r} of the table {table!r}", name, aggregate)
    return tuple(fields.items())


def _check_any(owner: str, fields: dict[str, Any], example: str = "aggregate(n=count())") -> None:
    if not fields:
        raise JobError(f"aggregate() of {owner} got nothing to compute.", remedy=f"Use {example}.")


def _checked_aggregate(what: str, name: str, aggregate: object) -> Aggregate[Any]:
    if isinstance(aggregate, Aggregate):
        return cast("Aggregate[Any]", aggregate)
    near = getattr(aggregate, "__name__", "")
    ours = _INSTEAD.get(near, near)
    hint = f"{name}={ours}()" if near and callable(aggregate) and ours in _OURS else f"{name}=count()"
    shown = f"the function {bounded_repr(near)}" if near else bounded_repr(aggregate)
    raise JobError(
        f"{what} is {shown}, not an aggregate.",
        remedy=f"Use {hint}, another one of fcluster's, or an Aggregate(...) of your own.",
    )


def parted(fields: Fields) -> Fields:
    """The aggregates of a part of a window's records. The results are what `gathered` takes."""
    return tuple((name, replace(aggregate, result=in_part)) for name, aggregate in fields)


def gathered(fields: Fields) -> Fields:
    """The aggregates of all parts. Their values are results with the fields of `parted`."""

    def gather(name: str, aggregate: Aggregate[Any]) -> Aggregate[Any]:
        merge = aggregate.merge
        assert merge is not None

        def add(kept: list[Any], part: Any) -> list[Any]:
            gained = of_part(part[name])
            return [merge(kept[0], gained) if kept else gained]

        result = aggregate.result
        return Aggregate(aggregate.name, list, add, lambda kept: result(kept[0]), takes_copies=False)

    return tuple((name, gather(name, aggregate)) for name, aggregate in fields)


_NOT_ADDED = (TypeError, ArithmeticError)
"""What Python raises for sums that `plus` may know, or explains."""
RESULT_FIELDS = ("key", "start", "end")
"""The fields of each result of a window besides its aggregates."""
WITHDRAWN = "withdrawn"
"""The field of each update of a session: whether it says what a session that has changed used to be."""
Fields = tuple[tuple[str, Aggregate[Any, Any]], ...]
"""The aggregates of a window, by name."""
_OURS = frozenset(
    {
        "approx_distinct",
        "collect",
        "count",
        "count_distinct",
        "first",
        "last",
        "max_",
        "mean",
        "min_",
        "reduce",
        "sum_",
        "top_n",
        "variance",
    }
)
"""The names of fcluster's own, to tell somebody who has left out the brackets."""


_INSTEAD = {"len": "count", "max": "max_", "min": "min_", "set": "count_distinct", "sum": "sum_"}
"""Functions of Python, and what computes the same of a window."""


def _chosen(
    name: str, of: Callable[[Any], Any], choose: Callable[[Any, Any], Any], at: int
) -> Aggregate[Any]:
    """The smallest or the greatest value, which is at this index of all values in order."""

    def add(kept: list[Any], value: Any) -> list[Any]:
        new = _compared(of(value))
        return [choose(kept[0], new) if kept else new]

    def put(kept: list[Any], value: Any) -> list[Any]:
        insort(kept, _compared(of(value)))
        return kept

    def subtract(kept: list[Any], value: Any) -> list[Any]:
        return _without(kept, _compared(of(value)), _same)

    changing = Aggregate(
        name,
        list,
        put,
        lambda kept: kept[at] if kept else None,
        subtract=subtract,
        takes_copies=False,
    )
    return Aggregate(
        name,
        list,
        add,
        lambda kept: kept[0],
        lambda kept, later: [choose(kept[0], later[0])],
        for_groups=changing,
        takes_copies=False,
    )


def _without(kept: list[Any], gone: Any, key: Callable[[Any], Any]) -> list[Any]:
    """Takes a value away from those that are kept in the order of `key`."""
    begin, end = bisect_left(kept, key(gone), key=key), bisect_right(kept, key(gone), key=key)
    del kept[_place_of(kept, begin, end, gone)]
    return kept


def _place_of(kept: Sequence[Any], begin: int, end: int, gone: Any) -> int:
    """Where the value is that leaves, among those that are equal to it: 1, 1.0 and True are, too.

    Raises:
        ValueError: it isn't there.
    """
    text, kind = text_of(gone), cast("type[object]", type(gone))
    at = next((at for at in range(begin, end) if type(kept[at]) is kind and text_of(kept[at]) == text), None)
    if at is None:
        raise ValueError(f"{bounded_repr(gone)} isn't among the values of the group; has `of` changed?")
    return at


def _first(pair: list[Any]) -> Any:
    return pair[0]


def _second(pair: list[Any]) -> Any:
    return pair[1]


def _added(kept: list[Any], later: list[Any]) -> list[Any]:
    return [joined(one, other) for one, other in zip(kept, later, strict=True)]


def check_of(what: str, function: Any, parameters: Sequence[str] = ("value",)) -> None:
    """Check that what an aggregate got is a function that can be called with these arguments.

    Raises:
        JobError: it isn't.
    """
    if not callable(function):
        raise JobError(f"{what} got {bounded_repr(function)}, not a function.", remedy=_example(parameters))
    name = name_of(function)
    if is_async(function):
        raise JobError(
            f"{what} got the function {name!r}, which is declared with async def.",
            remedy="Declare it with plain def. Calls to other services are made in front of the window or "
            "the group, by stream.map_async(function).",
        )
    if does_yield(function):
        raise JobError(
            f"{what} got the function {name!r}, which yields, but it has to return one result.",
            remedy="Return it. For several values of a record, put .flat_map(function) in front of it.",
        )
    declared = declared_otherwise(function, parameters)
    if declared is not None:
        raise JobError(
            f"{what} got the function {name!r}, which is declared as {declared}, but is called with "
            f"{counted_arguments(parameters)}.",
            remedy=f"Declare it as {name}({', '.join(parameters)}).",
        )


def _example(parameters: Sequence[str]) -> str:
    if parameters == ("value",):
        return "Give it a function, such as lambda value: value['amount']."
    return f"Give it a function, called as function({', '.join(parameters)})."
