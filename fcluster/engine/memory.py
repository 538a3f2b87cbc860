"""How much memory the live entries of state may take: all tables of all shards of a process together.

Responsible for: estimating what an entry takes, and choosing which shard gives up entries. A shard that needs
much may use what others leave; if there isn't enough, each shard has an equal share. Pure.

What can be given up are clean entries only: those that weren't touched since the last barrier. So the bound
holds at barriers. Between two of them, the entries that the open epoch touches come on top.

Threads: a shard may be added and removed by any thread. `settle` belongs to the thread that freezes epochs,
and so do the tables of all shards: it drops entries of any of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from itertools import islice
from sys import getsizeof
from typing import Any, Final, Protocol, cast

SLOTS_BYTES: Final = 150
"""What the tables' own dicts take for an entry, measured: the slots of the key in two or three of them."""
_BREADTH: Final = 16
_DEPTH: Final = 20
_STEPS: Final = 8
_WEIGHT: Final = 1 / 16
"""How much a new sample counts against the mean so far."""


def estimate_bytes(value: Any, breadth: int = _BREADTH, depth: int = _DEPTH) -> int:
    """Roughly what a decoded value takes, with what it contains. Takes a few microseconds however large the
    value is: of a large dict or list, only the first elements are looked at, and only so many levels.

    Keys of dicts aren't counted, since all entries share them. Nesting makes it look at fewer elements.
    """
    size = getsizeof(value)
    if type(value) is dict:
        elements: Collection[Any] = cast("dict[Any, Any]", value).values()
    elif type(value) in (list, tuple):
        elements = cast("Collection[Any]", value)
    else:
        return size
    if not elements or not depth:
        return size
    narrower = max(1, breadth // 4)
    seen = [estimate_bytes(element, narrower, depth - 1) for element in islice(elements, breadth)]
    return size + sum(seen) * len(elements) // len(seen)


class MeanBytes:
    """The mean size of a table's entries, from samples. Recent ones count more.

    Attributes:
        value: the mean, in bytes; that of a small dict before the first sample.
    """

    __slots__ = ("_sampled", "value")

    def __init__(self) -> None:
        self.value = 500.0
        self._sampled = False

    def sample(self, key: bytes, value: Any, encoded: bytes | None) -> None:
        """Take an entry into the mean: its key, decoded value, and encoded value if that is kept, too."""
        size = SLOTS_BYTES + getsizeof(key) + estimate_bytes(value)
        if encoded is not None:
            size += getsizeof(encoded)
        self.value += (size - self.value) * (_WEIGHT if self._sampled else 1)
        self._sampled = True


class Holder(Protocol):
    """What has clean entries. Implemented by `state.ShardState`.

    Attributes:
        clean_bytes: what its clean entries take, as of its last barrier.
        checked_bytes: that number when the bound was last checked. Only for `StateMemory`; 0 at first.
    """

    clean_bytes: int
    checked_bytes: int

    def evict_bytes(self, size_bytes: int, /) -> None:
        """Drop clean entries of about this size, those first that were unused for the longest time."""
        ...


class StateMemory:
    """What the clean entries of all shards of a process may take together.

    Args:
        bytes_max: the bound. Growth is noticed in steps, so an eighth may come on top.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        # A list, because appending and removing are atomic, whichever thread does it.
        self._holders: list[weakref.ref[Holder]] = []

    def add(self, holder: Holder) -> None:
        """Let it have a share, for as long as it exists."""
        self._holders.append(weakref.ref(holder, self._holders.remove))

    def settle(self, holder: Holder) -> None:
        """Keep the bound, after the entries of `holder` have changed.

        First `holder` gives up what it has beyond an equal share, then the others do.
        """
        share_bytes = self._bytes_max // max(1, len(self._holders))
        grown_bytes = holder.clean_bytes - holder.checked_bytes
        if grown_bytes <= 0:
            holder.checked_bytes = holder.clean_bytes
            return
        if holder.clean_bytes <= share_bytes and grown_bytes <= share_bytes // _STEPS:
            return  # the usual case: it must cost nothing, however many shards there are
        holders = [one for ref in tuple(self._holders) if (one := ref()) is not None]
        excess_bytes = sum(one.clean_bytes for one in holders) - self._bytes_max
        for one in sorted(holders, key=lambda one: (one is not holder, -one.clean_bytes)):
            surplus_bytes = min(excess_bytes, one.clean_bytes - share_bytes)
            if surplus_bytes > 0:
                one.evict_bytes(surplus_bytes)
                one.checked_bytes = one.clean_bytes
                excess_bytes -= surplus_bytes
        holder.checked_bytes = holder.clean_bytes
