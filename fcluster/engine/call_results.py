"""What has come of the calls of records, for the steps behind them.

Responsible for: handing the results of a record's calls from `engine.calling` to the operator of the chain's
last `map_async`. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fcluster.engine.records import SourceRecord, describe_record
from fcluster.engine.steps import StepFailure


@dataclass(slots=True)
class Called:
    """What has come of a record's calls in one chain.

    Attributes:
        values: the results of the last `map_async`.
        failure: what has failed instead.
    """

    values: Sequence[Any] = ()
    failure: StepFailure | None = None


class CallResults:
    """What has come of the calls of records that are about to be processed."""

    def __init__(self) -> None:
        self._called: dict[tuple[str, int], Called] = {}

    def put(self, chain: str, record: SourceRecord, called: Called) -> None:
        """The calls of that record in that chain are done."""
        self._called[chain, record.offset()] = called

    def take(self, chain: str, record: SourceRecord) -> Sequence[Any]:
        """The results, once.

        Raises:
            StepFailure: a step in front, or a call, has failed.
        """
        called = self._called.pop((chain, record.offset()), None)
        if called is None:
            raise AssertionError(
                f"{describe_record(record)} couldn't be decoded before, so there were no calls"
            )
        if called.failure is not None:
            raise called.failure from called.failure.error
        return called.values
