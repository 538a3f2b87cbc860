"""The shards that a worker reads: their runners, the readers that serve them, and which records go to which
runner.

Responsible for: knowing which records belong to which running shard. Its tables are changed together when a
shard starts or stops: runners by shard, their inputs by topic and partition, the merges of shards with
several inputs, and the records that wait for calls. Also responsible for the readers and their consumers, one
for each isolation level, and another one for merged topics. All of it belongs to the main thread.

Invariants:
- A shard's records reach its runner only if they were fetched after its reading began: they carry the
  generation of the assignment.
- Reports of readers (positions, ends) are used only for the generation in which they were read.
- In a bounded run, no record at the end of an input or behind it leaves this module. A partition ends there,
  whatever is written to it later.

Must not: process records, or know epochs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, Message

from fcluster.common.ids import ShardId
from fcluster.common.isolation import Isolation
from fcluster.common.settings import Settings
from fcluster.engine.stamps import orders_of
from fcluster.graph.operators import MapAsync
from fcluster.graph.stages import Stage
from fcluster.graph.topology import Topology
from fcluster.kafka.clients import LASTING, make_consumer
from fcluster.wire.messages import EndOffset
from fcluster.worker.calls import ShardCalls, WaitingCalls, taken_out
from fcluster.worker.consuming import Batch, ReaderEvent, ReadUpTo, SourcePartition, SourceReader
from fcluster.worker.merges import ShardMerge
from fcluster.worker.processing import InputRunner, ShardRunner

READ_AHEAD_KIB = 16 * 1024
READ_AHEAD_MERGED_KIB = 2 * 1024
"""For each merged partition: what the client has fetched ahead is discarded when its reading is paused."""
READER_CLOSE_S = 5.0
MERGED_WAIT_S_MIN = 0.001


class RunningShards:
    """See the module's docstring.

    Args:
        topology: the job's topology.
        settings: the worker's settings.
        emit: called in a reader's thread with each event.
        wake: called in another thread when calls have ended.
        say: called with a line for the log about calls.

    Attributes:
        topology: the job's topology.
        runners: by shard. A shard that is no longer read stays until its epoch is committed.
        timed: the runners that have timers, while they are read.
        inputs: the inputs of all runners.
        routes: the inputs that are read, by topic and partition. Looked up once for each record.
        group_metadata: the metadata of the job's group, once there is a reader.
        calls: the records that wait for calls, and these calls.
    """

    def __init__(
        self,
        topology: Topology,
        settings: Settings,
        emit: Callable[[ReaderEvent], None],
        wake: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.topology = topology
        self._settings = settings
        self._emit = emit
        self._readers: dict[tuple[Isolation, bool], SourceReader] = {}  # merged topics have their own
        self._merges: dict[ShardId, ShardMerge] = {}
        self._merge_at: dict[SourcePartition, ShardMerge] = {}
        self._ending: dict[SourcePartition, InputRunner] = {}  # those that are read and have an end
        self.calls = WaitingCalls(wake, say, _concurrency(topology))
        self.runners: dict[ShardId, ShardRunner] = {}
        self.timed: dict[ShardId, ShardRunner] = {}
        self.inputs: list[InputRunner] = []
        self.routes: dict[str, dict[int, InputRunner]] = _no_routes(topology)
        self.group_metadata: Any = None

    # --- readers ------------------------------------------------------------------------------------------

    @property
    def has_readers(self) -> bool:
        """Whether topics were opened, so that their names can no longer change."""
        return bool(self._readers)

    def name_topics(self, topology: Topology) -> None:
        """Use the topic names of this topology. There must be no readers yet."""
        self.topology = topology
        self.routes = _no_routes(topology)

    def open_readers(self) -> None:
        """Create the readers that the job needs. Has no effect if they exist."""
        topics: dict[tuple[Isolation, bool], list[str]] = {}
        for stage in self.topology.stages:
            for source in stage.inputs:
                key = (source.topic.isolation, len(stage.inputs) > 1)
                topics.setdefault(key, []).append(source.topic.name)
        for (isolation, merged), read in topics.items():
            if (isolation, merged) not in self._readers:
                ahead_kib = READ_AHEAD_MERGED_KIB if merged else READ_AHEAD_KIB
                make = functools.partial(self._make_consumer, isolation, ahead_kib)
                name = f"reader-{isolation}" + ("-merged" if merged else "")
                self._readers[isolation, merged] = SourceReader(make, self._emit, name, read)

    def _make_consumer(self, isolation: Isolation, ahead_kib: int, fetching: Mapping[str, int]) -> Consumer:
        consumer = make_consumer(
            self._settings,
            isolation,
            **{
                "group.id": self.topology.job,
                # librdkafka's own queue, before the batches: large enough to stay ahead, and small enough for
                # many workers. When it is full, the client looks again soon; the default is after a second.
                "queued.max.messages.kbytes": ahead_kib,
                "fetch.queue.backoff.ms": 10,
            },
            **LASTING,
            **fetching,
        )
        if self.group_metadata is None:
            self.group_metadata = consumer.consumer_group_metadata()
        return consumer

    def _reader_of(self, stage: Stage, number: int) -> SourceReader:
        return self._readers[stage.inputs[number].topic.isolation, len(stage.inputs) > 1]

    def pause(self) -> None:
        """Read nothing until `resume`."""
        for reader in self._readers.values():
            reader.pause()

    def resume(self) -> None:
        """Resume reading."""
        for reader in self._readers.values():
            reader.resume()

    def close(self) -> None:
        """Close the readers, and forget all shards."""
        for reader in self._readers.values():
            reader.close(READER_CLOSE_S)
        self.calls.close()
        self.forget()

    # --- shards -------------------------------------------------------------------------------------------

    def start(self, runner: ShardRunner) -> None:
        """Read the shard, starting at its position."""
        readers = [self._reader_of(runner.stage, one.number) for one in runner.inputs]
        merged = len(runner.inputs) > 1
        if merged:
            idle_ms, precedence = self._settings.max_task_idle_ms, runner.stage.precedence
            orders = orders_of(runner.stage)
            merge = ShardMerge(runner.inputs, readers, idle_ms, precedence, orders, runner.unloaded)
            self._merges[runner.shard] = merge
            self._merge_at |= {(one.topic, one.partition): merge for one in runner.inputs}
        self.calls.start(runner, None if merged else readers[0])
        for one, reader in zip(runner.inputs, readers, strict=True):
            one.generation = reader.start({(one.topic, one.partition): one.begun_at}, watched=merged)
            self.routes[one.topic][one.partition] = one
            if one.stop_at is not None:
                self._ending[one.topic, one.partition] = one
        self.runners[runner.shard] = runner
        if runner.timers is not None:
            self.timed[runner.shard] = runner
        self.inputs.extend(runner.inputs)

    def end(self, end: EndOffset) -> None:
        """A bounded run ends there in this input. Has no effect if the input isn't read."""
        topic = self.topology.stage(end.shard.stage).topics[end.input]
        one = self.routes[topic].get(end.shard.partition)
        if one is not None:
            one.stop_at = end.offset
            self._ending[one.topic, one.partition] = one

    def stop(self, shards: Sequence[ShardId]) -> None:
        """Stop reading these shards. Their runners stay, because their records may not be committed yet."""
        for shard in shards:
            self.timed.pop(shard, None)
            stage = self.topology.stage(shard.stage)
            for number, topic in enumerate(stage.topics):
                if self.routes[topic].pop(shard.partition, None) is not None:
                    self._reader_of(stage, number).stop({(topic, shard.partition)})
                    self._merge_at.pop((topic, shard.partition), None)
                    self._ending.pop((topic, shard.partition), None)
            merge = self._merges.pop(shard, None)
            if merge is not None:
                merge.close()
            if shard in self.runners:
                self.calls.stop(self.runners[shard])

    def release(self, shards: Sequence[ShardId]) -> None:
        """Drop the runners of these shards, which are stopped."""
        for shard in shards:
            self.runners.pop(shard, None)
        self.inputs = [one for runner in self.runners.values() for one in runner.inputs]

    def forget(self) -> None:
        """Drop all runners. They must be stopped."""
        self.runners.clear()
        self.timed.clear()
        self.inputs.clear()

    def set_held(self, runner: ShardRunner, held: bool) -> None:
        """Don't read this shard on, or read it on that was held. Records that were read already are still
        processed, unless the shard has several inputs: all of these wait, so that none of them gets ahead of
        the others.
        """
        merge = self._merges.get(runner.shard)
        if merge is not None:
            merge.held = held
        elif self.is_read(runner):
            (one,) = runner.inputs
            reader = self._reader_of(runner.stage, one.number)
            change = reader.hold if held else reader.release
            change((one.topic, one.partition), "ahead")

    def is_read(self, runner: ShardRunner) -> bool:
        """Whether the shard of this runner isn't stopped."""
        first = runner.inputs[0]
        return self.routes[first.topic].get(first.partition) is first

    @property
    def any_read(self) -> bool:
        """Whether there is a shard to process records for."""
        return any(self.routes.values())

    # --- what was read ------------------------------------------------------------------------------------

    def sort_out(self, batch: Batch) -> list[Message]:
        """The records of the batch that are processed as they come. Records of a shard with several inputs
        wait in its merge until their turn comes, and those of a shard that makes calls until these are done.
        """
        if self._ending:
            batch = self._up_to_ends(batch)
        rest = batch.messages
        if self._merge_at:
            rest, merged = taken_out(rest, self._merge_at)
            for (topic, partition), records in merged.items():
                runner = self._runner_of(topic, partition, batch.generation)
                if runner is not None:
                    self._merge_at[topic, partition].add(runner.number, records)
            for at, (position, end) in batch.standings.items():
                self._note_standing(at, batch.generation, position, end)
        if self.calls.at:
            rest, waiting = taken_out(rest, self.calls.at)
            for (topic, partition), records in waiting.items():
                if self._runner_of(topic, partition, batch.generation) is not None:
                    self.calls.at[topic, partition].add(records)
        return rest

    def _runner_of(self, topic: str, partition: int, generation: int) -> InputRunner | None:
        """The runner to which records belong that were read in this generation."""
        runner = self.routes[topic].get(partition)
        return runner if runner is not None and runner.generation <= generation else None

    def _up_to_ends(self, batch: Batch) -> Batch:
        """The batch without records behind the ends of their partitions. Those aren't read any further."""
        ending, kept = self._ending, list[Message]()
        behind: dict[SourcePartition, InputRunner] = {}
        for message in batch.messages:
            one = ending.get((message.topic() or "", message.partition() or 0))
            if one is not None and one.stop_at is not None and (message.offset() or 0) >= one.stop_at:
                behind[one.topic, one.partition] = one
            else:
                kept.append(message)
        for at, one in behind.items():
            if one.generation <= batch.generation:
                self._reader_of(one.stage, one.number).hold(at)
        return batch if not behind else dataclasses.replace(batch, messages=kept)

    def current(self, chunk: Sequence[Message], batch: Batch) -> list[Message]:
        """The batch without records that were fetched before their partition was rewound or released."""
        if isinstance(batch.reader, ShardMerge | ShardCalls):
            # All records belong to one shard, and to the generation in which its reading began.
            return [] if batch.generation < batch.reader.newest_generation else list(chunk)
        current: list[Message] = []
        for message in chunk:
            runner = self.routes[message.topic() or ""].get(message.partition() or 0)
            if runner is not None and runner.generation <= batch.generation:
                current.append(message)
        return current

    def note_told(self, told: ReadUpTo) -> None:
        """Note at once where partitions end, and tell merges the positions of their inputs, because no record
        may come for now.
        """
        if self._merge_at:
            for at, position in told.positions.items():
                self._note_standing(at, told.generation, position, told.ends.get(at))
        for (topic, partition), end in told.ends.items():
            runner = self.routes[topic].get(partition)
            if runner is not None:
                runner.end = _up_to(runner, end)

    def note_read(self, told: ReadUpTo) -> None:
        """Everything that was read before this report has been processed."""
        for (topic, partition), position in told.positions.items():
            runner = self.routes[topic].get(partition)
            if (topic, partition) in self._merge_at:
                continue  # its records may wait in the merge
            if runner is not None and runner.generation <= told.generation:
                waiting = self.calls.at.get((topic, partition))
                if waiting is not None:
                    waiting.note_read(_up_to(runner, position))
                    continue
                runner.read_position = max(_up_to(runner, position), runner.next_offset)

    def _note_standing(self, at: SourcePartition, generation: int, position: int, end: int | None) -> None:
        topic, partition = at
        runner, merge = self.routes[topic].get(partition), self._merge_at.get(at)
        if runner is not None and merge is not None and runner.generation <= generation:
            stop_at = runner.stop_at
            if stop_at is not None and position >= stop_at:
                position = end = stop_at  # the merge needn't wait for it any more
            elif end is not None:
                end = _up_to(runner, end)
            merge.note(runner.number, position, end)

    # --- merges -------------------------------------------------------------------------------------------

    def merged(self, now_ms: float) -> Iterator[Batch]:
        """The next records of the shards with several inputs, unless they have to wait for calls."""
        for shard, merge in self._merges.items():
            batch = merge.next_batch(now_ms)
            if batch is None:
                continue
            calls = self.calls.shards.get(shard)
            if calls is not None:
                calls.add_merged(batch)
            else:
                yield batch

    def until_merged_s(self, timeout_s: float, now_ms: float) -> float:
        """The timeout, or less if a merge has to be looked at before that without a report."""
        if not self._merges:
            return timeout_s
        due = [due_ms - now_ms for merge in self._merges.values() if (due_ms := merge.due_ms()) is not None]
        return max(MERGED_WAIT_S_MIN, min([timeout_s, *(wait_ms / 1000 for wait_ms in due)]))


def _up_to(one: InputRunner, offset: int) -> int:
    """The offset, or the end of a bounded run in that input if it comes before."""
    return offset if one.stop_at is None else min(offset, one.stop_at)


def _concurrency(topology: Topology) -> int:
    """How many calls of a step run at the same time, at most."""
    chains = [chain for stage in topology.stages for chain in stage.chains]
    nodes = [node for chain in chains for node in chain.operators if isinstance(node, MapAsync)]
    return max((node.concurrency for node in nodes), default=1)


def _no_routes(topology: Topology) -> dict[str, dict[int, InputRunner]]:
    return {source.topic.name: {} for source in topology.inputs}
