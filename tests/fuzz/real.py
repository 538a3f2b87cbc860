"""The real processing of a planned job: the engine with real state tables, in a shell like the worker's, and
in `fcluster.testing`.

Epochs of some records each are aborted and replayed, as a worker does it. A record that fails in the middle
is condemned. So is one whose failure shows only at the barrier, after a replay record by record.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from fcluster import Job, Topic
from fcluster.common.failures import Failure
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings
from fcluster.engine.failure import Condemnation, OutputRefusedError, UnkeptStateError
from fcluster.engine.state import ShardState
from fcluster.graph.operators import TopicSpec
from fcluster.testing import Driver, JobStopped
from fcluster.testing.calls import DriverCalls
from fcluster.testing.shards import MemoryStore
from fcluster.worker.core.model import Condemned
from fcluster.worker.processing import HandlerError, OutputPort, ShardRunner, UnreadableRecordError
from tests.fuzz.plans import (
    SEEING,
    SMALL_BYTES_MAX,
    Input,
    JobPlan,
    apply_filter,
    apply_flat_map,
    apply_handler,
    apply_key,
    apply_map,
    apply_peek,
    returned_by_handler,
)
from tests.state_memory import EntriesMax
from tests.unit.worker.processing_bench import FakeMessage

REPLAYS_MAX = 60
MESSAGE_BYTES_MAX = 4_700
"""Between the largest of the small outputs, with all their headers, and the smallest of the large ones."""


def build(plan: JobPlan) -> Job:
    """The planned job."""
    default: Any = (
        Topic(plan.default_rule, value="bytes")
        if (plan.default_rule or "").startswith("dead")
        else plan.default_rule
    )
    job = Job("j", on_error=default)
    topics = {name: job.topic(name, value="bytes") for name in ("dead", "dead2", "out-bytes")}
    topics["out"] = job.topic("out")
    topics["out-text"] = job.topic("out-text", value="text")
    topics["elsewhere"] = job.topic("elsewhere")

    def rule(name: str | None) -> Any:
        return topics.get(name, name) if name is not None else None

    source = job.topic("in", value=plan.value, on_error=rule(plan.topic_rule))  # type: ignore[arg-type]
    for number, chain in enumerate(plan.chains):
        stream = job.stream(source)
        for place, step in enumerate(chain.steps):
            function = _function(step.kind, step.behaviour, topics["elsewhere"])
            if step.kind == "filter":
                stream = stream.filter(function, on_error=rule(step.rule))
            elif step.kind == "map":
                stream = stream.map(function, on_error=rule(step.rule))
            elif step.kind == "map_async":
                stream = stream.map_async(function, on_error=rule(step.rule))
            elif step.kind == "flat_map":
                stream = stream.flat_map(function, on_error=rule(step.rule))
            elif step.kind == "peek":
                stream = stream.peek(function, on_error=rule(step.rule))
            else:
                stream = stream.process(function, name=f"h{number}x{place}", on_error=rule(step.rule))
        if chain.end == "key_by":
            by = _function("key_by", chain.key_behaviour, topics["elsewhere"])
            stream = stream.key_by(by, on_error=rule(chain.key_rule))
        stream.to(topics[chain.sink], on_error=rule(chain.sink_rule))
    return job


_APPLY: dict[str, Callable[..., Any]] = {
    "filter": apply_filter,
    "map": apply_map,
    "flat_map": apply_flat_map,
    "peek": apply_peek,
    "key_by": apply_key,
}


def _function(kind: str, behaviour: str, elsewhere: TopicSpec) -> Callable[..., Any]:
    if kind == "map_async":
        return _async_map(behaviour)
    if kind in _APPLY:
        apply = _APPLY[kind]
        if behaviour == SEEING:
            return lambda ctx, value: apply(behaviour, value, ctx)
        return lambda value: apply(behaviour, value)
    if behaviour == "returns":
        return lambda ctx, value: returned_by_handler(behaviour, ctx, value)

    def generator(ctx: Any, value: Any) -> Any:
        yield from apply_handler(behaviour, ctx, value, elsewhere)

    return generator


def _async_map(behaviour: str) -> Callable[..., Any]:
    async def call(context: Any, value: Any) -> Any:
        await asyncio.sleep(0)
        return apply_map(behaviour, value, context)

    return call


class Shell:
    """Runs the first stage of a job over some records."""

    def __init__(self, plan: JobPlan, records: list[Input], epoch_records: int) -> None:
        self._stage = build(plan).build(Settings()).stages[0]
        self._messages = [
            FakeMessage(record.value, record.key, offset, list(record.headers) or None, record.timestamp)
            for offset, record in enumerate(records)
        ]
        self._epoch_records = epoch_records
        self._store = MemoryStore()
        self._condemned: list[tuple[int, Condemnation]] = []
        self._open: list[tuple[Any, ...]] = []
        self.committed: list[tuple[Any, ...]] = []
        self.stopped_at: int | None = None
        self.skipped = 0
        self.counted = 0

    def _produce(self, topic: str, value: bytes | None, *rest: Any) -> None:
        if len(value or b"") > SMALL_BYTES_MAX:
            raise OutputRefusedError(Failure.of_record("too large"))
        self._open.append((topic, value, *rest))

    def _runner(self, port: OutputPort) -> ShardRunner:
        state = ShardState(self._store, self._stage.all_stores, EntriesMax(2))
        runner = ShardRunner(self._stage, 0, state, CommittedPosition(0, 0, 0, ""), port)
        for offset, condemnation in self._condemned:
            runner.condemn(Condemned(offset, condemnation))
        return runner

    def _make_calls(self, runner: ShardRunner, offsets: range) -> None:
        """Make the calls of these records, in advance."""
        one, calls = runner.inputs[0], DriverCalls(lambda: 0, ())
        for offset in offsets:
            message: Any = self._messages[offset]
            if one.calls is not None:
                assert calls.make(offset, functools.partial(one.begin_calls, message))

    def run(self) -> None:
        """Process all records, or up to the one that stops the job."""
        position, epoch, replays = 0, 1, 0
        one_by_one_until = 0
        while position < len(self._messages) and self.stopped_at is None:
            replays += 1
            assert replays < REPLAYS_MAX, "replayed without end"
            end = position + (1 if position < one_by_one_until else self._epoch_records)
            end = min(end, len(self._messages))
            port = OutputPort()
            port.produce = self._produce
            runner = self._runner(port)
            self._open.clear()
            reached, at = end, position
            self._make_calls(runner, range(position, end))
            try:
                for at in range(position, end):
                    runner.inputs[0].handle(self._messages[at])  # type: ignore[arg-type]
            except UnreadableRecordError:
                self.stopped_at = reached = at
            except HandlerError as error:
                self._condemned.append((at, error.condemnation))
                continue
            except UnkeptStateError:
                one_by_one_until = end
                continue
            unkept = runner.find_unkept()
            if unkept is not None:
                self.stopped_at = None
                if end - position == 1 and reached > position:
                    self._condemned.append((position, unkept))
                one_by_one_until = end
                continue
            delta = runner.state.freeze(epoch)
            if delta is not None:
                runner.state.commit(epoch, epoch, 0)
                runner.state.flush()
            epoch += 1
            self.committed += self._open
            self.skipped += port.skipped
            self.counted += port.records
            position = reached

    def state(self, handler: str, key: bytes) -> dict[str, Any]:
        """The committed state."""
        return ShardState(self._store, self._stage.all_stores, EntriesMax(2)).tables[handler].peek(key)


class InDriver:
    """Runs the job over some records in `fcluster.testing`.

    Args:
        plan: the plan of the job.
        records: the records of its source.
        between: what to do after each of them: "", "barrier", "crash" or "settle". If empty, every record is
            an epoch.
    """

    def __init__(self, plan: JobPlan, records: list[Input], between: list[str]) -> None:
        settings = {"kafka.message.max.bytes": MESSAGE_BYTES_MAX}
        self._driver = driver = Driver(build(plan), partitions=1, settings=settings, auto_barrier=not between)
        self.stopped_at: int | None = None
        try:
            for record, what in zip_longest(records, between[: len(records)], fillvalue=""):
                assert isinstance(record, Input)
                driver.send_raw(
                    "in",
                    record.value,
                    key=record.key,
                    timestamp=record.timestamp,
                    headers=record.headers,
                )
                if what:
                    getattr(driver, what)()
            driver.settle()
        except JobStopped as stop:
            self.stopped_at = stop.offset
        self.skipped = driver.skipped

    def outputs(self) -> dict[str, list[tuple[Any, ...]]]:
        """The committed outputs, by topic."""
        topics = (topic.name for topic in self._driver.topology.outputs)
        return {
            topic: [
                (topic, record.raw_value, record.raw_key, record.timestamp, record.headers)
                for record in self._driver.records(topic)
            ]
            for topic in topics
        }

    def state(self, handler: str, key: bytes) -> dict[str, Any]:
        """The state. The keys are odd, so they are returned as bytes."""
        (stage,) = self._driver.topology.stages
        return self._driver._shard(stage, 0).state.tables[handler].peek(key)  # pyright: ignore[reportPrivateUsage]
