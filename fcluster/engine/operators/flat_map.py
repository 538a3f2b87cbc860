"""Flat map: replaces a value by any number of values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import GeneratorType
from typing import Any

from fcluster.common.failures import type_of
from fcluster.engine.operators.base import Surroundings, close_generator, place_of_function
from fcluster.engine.records import SourceRecord
from fcluster.engine.showing import of_values
from fcluster.engine.steps import RecordError, Step, StepFailure
from fcluster.graph.operators import FlatMap

_USUAL: frozenset[type] = frozenset({list, GeneratorType})
"""Types that are known to be valid without a look at the value, for speed."""
_UNORDERED: tuple[type, ...] = (set, frozenset)
_ONE_VALUE: tuple[type, ...] = (str, bytes, bytearray, Mapping)


class FlatMapOperator:
    """Calls the function with each value and passes on each value that it returns or yields, in order.

    Each value goes through all following steps before the next one is requested. So a function may yield
    millions of values, or, like a handler, the same object several times with changes in between.
    """

    stores: tuple[str, ...] = ()
    keeps_value = False

    def __init__(self, node: FlatMap, number: int, chain: str) -> None:
        self._function = node.function
        self.place = place_of_function("flat_map", node.function, number, chain, node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        (function,), showing = of_values(surroundings.source, surroundings.partition, self._function)
        place, passing = self.place, surroundings.passing

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            values: Any = None
            try:
                values = function(value)
                if type(values) not in _USUAL:
                    _check(values)
                for one in values:
                    following(record, key, one)
            except passing:
                close_generator(values)
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return showing(step)


def _check(values: Any) -> None:
    """Refuse what is most likely a mistake, or would have another order in a replay."""
    if values is None:
        raise RecordError("its function returned None; return a list of values, [] if there are none")
    if isinstance(values, _UNORDERED):
        raise RecordError(
            f"its function returned a {type_of(values)}, whose order isn't the same in every process; "
            "return sorted(...) of it"
        )
    if isinstance(values, _ONE_VALUE) or not isinstance(values, Iterable):
        raise RecordError(
            f"its function returned one value ({type_of(values)}); return a list of values, [value] if it is "
            "one"
        )
