"""How a source topic is read: with or without records of transactions that may still be aborted."""

from __future__ import annotations

from typing import Literal

Isolation = Literal["read-committed", "read-uncommitted"]
ISOLATIONS: tuple[Isolation, ...] = ("read-committed", "read-uncommitted")
