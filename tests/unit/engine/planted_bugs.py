"""Bugs that are planted in timers and windows, to see that their tests with random plans catch them."""

from __future__ import annotations

import pytest

from fcluster.engine.entries import EntryTable
from tests.unit.engine.timers_bench import TimersBench


def scan_misses_the_open_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is due is searched only in the layers below the open one."""
    plain = EntryTable._note_group

    def note_group(table: EntryTable, key: bytes) -> None:
        if key not in table._open and table._epochs.get(key) is None and not table._below.get(key):
            return  # it is a new one
        plain(table, key)

    monkeypatch.setattr(EntryTable, "_note_group", note_group)


def removals_are_not_in_the_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has fired or closed is removed from memory, but not in the epoch's delta."""
    plain = TimersBench.barrier

    def barrier(bench: TimersBench, *, flush: bool = True) -> None:
        before = len(bench.deltas)
        plain(bench, flush=flush)
        for delta in bench.deltas[before:]:
            for key in [key for key, value in delta.items() if not value]:
                del delta[key]

    monkeypatch.setattr(TimersBench, "barrier", barrier)
