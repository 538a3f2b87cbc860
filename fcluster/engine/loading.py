"""Copies of global tables, and when they are loaded.

A stage that joins a stream with a global table reads the table first: until it has all rows that the topic
had when the job was started, it takes no record of the stream, and no timer fires. The shards that read the
topic tell all shards of the stage when they have come so far. They do so with a mark behind the rows: so the
order of records decides, and what a shard has heard is state like its rows.

Each start of the job has a number, and a mark says for which start it is. The coordinator decides the number
once, so all owners of a shard have the same one until the next start.

Responsible for: the format of a mark, which marks are due, and what a copy has heard. Pure.

Invariant: in front of a shard's mark for a start are all rows that its partition had at that start.

A mark has neither key nor value nor timestamp. A header identifies it. Each shard writes one whenever it gets
an owner, because it remembers nothing; that changes nothing in copies that have heard it in this start.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final, cast

from fcluster.engine.context import AnyTable
from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.records import SourceRecord
from fcluster.engine.watermarks import OwnRecord
from fcluster.graph.stages import Stage

LOADED_HEADER: Final = "fcluster.loaded"
_HOW_MANY: Final = b"all"
"""The entry that says how many shards tell. Their own entries have four bytes."""


def loaded_marks(stage: Stage, partition: int, sizes: Mapping[str, int], job_start: int) -> list[OwnRecord]:
    """What a shard writes when it has read all rows that its global tables' topics had when it got its owner.

    Args:
        stage: its stage.
        partition: its number.
        sizes: how many shards each stage has.
        job_start: the number of the job's start.
    """
    headers = [(LOADED_HEADER, b"%d/%d/%d" % (partition, sizes[stage.name], job_start))]
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
        heard: the table of the shard's state with what was said: the last start for which each shard did.
        job_start: the number of the job's start.
    """

    def __init__(self, heard: AnyTable, job_start: int = 0) -> None:
        self._heard = cast("EntryTable", heard)
        self._job_start = job_start
        self._is_loaded = False

    def note(self, record: SourceRecord) -> bool:
        """Take a record without a key. Returns False if it is no mark."""
        said = _said_in(record)
        if said is None:
            return False
        shard, shards, job_start = map(int, said.split(b"/"))
        for key, value in ((shard.to_bytes(4, "big"), job_start), (_HOW_MANY, shards)):
            if self._heard.get(key) != value:
                self._heard.put(key, value)
        return True

    @property
    def is_loaded(self) -> bool:
        """Whether all have said so in this start. Don't call it within a record."""
        if not self._is_loaded:
            shards = self._heard.get(_HOW_MANY)
            self._is_loaded = shards is not ABSENT and all(
                self._heard.get(shard.to_bytes(4, "big")) == self._job_start for shard in range(shards)
            )
        return self._is_loaded


Unloaded = Callable[[], Collection[int]]
"""Returns the inputs that fill copies which aren't loaded yet. Don't call it within a record."""


def unloaded_inputs(stage: Stage, tables: Mapping[str, AnyTable], job_start: int) -> Unloaded | None:
    """A function that returns the inputs that a shard reads before the others, because they fill copies that
    aren't loaded yet. None: the stage has no copies.

    Args:
        stage: the shard's stage.
        tables: the tables of the shard's state, by the name of the store.
        job_start: the number of the job's start.
    """
    copies = [
        (number, Loading(tables[copy.loading.name], job_start)) for number, copy in stage.copies.items()
    ]
    if not copies:
        return None
    return lambda: frozenset(number for number, loading in copies if not loading.is_loaded)
