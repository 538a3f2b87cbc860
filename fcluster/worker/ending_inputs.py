"""Finds the shards that have read all their inputs to the end of a bounded run, and ends their event time.

Responsible for: deciding that an input is read to its end. The coordinator says where that is
(`InputRunner.stop_at`). Belongs to the main thread.

Invariant: event time ends after the last record of all inputs. So which records are late doesn't depend on
which input was read first. Must not read a clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from fcluster.common.ids import ShardId
from fcluster.worker.processing import ShardRunner


def end_times(runners: Iterable[ShardRunner]) -> frozenset[ShardId]:
    """End the event time of the shards that have nothing left to read.

    Returns:
        These shards: there is something to commit.
    """
    ended: set[ShardId] = set()
    for runner in runners:
        clock = runner.clock
        if clock is None or clock.ended or not clock.may_end:
            continue
        read = [one.is_read for one in runner.inputs if not runner.stage.inputs[one.number].internal]
        if read and all(read):
            clock.end()
            ended.add(runner.shard)
    return frozenset(ended)


def has_ended(runner: ShardRunner) -> bool:
    """Whether event time has ended in this shard, and everything that waited for it has fired. Don't call it
    within a record.
    """
    clock = runner.clock
    if clock is None or not clock.ended:
        return False
    return runner.timers is None or not runner.timers.event_is_due()
