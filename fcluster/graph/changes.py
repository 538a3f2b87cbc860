"""What has become of a row of a table. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from fcluster.graph.generics import V_co


@dataclass(frozen=True, slots=True)
class Change(Generic[V_co]):
    """How a row of a table has changed. `Table.changes` gives a stream of these.

    At least one of both is there. In a topic with JSON values, it is an object with "old" and "new".

    Attributes:
        old: its former value. None: the key had no row.
        new: its present value. None: the row was deleted.
    """

    old: V_co | None
    new: V_co | None
