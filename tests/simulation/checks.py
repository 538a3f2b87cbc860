"""The checks of a run: at each commit, each write to a store, each restore, and at the end.

Responsible for: the recount. At each commit that Kafka decides, the checks run the job's model over the
inputs between the shard's former committed offset and the new one. They compare outputs, state deltas and
metadata with those in the transaction. So a record that is lost, repeated or out of order is found at the
commit that did it, together with who did it. Who may commit is compared with what the newest leader knows.

Must not: know the internals of a worker. Raises `Violation`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from fcluster.common.ids import ShardId, transactional_ids
from fcluster.common.positions import CommittedPosition, InputOffset, decode_position
from fcluster.coordinator.core.coordinator import Coordinator
from fcluster.coordinator.core.model import HELD_PHASES, ShardPhase
from fcluster.coordinator.core.outbox import assignment_key, deaths_key, slot_key
from fcluster.coordinator.core.run_end import RUN_END_KEY, RunEnd
from fcluster.engine.changelog import DeltaReader
from fcluster.engine.clock import END_MS, decode_watermark
from fcluster.engine.interval_notes import RESULT
from fcluster.engine.state import StoreMeta
from fcluster.engine.watermarks import make_clock
from fcluster.graph.partitioner import partition_of
from fcluster.wire import messages
from tests.simulation.jobs import (
    IDLE_MS,
    LATE,
    MAX_DELAY_MS,
    SOURCE,
    Expected,
    Origin,
    Read,
    SimJob,
    Step,
    Written,
    as_json,
)
from tests.simulation.kafka_model import KafkaModel, Partition, Transaction
from tests.simulation.world import Violation, World


@dataclass(slots=True)
class _InputTime:
    """What is known of the event time of one input.

    Attributes:
        highest_ms: of a source: the highest timestamp so far.
        heard: of a repartition: the time of each shard upstream, and whether it is idle.
        idle: whether a source is idle. The wall clock decides that.
        ended: whether a source is read to the end of the run.
    """

    highest_ms: int | None = None
    heard: dict[int, tuple[int | None, bool]] = field(default_factory=dict[int, tuple[int | None, bool]])
    idle: bool = False
    ended: bool = False

    def hear(self, written: Written) -> None:
        """A watermark record was read."""
        shards, said = decode_watermark(written.value or b"")
        self.heard = dict.fromkeys(range(shards), (None, False)) | self.heard
        for one in said:
            times_ms = [at_ms for at_ms in (self.heard[one.shard][0], one.time_ms) if at_ms is not None]
            self.heard[one.shard] = max(times_ms, default=None), one.idle

    @property
    def is_idle(self) -> bool:
        """Whether it is left out."""
        return self.idle or (bool(self.heard) and all(idle for _, idle in self.heard.values()))

    @property
    def watermark_ms(self) -> int | None:
        """Its watermark. None if it isn't known yet."""
        if self.highest_ms is not None and not self.ended:
            return self.highest_ms - MAX_DELAY_MS
        if self.ended:
            return END_MS
        waited_for = [time_ms for time_ms, idle in self.heard.values() if not idle]
        known = [time_ms for time_ms, _ in self.heard.values() if time_ms is not None]
        if not waited_for:
            return max(known, default=None)
        return None if None in waited_for else min(at_ms for at_ms in waited_for if at_ms is not None)


class _Time:
    """A shard's event time, computed in the most obvious way."""

    def __init__(self, inputs: int) -> None:
        self.now_ms: int | None = None
        self.ended = False
        self.inputs = [_InputTime() for _ in range(inputs)]

    def note(self, read: Read) -> None:
        """A record was read."""
        one = self.inputs[read.number]
        if read.written.is_watermark:
            one.hear(read.written)
        else:
            one.highest_ms = max(one.highest_ms or 0, read.written.time_ms)
            one.idle = False
        self._move()

    def set_idle(self, number: int) -> None:
        """An input has become idle."""
        self.inputs[number].idle = True
        self._move()

    def end(self) -> None:
        """The sources are read to the end of the run. Those that write repartitions have all said so."""
        for one in self.inputs:
            one.ended = one.ended or not one.heard
        self._move()

    @property
    def due_ms(self) -> int | None:
        """What is set for this time or an earlier one is due."""
        return END_MS if self.ended else self.now_ms

    @property
    def is_idle(self) -> bool:
        """Whether all inputs are idle."""
        return all(one.is_idle for one in self.inputs)

    def _move(self) -> None:
        waited_for = [one.watermark_ms for one in self.inputs if not one.is_idle]
        if None in waited_for:
            return
        times_ms = waited_for or [one.watermark_ms for one in self.inputs]
        known = [at_ms for at_ms in times_ms if at_ms is not None]
        if known:
            reached_ms = min(known) if waited_for else max(known)
            self.ended = reached_ms == END_MS
            if self.ended:
                return
            self.now_ms = reached_ms if self.now_ms is None else max(self.now_ms, reached_ms)


