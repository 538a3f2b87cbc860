"""Copies of global tables, and when they are loaded.

A stage that joins a stream with a global table reads the table first: until it has all rows that the topic
had when the job began, it takes no record of the stream. The shards that read the topic tell all shards of
the stage when they have come so far. They do so with a mark behind the rows: so the order of records decides,
and what a shard has heard is state like its rows.

Responsible for: the format of a mark, which marks are due, and what a copy has heard. Pure.

A mark has neither key nor value nor timestamp. A header identifies it. Each shard writes one whenever it is
started, because it remembers nothing; that changes nothing in copies that have heard it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, cast

from fcluster.engine.context import AnyTable
from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.records import SourceRecord
from fcluster.engine.watermarks import OwnRecord
from fcluster.graph.stages import Stage

LOADED_HEADER: Final = "fcluster.loaded"
_HOW_MANY: Final = b"all"
"""The entry that says how many shards tell. Their own entries have four bytes."""


def loaded_marks(stage: Stage, partition: int, sizes: Mapping[str, int]) -> list[OwnRecord]:
    """What a shard writes when it has read all rows that its global tables' topics had at its start.

    Args:
        stage: its stage.
        partition: its number.
        sizes: how many shards each stage has.
    """
    headers = [(LOADED_HEADER, b"%d/%d" % (partition, sizes[stage.name]))]
    return [
        OwnRecord(topic.name, number, None, headers)
        for _input, step in stage.broadcasts
        for reader, topic in step.copies
        for number in range(sizes[reader])
    ]


def is_loaded_mark(record: SourceRecord) -> bool:
    """Whether a record of the topic of a copy is a mark, and no row."""
    return record.key() is None and _said_in(record) is not None


def _said_in(record: SourceRecord) -> bytes | None:
    headers = record.headers()
    return headers[0][1] if headers and headers[0][0] == LOADED_HEADER else None


class Loading:
    """Which shards have said that a copy of a global table has all their rows.

    Args:
        heard: the table of the shard's state with what was said.
    """

    def __init__(self, heard: AnyTable) -> None:
        self._heard = cast("EntryTable", heard)
        self._is_loaded = False

    def note(self, record: SourceRecord) -> bool:
        """Take a record without a key. Returns False if it is no mark."""
        said = _said_in(record)
        if said is None:
            return False
        shard, _, shards = said.partition(b"/")
        for key, value in ((int(shard).to_bytes(4, "big"), 1), (_HOW_MANY, int(shards))):
            if self._heard.get(key) != value:
                self._heard.put(key, value)
        return True

    @property
    def is_loaded(self) -> bool:
        """Whether all have said so. Don't call it within a record."""
        if not self._is_loaded:
            shards = self._heard.get(_HOW_MANY)
            self._is_loaded = shards is not ABSENT and all(
                self._heard.get(shard.to_bytes(4, "big")) is not ABSENT for shard in range(shards)
            )
        return self._is_loaded


def unloaded_inputs(stage: Stage, tables: Mapping[str, AnyTable]) -> Callable[[], frozenset[int]] | None:
    """A function that returns the inputs that a shard reads before the others, because they fill copies that
    aren't loaded yet. None: the stage has no copies.

    Args:
        stage: the shard's stage.
        tables: the tables of the shard's state, by the name of the store.
    """
    copies = [(number, Loading(tables[copy.loading.name])) for number, copy in stage.copies.items()]
    if not copies:
        return None
    return lambda: frozenset(number for number, loading in copies if not loading.is_loaded)
