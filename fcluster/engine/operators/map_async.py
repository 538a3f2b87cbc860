"""Map async: replaces a value by what a call to another service has returned.

The calls of a record are made before it is processed (`engine.calling`), and the steps in front of the last
`map_async` of its chain run then, too. So nothing is left to do here but to take the results.
"""

from __future__ import annotations

from typing import Any

from fcluster.engine.operators.base import Surroundings, place_of_function
from fcluster.engine.records import SourceRecord
from fcluster.engine.steps import Step
from fcluster.graph.operators import MapAsync


class MapAsyncOperator:
    """Passes on the results of the record's calls, or fails as one of them has failed."""

    stores: tuple[str, ...] = ()
    keeps_value = False

    def __init__(self, node: MapAsync, number: int, chain: str) -> None:
        self._chain = chain
        self.place = place_of_function("map_async", node.function, number, chain, node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`. The step ignores the value that it gets."""
        chain, results = self._chain, surroundings.results

        def step(record: SourceRecord, key: bytes | None, _value: Any) -> None:
            for value in results.take(chain, record):
                following(record, key, value)

        return step