@dataclass(slots=True)
class _Standing:
    """The position and state of a shard, according to all commits so far."""

    position: CommittedPosition
    state: Any
    encoded: dict[bytes, bytes]
    time: _Time


class Checks:
    """The recount of one run.

    Args:
        job: with a model of each stage. Without models, outputs and states are not compared with anything.
        harm_only: look only at what a user would see, not at rules whose breach may do no harm yet.
    """

    def __init__(self, world: World, partitions: int, job: SimJob, *, harm_only: bool = False) -> None:
        self.world = world
        self.job = job
        self.inputs = job.inputs
        self.harm_only = harm_only
        self.partitions = partitions
        self.run_end: RunEnd | None = None
        self.kafka: KafkaModel
        self.commits = 0
        self.leader: Coordinator | None = None
        self.starts: set[int] = set()
        """The starts of the job for which shards have run."""
        """The core with the highest term so far, even if it isn't alive any more."""
        self.declared: set[tuple[int, int]] = set()
        """(session, epoch) of every `Complete` that a coordinator has sent."""
        self.prepared: set[tuple[int, int]] = set()
        """(session, epoch) of every epoch that a worker has flushed."""
        self.barrier_terms: dict[int, int] = {}
        """By epoch: the term in which it was begun."""
        self.steps: dict[tuple[int, int, ShardId], list[Step]] = {}
        """By session, epoch and shard: what shards with several inputs report. See `Step`."""
        self._steps: dict[ShardId, list[Step]] = defaultdict(list)
        """The same of all committed epochs, by shard."""
        self._standings: dict[ShardId, _Standing] = {}
        self._encoded_at: dict[ShardId, dict[int, dict[bytes, bytes]]] = defaultdict(lambda: {0: {}})

    # --- what coordinators say ------------------------------------------------------------------------

    def barrier_sent(self, term: int, session: int, epoch: int) -> None:
        """A number is given to one epoch only, whoever is the leader."""
        if self.barrier_terms.setdefault(epoch, term) != term and not self.harm_only:
            self.fail(f"epoch {epoch} was begun in term {self.barrier_terms[epoch]} and again in term {term}")

    def complete_sent(self, session: int, epoch: int) -> None:
        """An epoch is declared only to those that have flushed it."""
        self.declared.add((session, epoch))

    def journal_first(
        self, journal: Mapping[str, Any], coordinator: Coordinator, message: messages.FromCoordinator
    ) -> None:
        """What a leader says about sessions and shards is in the journal before it says it."""
        if self.harm_only:
            return
        if isinstance(message, messages.Welcome) and not message.adopted:
            if journal.get(slot_key(message.slot), {}).get("session") != message.session:
                self.fail(f"session {message.session} is welcomed before the journal holds it")
        elif isinstance(message, messages.Assign):
            session = coordinator.sessions.get(message.session)
            if session is None:
                return  # it has ended in the same event
            slot = session.slot
            for shard in message.shards:
                if journal.get(assignment_key(shard), {}).get("slot") != slot:
                    self.fail(f"{shard} is assigned to slot {slot} before the journal holds it")
            ends = journal.get(RUN_END_KEY, {}).get("offsets", {})
            for end in message.ends:
                topic = self.inputs[end.shard.stage][end.input]
                if ends.get(topic, {}).get(str(end.shard.partition), 0) != end.offset:
                    self.fail(f"{end} is told, but the journal holds {ends.get(topic)}")
            for suspect in message.suspects:
                if deaths_key(suspect.shard) not in journal:
                    self.fail(f"{suspect.shard} is said to end workers before the journal holds it")

    # --- at each commit -------------------------------------------------------------------------------

    def on_commit(self, transaction: Transaction) -> None:
        """Compare a transaction that is being committed with a recount of its inputs."""
        if not transaction.producer.session:
            return  # not of a worker
        self.commits += 1
        outputs: dict[ShardId, list[tuple[Partition, Written]]] = defaultdict(list)
        deltas: dict[ShardId, list[tuple[int, bytes]]] = defaultdict(list)
        told: list[Written] = []
        marked: list[ShardId] = []
        for partition, offset, value in transaction.records:
            stage = self.job.changelogs.get(partition[0])
            if stage is None and value.is_watermark:
                told.append(value)
            elif stage is None and value.is_mark:
                (writer,) = self.job.topology.feeders(partition[0])
                marked.append(ShardId(writer.name, int(value.headers[0][1].partition(b"/")[0])))
            elif stage is None:
                outputs[value.origin.shard].append((partition, value))
            else:
                deltas[ShardId(stage, partition[1])].append((offset, value))
        committed: dict[ShardId, dict[str, CommittedPosition]] = defaultdict(dict)
        for (topic, number), (offset, metadata, _) in transaction.offsets.items():
            committed[ShardId(self.job.stages_reading[topic], number)][topic] = decode_position(
                offset, metadata
            )
        for shard, positions in committed.items():
            position = self._joined(transaction, shard, positions)
            self._check_right(transaction, shard, position)
            self._check_shard(transaction, shard, position, outputs.get(shard, []), deltas.get(shard, []))
        if self.job.models and not self.harm_only:
            self._check_told(transaction, told, set(committed))
        for shard in [*outputs, *deltas, *marked]:
            if shard not in committed:
                self.fail(f"{transaction.producer} commits outputs or state of {shard} without its offset")

    def _joined(
        self, transaction: Transaction, shard: ShardId, positions: Mapping[str, CommittedPosition]
    ) -> CommittedPosition:
        """The shard's position after the transaction. In an input that it leaves out, the former one."""
        before = self._standing(shard).position
        offsets: list[InputOffset] = []
        for topic, former in zip(self.inputs[shard.stage], before.inputs, strict=True):
            if topic not in positions and not self.harm_only:
                self.fail(f"{transaction.producer} commits {shard} without the offset of {topic}")
            at = positions.get(topic)
            offsets.append(former if at is None else InputOffset(at.offset, at.topic_id, at.clock))
        epochs = {(position.epoch, position.state_epoch) for position in positions.values()}
        if len(epochs) > 1:
            self.fail(f"{transaction.producer} commits {shard} at several epochs: {epochs}")
        return next(iter(positions.values())).at(offsets)

    def _check_right(self, transaction: Transaction, shard: ShardId, position: CommittedPosition) -> None:
        """Whether this session may commit this epoch of this shard."""
        if self.harm_only:
            return
        session, who = transaction.producer.session, transaction.producer
        if (session, position.epoch) not in self.declared:
            self.fail(
                f"{who} commits epoch {position.epoch} of {shard}, which was never declared complete to it"
            )
        if (session, position.epoch) not in self.prepared:
            self.fail(f"{who} commits epoch {position.epoch} of {shard}, which it never said to be prepared")
        leader = self.leader
        if leader is None:
            return
        known = leader.shards[shard]
        if known.phase in HELD_PHASES and known.session != session:
            self.fail(f"{who} of session {session} commits {shard}, which session {known.session} owns")
        if known.phase in (ShardPhase.FREE, ShardPhase.ASSIGNING):
            self.fail(f"{who} of session {session} commits {shard}, which was given back")
        for slot in leader.slots.values():
            if who.transactional_id in transactional_ids(self.job.topology.job, slot.number):
                if slot.session is None and slot.fenced:
                    self.fail(
                        f"{who} of session {session} commits {shard} after slot {slot.number} was fenced"
                    )
                if slot.session is not None and slot.session.number != session:
                    self.fail(f"{who} of session {session} commits, but {slot.session.number} has its slot")

    def _check_shard(
        self,
        transaction: Transaction,
        shard: ShardId,
        position: CommittedPosition,
        outputs: list[tuple[Partition, Written]],
        deltas: list[tuple[int, bytes]],
    ) -> None:
        standing = self._standing(shard)
        before = standing.position
        who = f"{transaction.producer} in epoch {position.epoch} of {shard}"
        if position.epoch <= before.epoch:
            self.fail(f"{who}: follows epoch {before.epoch}")
        reads: list[Read] = []
        for number, topic in enumerate(self.inputs[shard.stage]):
            begin, end = before.inputs[number].offset, position.inputs[number].offset
            limit = self._limit((topic, shard.partition))
            if end > limit:
                self.fail(f"{who}: reads to offset {end} of {topic}, but the run ends at {limit}")
            reads += self._reads(who, number, (topic, shard.partition), begin, end)
        steps: list[Read | Step] = [*reads]
        if len(self.inputs[shard.stage]) > 1 and self.job.models:
            if self._is_timed(shard.stage):
                reported = self.steps.pop((transaction.producer.session, position.epoch, shard), [])
                steps = self._as_reported(who, reads, reported)
                self._steps[shard] += reported
            else:
                steps = [*self._in_order(who, reads, outputs)]
        if self.job.models:
            made = [written for _, written in outputs]
            clock = make_clock(self.job.topology.stage(shard.stage), position)
            ended = clock is not None and clock.ended
            if ended and not standing.time.ended and not self._may_end(shard, position):
                self.fail(f"{who}: event time ends before all inputs are read")
            expected = self._replay(shard, standing, steps, made, at_end=False, ended=ended)
            if _plain(outputs) != expected:
                self.fail(
                    f"{who}: from offset {_offsets(before)} to {_offsets(position)} the outputs should be "
                    f"{_shown(expected)}, but are {_shown(_plain(outputs))}"
                )
            if not self.harm_only:
                self._check_time(who, shard, standing, position)
        encoded = self._check_delta(who, shard, standing, position, deltas)
        self._standings[shard] = _Standing(position, standing.state, encoded, standing.time)
        self._encoded_at[shard][position.state_epoch] = encoded

    def _replay(
        self,
        shard: ShardId,
        standing: _Standing,
        steps: Sequence[Read | Step],
        made: list[Written],
        *,
        at_end: bool,
        ended: bool = False,
    ) -> list[_Output]:
        """The outputs that these records must lead to, and the timers and windows between them.

        Timers in event time that are due fire before the next record. The epoch may end between the last
        record and them, unless this is the end of the run. Timers in processing time fire anywhere after
        their time, and in a stage without timers, windows close anywhere after theirs. The outputs tell
        before which record.

        Args:
            steps: the records, in order, and inputs that become idle.
            made: the outputs that there are.
            at_end: whether this is the end of the run.
            ended: whether event time ends behind these records.
        """
        model, expected = self.job.models[shard.stage], list[_Output]()
        for step in steps:
            expected += self._fired(shard, standing, made[len(expected) :], before=step)
            if isinstance(step, Step):
                standing.time.set_idle(step.number)
                continue
            if not step.written.is_watermark:
                for output in model.process(standing.state, step, standing.time.now_ms):
                    if output.topic == LATE and not model.may_be_late:
                        self.fail(f"{shard}: {output.key}={output.data} is too late for its window")
                    self.world.landed["late record"] += output.topic == LATE
                    expected.append(self._placed(output, step.written.time_ms))
            if step.written.is_watermark or step.topic() in self.job.sources:
                standing.time.note(step)
        if ended and not standing.time.ended:
            standing.time.end()
        behind = "the end" if at_end else None
        return expected + self._fired(shard, standing, made[len(expected) :], before=behind)

    def _fired(
        self, shard: ShardId, standing: _Standing, made: list[Written], before: Read | Step | str | None
    ) -> list[_Output]:
        """The outputs of the timers that fire now, and of the windows that close.

        Args:
            made: the next outputs that there are.
            before: the next record, or what else comes next. None: nothing else is in this epoch, so only as
                many of those that are due in event time need to fire as have.
        """
        model, time_ms = self.job.models[shard.stage], standing.time.due_ms
        fired: list[_Output] = []
        if not model.has_timers:
            return fired
        while True:
            told = made[len(fired)] if len(fired) < len(made) else None
            is_next = told is not None and told.origin is not None and _is_before(told.origin, before)
            in_event_time = model.timers(standing.state, "event")[:1]
            due = [timer for timer in in_event_time if time_ms is not None and timer.at_ms <= time_ms]
            if due and before is None and told is None:
                self.world.landed["timers left to the next epoch"] += 1
                return fired
            if due and isinstance(before, Step) and not is_next:
                return fired  # an input that becomes idle doesn't wait for timers, as a record does
            if due and model.may_wait and before != "the end" and not is_next:
                self.world.landed["window closed later"] += 1
                return fired
            if not due and is_next:
                assert told is not None
                assert told.origin is not None
                due = [
                    timer
                    for timer in model.timers(standing.state, "processing")
                    if (timer.key, timer.name) == (told.name, told.data.get("timer"))
                    and timer.at_ms <= told.origin.wall_ms
                ]
                self.world.landed["timer fired by the wall clock"] += len(due)
            if not due:
                return fired
            self.world.landed["window closed"] += not due[0].name
            self.world.landed["result at an interval"] += due[0].name == RESULT
            if standing.time.ended:
                standing.time.now_ms = max(standing.time.now_ms or 0, due[0].at_ms)
            outputs = model.fire(standing.state, due[0], time_ms)
            self.world.landed["record in no window"] += outputs[0].topic == LATE
            fired += [self._placed(output, due[0].at_ms) for output in outputs]

    def _placed(self, output: Expected, timestamp_ms: int) -> _Output:
        # See `Cluster.place` for those without a key.
        decides = output.key.encode() or as_json(output.data)
        place = output.topic, partition_of(decides, self.partitions)
        at_ms = timestamp_ms if output.timestamp_ms is None else output.timestamp_ms
        return place, output.key, at_ms, output.data

    def _is_timed(self, stage: str) -> bool:
        return self.job.topology.stage(stage).keeps_time

    def _check_time(self, who: str, shard: ShardId, standing: _Standing, position: CommittedPosition) -> None:
        """Event time follows from the records, whoever has read them, and never goes back."""
        clock = make_clock(self.job.topology.stage(shard.stage), position)
        if clock is None:
            return
        time = standing.time
        if clock.ended != time.ended:
            self.fail(f"{who}: event time has ended: {clock.ended}, but by the records it is {time.ended}")
        if time.ended and not self.job.models[shard.stage].shows_closing:
            time.now_ms = max(time.now_ms or -1, clock.now_ms or -1)
        if clock.now_ms != time.now_ms and (clock.now_ms, time.now_ms) != (None, -1):
            self.fail(f"{who}: event time is {clock.now_ms}, but the records tell {time.now_ms}")
        for number, (one, its) in enumerate(zip(clock.look(), time.inputs, strict=True)):
            if one.idle and not its.heard:
                self._check_idle(who, shard, number, position)
                self.world.landed["input idle"] += 1
            if len(time.inputs) == 1 and not its.heard:
                its.idle = one.idle  # of a single input, nothing depends on when it became idle
            elif one.idle != its.is_idle:
                self.fail(f"{who}: input {number} is committed as idle: {one.idle}, but it is {its.is_idle}")

    def _check_idle(self, who: str, shard: ShardId, number: int, position: CommittedPosition) -> None:
        """An input isn't idle before it has had no record for so long."""
        topic = self.inputs[shard.stage][number]
        if topic not in self.job.sources:
            self.fail(f"{who}: is idle, but nothing was heard of the shards upstream")
        for read in self._reads(who, number, (topic, shard.partition), 0, position.of_input(number).offset):
            quiet_ms = self.world.now_ms - read.written.put_at_ms
            if quiet_ms < IDLE_MS:
                self.fail(f"{who}: is idle, but {read.written} came {quiet_ms} ms ago")

    def _check_told(self, transaction: Transaction, told: list[Written], committed: set[ShardId]) -> None:
        """What is reported of a shard is the event time that the same transaction commits."""
        for written in told:
            _, said = decode_watermark(written.value or b"")
            for one in said:
                shard = ShardId(SOURCE, one.shard)
                if shard not in committed:
                    self.fail(f"{transaction.producer} tells of {shard}, which isn't in its epoch")
                standing = self._standing(shard)
                time = standing.time
                reported_ms = time.now_ms
                if self.job.models:
                    model = self.job.models[SOURCE]
                    reported_ms = model.reported_ms(standing.state, time.now_ms)
                    if time.ended and model.first_ms(standing.state) is None:
                        reported_ms = END_MS
                if reported_ms != one.time_ms:
                    self.fail(f"{shard} is said to be at {one.time_ms}, but is at {reported_ms}")
                if time.is_idle != one.idle:
                    self.fail(f"{shard} is said to be idle: {one.idle}, but is committed as {time.is_idle}")

    def _reads(self, who: str, number: int, source: Partition, begin: int, end: int) -> list[Read]:
        """The records of an input between two offsets."""
        if end < begin:
            self.fail(f"{who}: the offset goes back from {begin} to {end}")
        records, reached = self.kafka.read_committed(source, begin, end - begin)
        if reached < end:
            self.fail(f"{who}: offset {end} is beyond what is readable")
        return [Read(number, source, offset, record) for offset, record in records if offset < end]

    def _in_order(self, who: str, reads: list[Read], outputs: list[tuple[Partition, Written]]) -> list[Read]:
        """The records in the order in which they were processed. The outputs tell it: each record has one."""
        reads = [read for read in reads if not read.written.is_watermark]
        by_place = {(read.number, read.offset()): read for read in reads}
        origins = [written.origin for _, written in outputs if written.origin is not None]
        told = list(dict.fromkeys((origin.number, origin.offset) for origin in origins))
        if sorted(told) != sorted(by_place):
            return sorted(reads, key=lambda read: (read.timestamp(), read.number))  # the outputs are wrong
        for number in {number for number, _ in told}:
            offsets = [offset for one, offset in told if one == number]
            if offsets != sorted(offsets):
                self.fail(f"{who}: input {number} is processed in the order {offsets}")
        return [by_place[place] for place in told]

    def _as_reported(self, who: str, reads: list[Read], reported: list[Step]) -> list[Read | Step]:
        """The records in the order that the worker reports, and the inputs that became idle between them."""
        left = {(read.number, read.offset()): read for read in reads}
        steps: list[Read | Step] = []
        last_of: dict[int, int] = {}
        for step in reported:
            if step.offset is None:
                steps.append(step)
                continue
            read = left.pop((step.number, step.offset), None)
            if read is None or step.offset < last_of.get(step.number, -1):
                self.fail(f"{who}: input {step.number} is processed at offset {step.offset}, out of order")
            last_of[step.number] = step.offset
            read.made = step.made
            steps.append(read)
        if left:
            self.fail(f"{who}: records that weren't processed are committed: {sorted(left)}")
        return steps

    def _check_delta(
        self,
        who: str,
        shard: ShardId,
        standing: _Standing,
        position: CommittedPosition,
        deltas: list[tuple[int, bytes]],
    ) -> dict[bytes, bytes]:
        before = standing.position
        reader = DeltaReader(f"changelog of {shard}", before.state_epoch)
        encoded = dict(standing.encoded)
        for offset, record in deltas:
            delta = reader.feed(offset, record)
            if delta is not None:
                encoded.update(delta.changes)
        reader.finish()
        encoded = {key: value for key, value in encoded.items() if value}
        if reader.state_epoch != position.state_epoch:
            self.fail(
                f"{who}: state epoch {position.state_epoch}, but the deltas lead to {reader.state_epoch}"
            )
        if self.job.models:
            stored = self.job.stored(shard.stage, encoded)
            wanted, found = self.job.models[shard.stage].content(standing.state, stored, standing.time.due_ms)
            if wanted != found and not self.harm_only:
                self.fail(f"{who}: the deltas make {found}, a recount makes {wanted}")
        return encoded

    def _decoded(self, shard: ShardId, encoded: Mapping[bytes, bytes]) -> dict[str, Any]:
        return self.job.stored(shard.stage, encoded)

    # --- state ----------------------------------------------------------------------------------------

    def on_apply(self, shard: ShardId, data: Mapping[bytes, bytes], meta: StoreMeta) -> None:
        """A local store holds committed state only, and exactly that of the epoch it claims."""
        known = self._encoded_at[shard].get(meta.state_epoch)
        if self.harm_only:
            return
        if known is None:
            self.fail(f"a store of {shard} holds epoch {meta.state_epoch}, which isn't committed")
        if known != data:
            self.fail(
                f"a store of {shard} at epoch {meta.state_epoch} holds {self._decoded(shard, data)}, "
                f"not {self._decoded(shard, known)}"
            )

    def restored(self, shard: ShardId, position: CommittedPosition, data: Mapping[bytes, bytes]) -> None:
        """A shard runs with the state of its committed epoch."""
        if self._encoded_at[shard].get(position.state_epoch) != data:
            self.fail(f"{shard} was restored at {position} with {self._decoded(shard, data)}")

    def keys(self, shard: ShardId) -> list[str]:
        """All keys that the shard ever had a dict of."""
        name = self.job.topology.stage(shard.stage).stores[0]
        return sorted(
            {
                key
                for encoded in self._encoded_at[shard].values()
                for key in self.job.stored(shard.stage, encoded)[name]
            }
        )

    def live(self, shard: ShardId, state: dict[str, dict[str, Any]]) -> None:
        """What handlers see is what is committed, when nothing is open."""
        committed = self.job.models[shard.stage].seen(self._standing(shard).state)
        if committed is not None and state != committed:
            self.fail(f"{shard} has {state} in memory, committed is {committed}")

    # --- the end --------------------------------------------------------------------------------------

    def everything_committed(self) -> bool:
        """Whether everything in the sources is committed, and nothing more happens as time passes."""
        return not any(self._left()) and not self.kafka.unfinished() and not any(self._awaited())

    def _awaited(self) -> Iterator[str]:
        """What must still happen because time passes."""
        for shard in self._shards():
            standing, stage = self._standing(shard), self.job.topology.stage(shard.stage)
            if not stage.keeps_time:
                continue
            clock = make_clock(stage, standing.position)
            assert clock is not None
            now_ms = -1 if clock.due_ms is None else clock.due_ms
            idle = clock.is_idle if self.harm_only else standing.time.is_idle
            for of, at_ms, key, name in self.job.timers_set(shard.stage, standing.encoded):
                # In a job that is given, some may be due much later.
                if at_ms <= now_ms if of == "event" else self.job.models or self.job.awaits_timers:
                    yield f"in {shard}, {name} of {key} is due in {of} time, but hasn't fired"
            if self.job.has_idle_inputs and self.job.models and not idle:
                yield f"{shard} doesn't know that its inputs are idle"

    def _shards(self) -> list[ShardId]:
        return [ShardId(stage, number) for stage in self.inputs for number in range(self.partitions)]

    def _left(self) -> Iterator[tuple[ShardId, Partition, int]]:
        """The partitions with records that aren't processed: shard, partition, and the committed offset."""
        for shard in self._shards():
            topics = self.inputs[shard.stage]
            for topic, at in zip(topics, self._standing(shard).position.inputs, strict=True):
                if self._unprocessed((topic, shard.partition), at.offset):
                    yield shard, (topic, shard.partition), at.offset

    def _limit(self, partition: Partition) -> float:
        """Where the run ends in this partition."""
        offsets = None if self.run_end is None else self.run_end.offsets.get(partition[0])
        return inf if offsets is None else offsets.get(partition[1], 0)

    def _may_end(self, shard: ShardId, position: CommittedPosition) -> bool:
        """Whether the shard has nothing left to read in its sources."""
        return not any(
            offset < self._limit((topic, shard.partition))
            for topic, at in zip(self.inputs[shard.stage], position.inputs, strict=True)
            if topic in self.job.sources
            for offset, _ in self.kafka.read_committed((topic, shard.partition), at.offset, 1)[0]
        )

    def run_is_over(self) -> list[str]:
        """What is missing although the run has come to its end."""
        missing = [
            f"{shard} is committed up to {at} of {topic}"
            for shard, (topic, number), at in self._left()
            for offset, _ in self._all_of((topic, number))
            if offset >= at
        ]
        missing += [
            f"event time of {shard} has not ended"
            for shard in self._shards()
            if self._is_timed(shard.stage) and not self._has_ended(shard)
        ]
        return missing + list(self._awaited())

    def _has_ended(self, shard: ShardId) -> bool:
        """Whether event time has ended."""
        standing = self._standing(shard)
        if self.job.models:
            return standing.time.ended
        clock = make_clock(self.job.topology.stage(shard.stage), standing.position)
        return clock is not None and clock.ended

    def behind(self) -> list[str]:
        """What isn't committed, for the report."""
        lines = [
            f"{shard} is committed up to {at} of {self.kafka.end_offset(source)} in {source[0]}"
            for shard, source, at in self._left()
        ]
        lines += [f"{transaction.producer} has a transaction open" for transaction in self.kafka.unfinished()]
        lines += self._awaited()
        return lines

    def _unprocessed(self, partition: Partition, offset: int) -> bool:
        end = self.kafka.end_offset(partition)
        if self.kafka.last_stable_offset(partition) < end:
            return True
        return bool(self.kafka.read_committed(partition, offset, 1)[0])

    def final(self) -> None:
        """A recount that knows nothing of commits: of what a read_committed reader finds from the start."""
        for stage, model in self.job.models.items():
            if model.has_timers:
                self._recount_with_timers(stage)
                continue
            expected, found = self._recount(stage), self._outputs_of(stage)
            for at in sorted(expected | found):
                wanted, there = expected[at], found[at]
                if len(self.inputs[stage]) > 1:  # the inputs don't tell in which order they were read
                    wanted, there = _unordered(wanted), _unordered(there)
                if wanted != there:
                    self.fail(f"outputs of {stage}, {at[0]}, key {at[1]}: {there}, a recount gives {wanted}")
        if self.job.models and not self.job.has_results:
            self._check_repartition()
        if self.job.judge is not None and (finding := self.job.judge(self._parts_of(SOURCE), self.outputs())):
            self.fail(finding)
        for (topic, number), (offset, metadata, _) in self.kafka.offsets.items():
            shard = ShardId(self.job.stages_reading[topic], number)
            which = self.inputs[shard.stage].index(topic)
            if self._standing(shard).position.of_input(which) != decode_position(offset, metadata):
                self.fail(f"{shard} was committed to {self._standing(shard).position}, Kafka says {offset}")

    def miscounted(self) -> str:
        """How the dead letters that the leader knows of differ from those that there are. Empty: they don't.
        If the job was started again in between, only the newer ones count.
        """
        assert self.leader is not None
        counted, written = +self.leader.letters.totals, Counter[str]()
        for stage in self.job.topology.stages:
            for topic in stage.dead_letter_names:
                parts = [self._all_of((topic, number)) for number in range(self.partitions)]
                written[topic] = sum(sum(1 for _ in part) for part in parts)
        if len(self.starts) > 1:
            wrong = any(count > written[topic] for topic, count in counted.items())
        else:
            wrong = counted != +written
        return f"dead letters: {dict(counted)} are counted, and there are {dict(written)}" if wrong else ""

    def outputs(self) -> dict[str, list[list[Written]]]:
        """What a read_committed reader finds in each topic that the job writes, by partition."""
        return {topic: self._parts_of(topic) for topic in self.job.outputs}

    def _parts_of(self, topic: str) -> list[list[Written]]:
        return [[record for _, record in self._all_of((topic, number))] for number in range(self.partitions)]

    def _recount(self, stage: str) -> dict[_Flow, list[Any]]:
        """The outputs that a stage must have, if its inputs are read one after the other."""
        expected: dict[_Flow, list[Any]] = defaultdict(list)
        model = self.job.models[stage]
        for number in range(self.partitions):
            state = model.begin()
            for which, topic in enumerate(self.inputs[stage]):
                source = (topic, number)
                for offset, record in self._all_of(source):
                    for output in model.process(state, Read(which, source, offset, record), None):
                        expected[_flow(output.topic, output.key, output.data)].append(output.data)
        return expected

    def _recount_with_timers(self, stage: str) -> None:
        """From the first record on, with the outputs of each shard in the order in which they were made."""
        topics = dict.fromkeys([*self.job.outputs, *self.job.repartitions])
        for number in range(self.partitions):
            shard = ShardId(stage, number)
            begun = _Standing(_START, self._begin(stage), {}, _Time(len(self.inputs[stage])))
            outputs = [
                ((topic, at), written)
                for topic in topics
                for at in range(self.partitions)
                for _, written in self._all_of((topic, at))
                if written.origin.shard == shard
            ]
            outputs.sort(key=lambda output: output[1].origin.made if output[1].origin else 0)
            reads = [
                Read(which, (source, number), offset, record)
                for which, source in enumerate(self.inputs[stage])
                for offset, record in self.kafka.read_committed((source, number), 0, 1_000_000)[0]
                if offset < self._limit((source, number))
            ]
            steps: list[Read | Step] = [*reads]
            if len(self.inputs[stage]) > 1:
                steps = self._as_reported(f"the recount of {shard}", reads, self._steps[shard])
            made = [written for _, written in outputs]
            bounded = self.run_end is not None and self._is_timed(stage)
            expected = self._replay(shard, begun, steps, made, at_end=True, ended=bounded)
            if _plain(outputs) != expected:
                self.fail(
                    f"outputs of {shard}: {_shown(_plain(outputs))}, a recount gives {_shown(expected)}"
                )

    def _outputs_of(self, stage: str) -> dict[_Flow, list[Any]]:
        """The outputs of a stage."""
        found: dict[_Flow, list[Any]] = defaultdict(list)
        for topic in self.job.outputs:
            for number in range(self.partitions):
                for _, record in self._all_of((topic, number)):
                    if record.origin is not None and record.origin.shard.stage == stage:
                        found[_flow(topic, record.name, record.data)].append(record.data)
        return found

    def _check_repartition(self) -> None:
        """Each record of the source has crossed each repartition once."""
        source = self._idents(SOURCE)
        for topic in self.job.repartitions:
            if self._idents(topic) != source:
                self.fail(f"the repartition holds {self._idents(topic)}, the source {source}")

    def _idents(self, topic: str) -> list[int]:
        return sorted(
            record.data["ident"]
            for number in range(self.partitions)
            for _, record in self._all_of((topic, number))
        )

    def _all_of(self, partition: Partition) -> list[tuple[int, Written]]:
        records = self.kafka.read_committed(partition, 0, 1_000_000)[0]
        limit = self._limit(partition)
        return [
            (offset, record)
            for offset, record in records
            if offset < limit and not record.is_watermark and not record.is_mark
        ]

    def _standing(self, shard: ShardId) -> _Standing:
        standing = self._standings.get(shard)
        if standing is None:
            inputs = self.inputs[shard.stage]
            position = CommittedPosition(0, 0, 0, "", further=tuple(InputOffset(0) for _ in inputs[1:]))
            standing = _Standing(position, self._begin(shard.stage), {}, _Time(len(inputs)))
            self._standings[shard] = standing
        return standing

    def _begin(self, stage: str) -> Any:
        return self.job.models[stage].begin() if self.job.models else None

    def fail(self, what: str) -> Any:
        """Raise the violation."""
        self.world.note("checks", "VIOLATION: %s", what)
        raise Violation(what)


