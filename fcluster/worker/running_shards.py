"""The shards that a worker reads: their runners, the readers that serve them, and the way from one to the
other.

Responsible for: which records belong to which running shard. Its tables are changed together when a shard
starts or stops: runners by shard, their inputs by topic and partition, and the merges of shards with several
inputs. Also responsible for the readers and their consumers, one for each isolation level and another one for
merged topics. All of it belongs to the main thread.

Invariants:
- A shard's records reach its runner only if they were fetched after its reading began: they carry the
  generation.
- What reading reports (positions, ends) is noted only for the generation that it was read in.

Must not: process records, or know epochs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, Message

from fcluster.common.ids import ShardId
from fcluster.common.isolation import Isolation
from fcluster.common.settings import Settings
from fcluster.graph.topology import Stage, Topology
from fcluster.kafka.clients import LASTING, make_consumer
from fcluster.worker.consuming import Batch, ReaderEvent, ReadUpTo, SourcePartition, SourceReader
from fcluster.worker.merges import ShardMerge, sorted_out
from fcluster.worker.processing import InputRunner, ShardRunner

READ_AHEAD_KIB = 16 * 1024
READ_AHEAD_MERGED_KIB = 2 * 1024
"""Of each partition that is merged: what is fetched ahead is thrown away when its reading is held."""
READER_CLOSE_S = 5.0
MERGED_WAIT_S_MIN = 0.001


class RunningShards:
    """See the module's docstring.

    Args:
        topology: of the job.
        settings: of the worker.
        emit: called in a reader's thread with what it reads.

    Attributes:
        runners: by shard. A shard that isn't read any more stays until its epoch is committed.
        timed: the runners that have timers, while they are read.
        inputs: of all runners.
        routes: the inputs that are read, by topic and partition. Looked up once for each record.
        group_metadata: of the job's group, once there is a reader.
    """

    def __init__(self, topology: Topology, settings: Settings, emit: Callable[[ReaderEvent], None]) -> None:
        self._topology = topology
        self._settings = settings
        self._emit = emit
        self._readers: dict[tuple[Isolation, bool], SourceReader] = {}  # those of merged topics are apart
        self._merges: dict[ShardId, ShardMerge] = {}
        self._merge_at: dict[SourcePartition, ShardMerge] = {}
        self.runners: dict[ShardId, ShardRunner] = {}
        self.timed: dict[ShardId, ShardRunner] = {}
        self.inputs: list[InputRunner] = []
        self.routes: dict[str, dict[int, InputRunner]] = _no_routes(topology)
        self.group_metadata: Any = None

    # --- readers ------------------------------------------------------------------------------------------

    @property
    def has_readers(self) -> bool:
        """Whether topics were opened, so that their names can't change any more."""
        return bool(self._readers)

    def name_topics(self, topology: Topology) -> None:
        """Use the topic names of this topology. There must be no readers yet."""
        self._topology = topology
        self.routes = _no_routes(topology)

    def open_readers(self) -> None:
        """Make the readers that the job needs. Has no effect if there are some."""
        topics: dict[tuple[Isolation, bool], list[str]] = {}
        for stage in self._topology.stages:
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
                "group.id": self._topology.job,
                # librdkafka's own queue, in front of the batches: enough to stay ahead, small enough for
                # many workers. When it is full, look again soon: the default is after a second.
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
        """Read on."""
        for reader in self._readers.values():
            reader.resume()

    def close(self) -> None:
        """Close the readers, and forget all shards."""
        for reader in self._readers.values():
            reader.close(READER_CLOSE_S)
        self.forget()

    # --- shards -------------------------------------------------------------------------------------------

    def start(self, runner: ShardRunner) -> None:
        """Read the shard from its position on."""
        readers = [self._reader_of(runner.stage, one.number) for one in runner.inputs]
        merged = len(runner.inputs) > 1
        if merged:
            merge = ShardMerge(runner.inputs, readers, self._settings.max_task_idle_ms)
            self._merges[runner.shard] = merge
            self._merge_at |= {(one.topic, one.partition): merge for one in runner.inputs}
        for one, reader in zip(runner.inputs, readers, strict=True):
            one.generation = reader.start({(one.topic, one.partition): one.begun_at}, watched=merged)
            self.routes[one.topic][one.partition] = one
        self.runners[runner.shard] = runner
        if runner.timers is not None:
            self.timed[runner.shard] = runner
        self.inputs.extend(runner.inputs)

    def stop(self, shards: Sequence[ShardId]) -> None:
        """Read these shards no more. Their runners stay, because their records may not be committed yet."""
        for shard in shards:
            self.timed.pop(shard, None)
            stage = self._topology.stage(shard.stage)
            for number, topic in enumerate(stage.topics):
                if self.routes[topic].pop(shard.partition, None) is not None:
                    self._reader_of(stage, number).stop({(topic, shard.partition)})
                    self._merge_at.pop((topic, shard.partition), None)
            merge = self._merges.pop(shard, None)
            if merge is not None:
                merge.close()

    def release(self, shards: Sequence[ShardId]) -> None:
        """Drop the runners of these shards, which are stopped."""
        for shard in shards:
            self.runners.pop(shard, None)
        self.inputs = [one for runner in self.runners.values() for one in runner.inputs]

    def forget(self) -> None:
        """Drop all runners. They are stopped."""
        self.runners.clear()
        self.timed.clear()
        self.inputs.clear()

    @property
    def any_read(self) -> bool:
        """Whether there is a shard to process records for."""
        return any(self.routes.values())

    # --- what was read ------------------------------------------------------------------------------------

    def sort_out(self, batch: Batch) -> list[Message]:
        """The records of the batch that are processed as they come. What is of a shard with several inputs
        waits in its merge until its turn comes.
        """
        if not self._merge_at:
            return batch.messages
        rest, merged = sorted_out(batch, self._merge_at)
        for (topic, partition), records in merged.items():
            runner = self.routes[topic].get(partition)
            if runner is not None and runner.generation <= batch.generation:
                self._merge_at[topic, partition].add(runner.number, records)
        for at, (position, end) in batch.standings.items():
            self._note_standing(at, batch.generation, position, end)
        return rest

    def current(self, chunk: Sequence[Message], batch: Batch) -> list[Message]:
        """Without the records that were fetched before their partition was rewound or released."""
        if isinstance(batch.reader, ShardMerge):
            # All records are of one shard, and of the generation in which its reading began.
            return [] if batch.generation < batch.reader.newest_generation else list(chunk)
        current: list[Message] = []
        for message in chunk:
            runner = self.routes[message.topic() or ""].get(message.partition() or 0)
            if runner is not None and runner.generation <= batch.generation:
                current.append(message)
        return current

    def note_told(self, told: ReadUpTo) -> None:
        """Note at once where partitions end, and tell merges where their inputs stand: what they wait for may
        not come for now.
        """
        if self._merge_at:
            for at, position in told.positions.items():
                self._note_standing(at, told.generation, position, told.ends.get(at))
        for (topic, partition), end in told.ends.items():
            runner = self.routes[topic].get(partition)
            if runner is not None:
                runner.end = end

    def note_read(self, told: ReadUpTo) -> None:
        """Everything that was read before this report is processed."""
        for (topic, partition), position in told.positions.items():
            runner = self.routes[topic].get(partition)
            if (topic, partition) in self._merge_at:
                continue  # what was read of it may wait there
            if runner is not None and runner.generation <= told.generation:
                runner.read_position = max(position, runner.next_offset)

    def _note_standing(self, at: SourcePartition, generation: int, position: int, end: int | None) -> None:
        topic, partition = at
        runner, merge = self.routes[topic].get(partition), self._merge_at.get(at)
        if runner is not None and merge is not None and runner.generation <= generation:
            merge.note(runner.number, position, end)

    # --- merges -------------------------------------------------------------------------------------------

    def merged(self, now_ms: float) -> Iterator[Batch]:
        """What is next in the shards with several inputs."""
        for merge in self._merges.values():
            batch = merge.next_batch(now_ms)
            if batch is not None:
                yield batch

    def until_merged_s(self, timeout_s: float, now_ms: float) -> float:
        """The time-out, or less if a merge has something to take before, of which nobody tells."""
        if not self._merges:
            return timeout_s
        due = [due_ms - now_ms for merge in self._merges.values() if (due_ms := merge.due_ms()) is not None]
        return max(MERGED_WAIT_S_MIN, min([timeout_s, *(wait_ms / 1000 for wait_ms in due)]))


def _no_routes(topology: Topology) -> dict[str, dict[int, InputRunner]]:
    return {source.topic.name: {} for source in topology.inputs}
