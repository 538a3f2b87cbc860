"""Branch: passes a value on if it goes this way."""

from __future__ import annotations

from typing import Any

from fcluster.engine.operators.base import Surroundings, place_of_function
from fcluster.engine.records import SourceRecord
from fcluster.engine.showing import of_values
from fcluster.engine.steps import Step, StepFailure
from fcluster.graph.operators import Branch


class BranchOperator:
    """Calls the functions one after another, up to its own, and passes the value on if its own is the first
    that returns something true.

    The other branches run the same functions for the same value, each in its own chain. So if a function
    fails, only its own branch reports that, and the value doesn't go any of the later ways: one record that
    fails is one failure.
    """

    stores: tuple[str, ...] = ()
    keeps_value = True

    def __init__(self, node: Branch, number: int, chain: str) -> None:
        self._functions = node.functions[: node.number + 1]
        self._is_rest = node.is_rest
        self.place = place_of_function("branch", node.function, number, chain, node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        functions, showing = of_values(surroundings.source, surroundings.partition, *self._functions)
        before, own = (functions, None) if self._is_rest else (functions[:-1], functions[-1])
        place, passing = self.place, surroundings.passing

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            try:
                for function in before:
                    if function(value):
                        return
            except passing:
                raise
            except BaseException:  # noqa: BLE001  the branch of that function reports it
                return
            if own is not None:
                try:
                    goes_elsewhere = not own(value)
                except BaseException as error:
                    raise StepFailure(place, error) from error
                if goes_elsewhere:
                    return
            following(record, key, value)

        return showing(step)