def _is_before(origin: Origin, step: Read | Step | str | None) -> bool:
    """Whether a timer or a closing window has made this output before the next step; see `Checks._fired`."""
    if step is None or isinstance(step, str):
        return origin.of_timer
    if isinstance(step, Step) or step.made >= 0:
        return origin.of_timer and origin.made < step.made
    return origin.of_timer and origin.offset <= step.offset()


_START = CommittedPosition(0, 0, 0, "")

_Output = tuple[Partition, str, int, Any]
"""Where, key, timestamp and value of an output."""


_Flow = tuple[str, str, str]
"""Topic, key, and the key before it was changed: outputs that agree in these have an order."""


def _flow(topic: str, key: str, data: Any) -> _Flow:
    return topic, key, data.get("key", "")


def _plain(outputs: list[tuple[Partition, Written]]) -> list[_Output]:
    return [(place, written.name, written.timestamp_ms, written.data) for place, written in outputs]


def _unordered(outputs: list[Any]) -> list[tuple[int, int]]:
    """The content of outputs that may come in any order: the records, and the counts on their own."""
    idents, counts = sorted(one["ident"] for one in outputs), [one["count"] for one in outputs]
    return list(zip(idents, counts, strict=True))


def _offsets(position: CommittedPosition) -> str:
    return "+".join(str(at.offset) for at in position.inputs)


def _shown(outputs: list[_Output]) -> str:
    return (
        "["
        + ", ".join(f"{place[0]}/{place[1]} {key}={_shown_value(data)}" for place, key, _, data in outputs)
        + "]"
    )


def _shown_value(data: Any) -> str:
    if not isinstance(data, dict) or "ident" not in data:
        return str(data)
    of_window = f" {data['idents']}" if "window" in data else ""
    return f"{data.get('timer', '')}{data['ident']}{of_window}"
