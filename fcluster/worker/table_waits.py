"""Says which shards wait for global tables at a start, and how long.

Responsible for: these lines of the log, and what heartbeats say of it. `loading` decides what is waited for.
Belongs to the main thread.

Must not: read a clock.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from fcluster.common.ids import ShardId
from fcluster.worker.processing import ShardRunner

_log = logging.getLogger("fcluster.worker")

LONG_MS: Final = 15_000
AGAIN_MS: Final = 60_000
SHARDS_NAMED_MAX: Final = 5


class TableWaits:
    """The running shards whose copies of global tables aren't loaded yet."""

    def __init__(self) -> None:
        self._since_ms: dict[ShardRunner, float] = {}
        self._due_ms = 0.0

    @property
    def shards(self) -> list[ShardId]:
        """The shards that wait, as of the last `look`, in order."""
        return sorted(runner.shard for runner in self._since_ms)

    def look(self, runners: Iterable[ShardRunner], now_ms: float) -> None:
        """Log what there is to say. Don't call it within a record.

        Args:
            runners: the shards' runners.
            now_ms: the time on a clock that never goes back.
        """
        copying = [runner for runner in runners if runner.unloaded is not None]
        before = self._since_ms
        self._since_ms = {
            runner: before.get(runner, now_ms)
            for runner in copying
            if runner.unloaded is not None and runner.unloaded()
        }
        loaded = [before[runner] for runner in copying if runner in before and runner not in self._since_ms]
        if loaded:
            after_s = (now_ms - min(loaded)) / 1000
            _log.info("%d shards have read their global tables, after %.1f s", len(loaded), after_s)
        late = sorted(
            (runner for runner, since_ms in self._since_ms.items() if now_ms - since_ms >= LONG_MS),
            key=lambda runner: runner.shard,
        )
        if late and now_ms >= self._due_ms:
            self._due_ms = now_ms + AGAIN_MS
            self._warn(late, now_ms)

    def _warn(self, late: list[ShardRunner], now_ms: float) -> None:
        tables = sorted({copy.copy_of for runner in late for copy in runner.stage.copies.values()})
        named = [str(runner.shard) for runner in late[:SHARDS_NAMED_MAX]]
        if len(late) > len(named):
            named.append(f"{len(late) - len(named)} more")
        since_ms = min(self._since_ms[runner] for runner in late)
        _log.warning(
            "%s process no records for %.0f s already: they wait until all rows of the global tables %s are "
            "there that there were at the start of the job. `fcluster status` says how far the shards are "
            "that read the topics of these tables.",
            ", ".join(named),
            (now_ms - since_ms) / 1000,
            ", ".join(map(repr, tables)),
        )
