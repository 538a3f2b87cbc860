"""The store of a table: the newest value of each key of a topic.

Responsible for: its name. `topology.KeepTable` declares a table, and `engine.operators.table` keeps it. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TableStore:
    """The store of one table.

    Attributes:
        table: the table's name.
    """

    table: str

    @property
    def name(self) -> str:
        """The store of its rows. Names of states contain no slash."""
        return f"{self.table}//table"
