"""Broadcast: writes each row of a global table to all shards of a stage.

Each shard has a partition of the topic for itself. So it has an input of its own with all rows, with its own
offsets, and nothing else has to know that other shards have the same rows.
"""

from __future__ import annotations

from typing import Any

from fcluster.engine.history import NO_PLACE
from fcluster.engine.operators.base import Surroundings
from fcluster.engine.records import OUTPUT_TROUBLE, SourceRecord
from fcluster.engine.steps import Place, RecordError, Step, StepFailure
from fcluster.graph.operators import Broadcast


class BroadcastOperator:
    """Writes the bytes that were read, with key and timestamp, once for each shard of the stage."""

    stores: tuple[str, ...] = ()
    keeps_value = True

    def __init__(self, node: Broadcast) -> None:
        self._node = node
        self.place = Place(node.table, f"in the global table {node.table!r}", node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:  # noqa: ARG002  the chain ends here
        """See `CompiledOperator`."""
        place, port = self.place, surroundings.port_at(self.place)
        sizes, keeps_history = surroundings.stage_sizes, self._node.keeps_history
        copies = [(reader, topic.name) for reader, topic in self._node.copies]

        def step(record: SourceRecord, key: bytes | None, _value: Any) -> None:
            if key is None:
                raise StepFailure(place, RecordError("the record has no key, so it is no row of a table"))
            raw, at_ms = record.value(), record.timestamp()[1]
            if keeps_history and at_ms <= 0:
                # Here the table's rule applies. A producer takes 0 for a record without a timestamp.
                if at_ms < 0:
                    raise StepFailure(place, RecordError(NO_PLACE))
                at_ms = 1
            try:
                for reader, topic in copies:
                    for partition in range(sizes[reader]):
                        port.produce(topic, raw, key, at_ms, None, partition)
                        port.records += 1
            except OUTPUT_TROUBLE as error:
                raise StepFailure(place, error) from error

        return step
