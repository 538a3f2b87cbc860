"""One shard of a job with timers, without a shell. The test decides about epochs, crashes and time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from fcluster import Job
from fcluster.common.failures import Failure
from fcluster.common.settings import Settings
from fcluster.engine.clock import EventClock
from fcluster.engine.failure import OutputRefusedError
from fcluster.engine.firing import TimerRunner
from fcluster.engine.records import OutputPort
from fcluster.engine.runner import StageRunner
from fcluster.engine.state import ShardState, StoreMeta
from fcluster.testing.shards import MemoryStore
from tests.state_memory import EntriesMax
from tests.unit.worker.processing_bench import FakeMessage

Output = tuple[Any, ...]


class TimersBench:
    """A shard of the job's first stage, and what it has committed.

    Attributes:
        outputs: the outputs of committed epochs. Those of the open epoch are in `open`.
        wall_ms: processing time.
    """

    def __init__(self, job: Job, cache_entries_max: int = 0) -> None:
        (self.stage, *_rest) = job.build(Settings()).stages
        self.cache_entries_max = cache_entries_max
        self.outputs: list[Output] = []
        self.wall_ms = 0
        self.store = MemoryStore()
        self.deltas: list[dict[bytes, bytes]] = []
        self.epoch = 0
        self._committed: tuple[int, str] = (0, "")
        self.refuses: Callable[[str, bytes | None], bool] = lambda _topic, _value: False
        self.start()

    def start(self) -> None:
        """Start from what is committed."""
        self.open: list[Output] = []
        self.port = OutputPort()
        self.port.produce = self._produce
        self.offset, clock = self._committed
        self.clock = EventClock([0])
        self.clock.restore(0, clock)
        self.state = ShardState(self.store, self.stage.all_stores, EntriesMax(self.cache_entries_max))
        self.timers = TimerRunner(
            self.stage,
            0,
            self.state.tables,
            self.port,
            (),
            self.clock,
            lambda: self.wall_ms,
            lambda: self.offset,
        )
        self.runner = _Runner(self)

    def run(self, value: Any, timestamp: int, key: bytes | None = b"k") -> None:
        """Process the next record."""
        raw = value if isinstance(value, bytes) or value is None else orjson.dumps(value)
        record: Any = FakeMessage(raw, key, self.offset, timestamp=timestamp)
        self.runner.handle(record)

    def advance(self, wall_ms: int) -> int:
        """Let processing time pass."""
        self.wall_ms = wall_ms
        return self.timers.fire_due(1_000)

    def barrier(self, *, flush: bool = True) -> None:
        """Commit the open epoch."""
        self.epoch += 1
        delta = self.state.freeze(self.epoch)
        if delta is not None:
            self.deltas.append(dict(delta.changes))
            self.state.commit(self.epoch, 0, 0.0)
            if flush:
                self.state.flush()
        self.outputs += self.open
        self.open.clear()
        self._committed = (self.offset, self.clock.encode(0))

    def crash(self) -> None:
        """Let another worker take over. It gets the deltas of all epochs, and nothing else."""
        self.store = MemoryStore()
        for number, delta in enumerate(self.deltas, 1):
            self.store.apply(delta, StoreMeta(number))
        self.epoch = max(self.epoch, len(self.deltas))
        self.start()

    def values(self) -> list[Any]:
        """All values written, including those of the open epoch."""
        rows = [*self.outputs, *self.open]
        return [None if raw is None else orjson.loads(raw) for _topic, raw, *_rest in rows]

    def pending(self, handler: str = "h", key: bytes = b"k") -> dict[str, tuple[str, int]]:
        """The timers of a key that are set."""
        return dict(self.timers.handlers[handler].pending(key))

    def _produce(self, topic: str, value: bytes | None, *fields: Any) -> None:
        if self.refuses(topic, value):
            raise OutputRefusedError(Failure.of_record("it is too large"))
        self.open.append((topic, value, *fields))


class _Runner(StageRunner):
    def __init__(self, bench: TimersBench) -> None:
        super().__init__(bench.stage, 0, bench.state.tables, bench.port, (), 0, bench.clock, bench.timers)
        self._bench = bench

    def passed(self, record: Any) -> None:
        """Called when the record is processed."""
        self._bench.offset = record.offset() + 1
