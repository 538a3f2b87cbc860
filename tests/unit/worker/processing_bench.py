"""Shared by tests of processing: one shard without a shell, and the records that it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from fcluster import Job
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings
from fcluster.engine.state import ShardState, StoreMeta
from fcluster.worker.processing import OutputPort, ShardRunner
from tests.state_memory import EntriesMax


class EmptyStore:
    """An empty store. `get` replaces the method of that name."""

    def __init__(self, get: Callable[[bytes], bytes | None]) -> None:
        self._get = get

    def meta(self) -> StoreMeta:
        return StoreMeta()

    def get(self, key: bytes) -> bytes | None:
        return self._get(key)

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        return [None] * len(keys)

    def scan(self, start: bytes, stop: bytes, limit: int, *, reverse: bool) -> list[tuple[bytes, bytes]]:
        return []

    def apply(self, changes: Any, meta: StoreMeta) -> None:
        raise AssertionError("nothing is committed here")


class FakeMessage:
    """The parts of a consumed message that the runner needs."""

    def __init__(
        self,
        value: bytes | None,
        key: bytes | None = b"k",
        offset: int = 0,
        headers: Any = None,
        timestamp: int = 1234,
    ) -> None:
        self._value, self._key, self._offset, self._headers = value, key, offset, headers
        self._timestamp = timestamp

    def value(self) -> bytes | None:
        return self._value

    def key(self) -> bytes | None:
        return self._key

    def offset(self) -> int:
        return self._offset

    def topic(self) -> str:
        return "in"

    def partition(self) -> int:
        return 0

    def timestamp(self) -> tuple[int, int]:
        return (1, self._timestamp)

    def headers(self) -> Any:
        return self._headers


class Bench:
    """One shard of a job's first stage. Outputs are collected."""

    def __init__(self, job: Job, get: Callable[[bytes], bytes | None] = lambda _key: None) -> None:
        (stage, *_rest) = job.build(Settings()).stages
        self.outputs: list[tuple[Any, ...]] = []
        self.port = OutputPort()
        self.port.produce = lambda *arguments: self.outputs.append(arguments)
        self.state = ShardState(EmptyStore(get), stage.all_stores, EntriesMax(1000))
        position = CommittedPosition(0, 0, 0, "")
        self.runner = ShardRunner(stage, 0, self.state, position, self.port).inputs[0]

    def run(self, value: Any, **fields: Any) -> None:
        raw = value if isinstance(value, bytes) or value is None else orjson.dumps(value)
        self.runner.handle(FakeMessage(raw, **fields))  # type: ignore[arg-type]

    def values(self) -> list[tuple[str, Any, bytes | None]]:
        return [
            (topic, None if raw is None else orjson.loads(raw), key) for topic, raw, key, *_ in self.outputs
        ]
