"""Counting different values approximately, in a few kilobytes however many there are.

Responsible for: the aggregate `approx_distinct`, and what is kept of it. The sketch is one of Apache
DataSketches (the extra `sketches`): a CPC sketch with 4,096 rows. The library is imported when a job uses the
aggregate. Pure.

    kept    [sketch as base64, {hash of a value (16 hex digits): 0}]

New hashes wait in the dict until there are more than `RECENT_MAX`. Then they go into the sketch, all at once:
taking a sketch out of its bytes and putting it back takes longer than the rest of the work for 50 values.

Invariants:
- The result depends on the set of values alone: not on their order, on how often they came, on which of them
  were merged, or on where barriers fell. So it is the estimate for the number of coupons (ICON). CPC's other
  estimate (HIP), which is a little more exact, depends on the order.
- Up to `RECENT_MAX` different values, it is exact: then there is no sketch yet.
"""

from __future__ import annotations

import importlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Any

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_text
from fcluster.graph.aggregates import Aggregate, check_of, text_of
from fcluster.graph.generics import V

RECENT_MAX = 256
LG_ROWS = 12
"""The standard error is ln 2 / sqrt(rows): 1.1 %."""
_HASH_BYTES = 8


def approx_distinct(of: Callable[[V], Any] = lambda value: value) -> Aggregate[int, V]:
    """About how many different `of(value)` there are. What is kept takes 9 kB at most, however many come.

    Up to 256 different values, the result is exact. Beyond that, its standard error is 1.1 %: it is off by
    less than 3.3 % in 99.7 % of all cases. It depends only on which values came, not on their order.

    Two values are the same if their JSON is the same, as in `count_distinct`. It needs the extra `sketches`.

    Raises:
        JobError: the library isn't installed.
    """
    check_of("approx_distinct()", of)
    library = _library()

    def opened(text: str) -> Any:
        if not text:
            return library.cpc_sketch(LG_ROWS)
        return library.cpc_sketch.deserialize(b64decode(text))

    def filled(text: str, hashes: Iterable[str]) -> Any:
        sketch = opened(text)
        for one in hashes:
            sketch.update(int(one, 16))
        return sketch

    def tidied(text: str, recent: dict[str, int]) -> list[Any]:
        if len(recent) <= RECENT_MAX:
            return [text, recent]
        return [_text(filled(text, recent)), {}]

    def add(kept: list[Any], value: Any) -> list[Any]:
        one = blake2b(text_of(of(value)), digest_size=_HASH_BYTES).hexdigest()
        recent: dict[str, int] = kept[1]
        if one in recent:
            return kept
        recent[one] = 0
        return kept if len(recent) <= RECENT_MAX else tidied(kept[0], recent)

    def merge(kept: list[Any], later: list[Any]) -> list[Any]:
        text = kept[0] or later[0]
        if kept[0] and later[0]:
            union = library.cpc_union(LG_ROWS)
            union.update(opened(kept[0]))
            union.update(opened(later[0]))
            text = _text(union.get_result())
        return tidied(text, kept[1] | later[1])

    def result(kept: list[Any]) -> int:
        if not kept[0]:
            return len(kept[1])
        union = library.cpc_union(LG_ROWS)  # the result of a union has the estimate that knows no order
        union.update(filled(*kept))
        return round(union.get_result().get_estimate())

    return Aggregate("approx_distinct", lambda: ["", {}], add, result, merge, takes_copies=False)


def _text(sketch: Any) -> str:
    return b64encode(sketch.serialize()).decode()


def _library() -> Any:
    """Apache DataSketches. It has no types, so it isn't imported as usual."""
    try:
        return importlib.import_module("datasketches")
    except ImportError as error:
        raise JobError(
            "approx_distinct() needs the library Apache DataSketches, which can't be imported here: "
            f"{bounded_text(str(error), 200)}.",
            remedy="Install it on every host of the cluster: pip install 'fcluster[sketches]'. "
            "Or use count_distinct(), which is exact and keeps all values.",
        ) from error
