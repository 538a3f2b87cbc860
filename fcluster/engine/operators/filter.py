"""Filter: passes a value on, or doesn't."""

from __future__ import annotations

from typing import Any

from fcluster.engine.operators.base import Surroundings, place_of_function
from fcluster.engine.records import SourceRecord
from fcluster.engine.showing import of_values
from fcluster.engine.steps import Step, StepFailure
from fcluster.graph.operators import Filter


class FilterOperator:
    """Calls the function with each value, and passes the value on if the result is true."""

    stores: tuple[str, ...] = ()
    keeps_value = True

    def __init__(self, node: Filter, number: int, chain: str) -> None:
        self._function = node.function
        self.place = place_of_function("filter", node.function, number, chain, node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        (function,), showing = of_values(surroundings.source, surroundings.partition, self._function)
        place = self.place

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            try:
                dropped = not function(value)  # `not` uses the result, which may raise too
            except BaseException as error:
                raise StepFailure(place, error) from error
            if dropped:
                return
            following(record, key, value)

        return showing(step)
