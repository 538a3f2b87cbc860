"""Windows in processing time: a record is in them by when it is processed, whatever its timestamp is."""

from __future__ import annotations

from typing import Any, cast

from fcluster.engine.operators.base import CompiledOperator, Surroundings
from fcluster.engine.processing_time import ProcessingTime
from fcluster.engine.records import SourceRecord
from fcluster.engine.stamps import StampedRecord
from fcluster.engine.steps import Place, Step
from fcluster.engine.windows import OpenInTime


class InProcessingTime:
    """Passes each record to the operator of its windows with the processing time as its timestamp."""

    keeps_value = False

    def __init__(self, operator: CompiledOperator, name: str) -> None:
        self._operator = operator
        self._name = name

    @property
    def place(self) -> Place:
        """See `CompiledOperator`."""
        return self._operator.place

    @property
    def stores(self) -> tuple[str, ...]:
        """See `CompiledOperator`."""
        return self._operator.stores

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        add = self._operator.compile(surroundings, following)
        windows = cast("OpenInTime", surroundings.timers[self._name])
        read = cast("ProcessingTime", windows.clock).read

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            add(StampedRecord(record, read()), key, value)

        return step
