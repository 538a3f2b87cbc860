"""The stores of tables. `operators.KeptTable` declares tables. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TableStore:
    """The store of one table.

    Attributes:
        table: the table's name.
        of: "rows": the newest value of each key. "groups": what is computed of each group of another table's
            rows, or of each key's records. "members": what each row of that table contributes to which group.
            "versions", "due", "clock": the former rows of a table with a history; see `engine.history`.
            "times", "clock": of rows and members with a TTL: when they expire, and the table's event time.
            "links", "count", "subscribers", "early", "seen": of a join by a foreign key; see
            `engine.operators.foreign`. "loaded": of a copy of a global table; see `engine.loading`.
        ttl_ms: of rows and members: how long they are kept. None: for good.
        clock: with a TTL, the name of the table by whose clock they expire.
    """

    table: str
    of: Literal[
        "rows",
        "groups",
        "members",
        "versions",
        "due",
        "clock",
        "times",
        "links",
        "count",
        "subscribers",
        "early",
        "seen",
        "loaded",
    ] = "rows"
    ttl_ms: int | None = None
    clock: str = ""

    @property
    def name(self) -> str:
        """The store's name. Names of states contain no slash."""
        return f"{self.table}//table" if self.of == "rows" else f"{self.table}//{self.of}"
