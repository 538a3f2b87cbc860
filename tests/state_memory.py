"""A bound for state in memory that counts entries, so that tests know which ones stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fcluster.engine.memory import StateMemory
from fcluster.engine.state import StoreTable


class EntriesMax(StateMemory):
    """Each shard keeps this many clean entries."""

    def __init__(self, entries: int) -> None:
        super().__init__(0)
        self._entries = entries

    def settle(self, holder: Any) -> None:
        """Evict from the largest tables what is too much."""
        tables: Mapping[str, StoreTable] = holder.tables
        excess = sum(table.counts()[1] for table in tables.values()) - self._entries
        for table in sorted(tables.values(), key=lambda table: -table.counts()[1]):
            if excess > 0:
                evicted = min(excess, table.counts()[1])
                table.evict(evicted)
                excess -= evicted
