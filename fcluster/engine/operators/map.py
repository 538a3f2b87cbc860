"""Map: replaces a value."""

from __future__ import annotations

from typing import Any

from fcluster.engine.operators.base import Surroundings, place_of_function
from fcluster.engine.records import SourceRecord
from fcluster.engine.showing import of_values
from fcluster.engine.steps import Step, StepFailure
from fcluster.graph.operators import Map


class MapOperator:
    """Calls the function with each value and passes on what it returns."""

    stores: tuple[str, ...] = ()
    keeps_value = False

    def __init__(self, node: Map, number: int, chain: str) -> None:
        self._function = node.function
        self.place = place_of_function("map", node.function, number, chain, node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        (function,), showing = of_values(surroundings.source, surroundings.partition, self._function)
        place = self.place

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            try:
                mapped = function(value)
            except BaseException as error:
                raise StepFailure(place, error) from error
            following(record, key, mapped)

        return showing(step)
