"""What must be true, looked at from outside: at each commit, each write to a store, each restore, and at the
end.

Responsible for: the recount. At each commit that Kafka decides, the checks take the inputs between the
shard's former committed offset and the new one, fold them, and compare outputs, state deltas and metadata
with what the transaction holds. So a record that is lost, repeated or out of order is found at the commit
that did it, with the name of who did it. Who may commit is compared with what the newest leader knows.

Must not: know of the insides of a worker. Raises `Violation`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition, InputOffset, decode_position
from fcluster.coordinator.core.coordinator import Coordinator
from fcluster.coordinator.core.model import HELD_PHASES, ShardPhase
from fcluster.coordinator.core.outbox import assignment_key, slot_key
from fcluster.engine.changelog import DeltaReader
from fcluster.engine.state import STORE_PREFIX_BYTES, StoreMeta
from fcluster.engine.values import decode_state
from fcluster.wire import messages
from tests.simulation.counter_job import (
    BOTH,
    CHANGELOGS,
    REPARTITION,
    REPARTITIONS,
    SINK,
    SOURCE,
    STAGE_OF_SOURCE,
    Input,
    Output,
    Read,
    count_in,
    handle,
)
from tests.simulation.kafka_model import KafkaModel, Partition, Transaction
from tests.simulation.world import Violation, World

State = dict[str, dict[str, Any]]


@dataclass(slots=True)
class _Standing:
    """Where a shard stands according to all commits so far."""

    position: CommittedPosition
    state: State
    encoded: dict[bytes, bytes]


class Checks:
    """The recount of one run.

    Args:
        inputs: the topics that each stage reads.
        harm_only: look only at what a user would see, not at rules whose breach may do no harm yet.
    """

    def __init__(
        self, world: World, partitions: int, inputs: Mapping[str, tuple[str, ...]], *, harm_only: bool = False
    ) -> None:
        self.world = world
        self.inputs = inputs
        self.merged = BOTH in inputs
        self.harm_only = harm_only
        self.partitions = partitions
        self.kafka: KafkaModel
        self.commits = 0
        self.leader: Coordinator | None = None
        """The core of the highest term so far, even if it doesn't live any more."""
        self.declared: set[tuple[int, int]] = set()
        """(session, epoch) of every `Complete` that a coordinator has sent."""
        self.prepared: set[tuple[int, int]] = set()
        """(session, epoch) of every epoch that a worker has flushed."""
        self.barrier_terms: dict[int, int] = {}
        """By epoch: the term in which it was begun."""
        self._standings: dict[ShardId, _Standing] = {}
        self._encoded_at: dict[ShardId, dict[int, dict[bytes, bytes]]] = defaultdict(lambda: {0: {}})

    # --- what coordinators say ------------------------------------------------------------------------

    def barrier_sent(self, term: int, session: int, epoch: int) -> None:
        """A number is given to one epoch only, whoever leads."""
        if self.barrier_terms.setdefault(epoch, term) != term and not self.harm_only:
            self.fail(f"epoch {epoch} was begun in term {self.barrier_terms[epoch]} and again in term {term}")

    def complete_sent(self, session: int, epoch: int) -> None:
        """An epoch is declared only to those that have flushed it."""
        self.declared.add((session, epoch))

    def journal_first(
        self, journal: Mapping[str, Any], coordinator: Coordinator, message: messages.FromCoordinator
    ) -> None:
        """What a leader says of sessions and shards stands in the journal before it is said."""
        if self.harm_only:
            return
        if isinstance(message, messages.Welcome) and not message.adopted:
            if journal.get(slot_key(message.slot), {}).get("session") != message.session:
                self.fail(f"session {message.session} is welcomed before the journal holds it")
        elif isinstance(message, messages.Assign):
            session = coordinator.sessions.get(message.session)
            if session is None:
                return  # it has ended in the same breath
            slot = session.slot
            for shard in message.shards:
                if journal.get(assignment_key(shard), {}).get("slot") != slot:
                    self.fail(f"{shard} is assigned to slot {slot} before the journal holds it")

    # --- at each commit -------------------------------------------------------------------------------

    def on_commit(self, transaction: Transaction) -> None:
        """Compare a transaction that is being committed with a recount of its inputs."""
        if not transaction.producer.session:
            return  # not of a worker
        self.commits += 1
        outputs: dict[ShardId, list[tuple[Partition, Any]]] = defaultdict(list)
        deltas: dict[ShardId, list[tuple[int, bytes]]] = defaultdict(list)
        origin: ShardId | None = None
        for partition, offset, value in transaction.records:
            topic = partition[0]
            if topic == SINK:
                origin = value.shard
                outputs[value.shard].append((partition, value))
            elif topic in REPARTITIONS:
                assert origin is not None, "a repartitioned record follows its output"
                outputs[origin].append((partition, value))
            else:
                stage = next(stage for stage, changelog in CHANGELOGS.items() if changelog == topic)
                deltas[ShardId(stage, partition[1])].append((offset, value))
        committed: dict[ShardId, dict[str, CommittedPosition]] = defaultdict(dict)
        for (topic, number), (offset, metadata, _) in transaction.offsets.items():
            committed[ShardId(STAGE_OF_SOURCE[topic], number)][topic] = decode_position(offset, metadata)
        for shard, positions in committed.items():
            position = self._joined(transaction, shard, positions)
            self._check_right(transaction, shard, position)
            self._check_shard(transaction, shard, position, outputs.get(shard, []), deltas.get(shard, []))
        for shard in [*outputs, *deltas]:
            if shard not in committed:
                self.fail(f"{transaction.producer} commits outputs or state of {shard} without its offset")

    def _joined(
        self, transaction: Transaction, shard: ShardId, positions: Mapping[str, CommittedPosition]
    ) -> CommittedPosition:
        """Where the transaction leaves the shard; in an input that it leaves out, where it stood before."""
        before = self._standing(shard).position
        offsets: list[InputOffset] = []
        for topic, stood in zip(self.inputs[shard.stage], before.inputs, strict=True):
            if topic not in positions and not self.harm_only:
                self.fail(f"{transaction.producer} commits {shard} without the offset of {topic}")
            offsets.append(InputOffset(positions[topic].offset) if topic in positions else stood)
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
            if who.transactional_id in (f"sim-slot-{slot.number}-0", f"sim-slot-{slot.number}-1"):
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
        outputs: list[tuple[Partition, Any]],
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
            reads += self._reads(who, number, (topic, shard.partition), begin, end)
        if len(self.inputs[shard.stage]) > 1:
            reads = self._in_order(who, reads, [value for (topic, _), value in outputs if topic == SINK])
        state = {key: {**value, "seen": list(value["seen"])} for key, value in standing.state.items()}
        expected: list[tuple[Partition, Any]] = []
        for read in reads:
            expected += handle(
                shard, read, state.setdefault(read.record.key, {}), self.partitions, merged=self.merged
            )
        state = {key: value for key, value in state.items() if value}
        if outputs != expected:
            self.fail(
                f"{who}: from offset {_offsets(before)} to {_offsets(position)} the outputs should be "
                f"{_shown(expected)}, but are {_shown(outputs)}"
            )
        encoded = self._check_delta(who, shard, standing, position, state, deltas)
        self._standings[shard] = _Standing(position, state, encoded)
        self._encoded_at[shard][position.state_epoch] = encoded

    def _reads(self, who: str, number: int, source: Partition, begin: int, end: int) -> list[Read]:
        """The records of an input between two offsets."""
        if end < begin:
            self.fail(f"{who}: the offset goes back from {begin} to {end}")
        records, reached = self.kafka.read_committed(source, begin, end - begin)
        if reached < end:
            self.fail(f"{who}: offset {end} is beyond what is readable")
        return [Read(number, offset, record) for offset, record in records if offset < end]

    def _in_order(self, who: str, reads: list[Read], outputs: list[Output]) -> list[Read]:
        """The order in which they were processed, which the outputs tell."""
        by_place = {(read.number, read.offset): read for read in reads}
        told = [(output.number, output.offset) for output in outputs]
        if sorted(told) != sorted(by_place):
            return sorted(reads, key=lambda read: (read.timestamp(), read.number))  # the outputs are wrong
        for number in {number for number, _ in told}:
            offsets = [offset for one, offset in told if one == number]
            if offsets != sorted(offsets):
                self.fail(f"{who}: input {number} is processed in the order {offsets}")
        return [by_place[place] for place in told]

    def _check_delta(
        self,
        who: str,
        shard: ShardId,
        standing: _Standing,
        position: CommittedPosition,
        state: State,
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
        if _decoded(encoded) != state:
            self.fail(f"{who}: the deltas make {_decoded(encoded)}, a recount makes {state}")
        return encoded

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
                f"a store of {shard} at epoch {meta.state_epoch} holds {_decoded(data)}, "
                f"not {_decoded(known)}"
            )

    def restored(self, shard: ShardId, position: CommittedPosition, data: Mapping[bytes, bytes]) -> None:
        """A shard runs with the state of its committed epoch."""
        if self._encoded_at[shard].get(position.state_epoch) != data:
            self.fail(f"{shard} was restored at {position} with {_decoded(data)}")

    def keys(self, shard: ShardId) -> list[str]:
        """All keys that the shard ever had state of."""
        return sorted({key for encoded in self._encoded_at[shard].values() for key in _decoded(encoded)})

    def live(self, shard: ShardId, state: State) -> None:
        """What handlers see is what is committed, when nothing is open."""
        if state != self._standing(shard).state:
            self.fail(f"{shard} has {state} in memory, committed is {self._standing(shard).state}")

    # --- the end --------------------------------------------------------------------------------------

    def everything_committed(self) -> bool:
        """Whether all that is in the sources is processed and committed."""
        return not any(self._left()) and not self.kafka.unfinished()

    def _left(self) -> Iterator[tuple[ShardId, Partition, int]]:
        """Where something isn't processed: shard, partition, and up to where it is committed."""
        for stage, topics in self.inputs.items():
            for partition in range(self.partitions):
                shard = ShardId(stage, partition)
                for topic, at in zip(topics, self._standing(shard).position.inputs, strict=True):
                    if self._unprocessed((topic, partition), at.offset):
                        yield shard, (topic, partition), at.offset

    def behind(self) -> list[str]:
        """What isn't committed, for the report."""
        lines = [
            f"{shard} is committed up to {at} of {self.kafka.end_offset(source)} in {source[0]}"
            for shard, source, at in self._left()
        ]
        lines += [f"{transaction.producer} has a transaction open" for transaction in self.kafka.unfinished()]
        return lines

    def _unprocessed(self, partition: Partition, offset: int) -> bool:
        end = self.kafka.end_offset(partition)
        if self.kafka.last_stable_offset(partition) < end:
            return True
        return bool(self.kafka.read_committed(partition, offset, 1)[0])

    def final(self) -> None:
        """A recount that knows nothing of commits: what a read_committed reader finds from the start."""
        for stage, topics in self.inputs.items():
            expected: dict[str, list[tuple[int, int]]] = defaultdict(list)
            states: State = defaultdict(dict)
            for number in range(self.partitions):
                for topic in topics:
                    for _, record in self.kafka.read_committed((topic, number), 0, 1_000_000)[0]:
                        assert isinstance(record, Input)
                        expected[record.key].append((record.ident, count_in(states[record.key], record)))
            found: dict[str, list[tuple[int, int]]] = defaultdict(list)
            for number in range(self.partitions):
                for _, output in self.kafka.read_committed((SINK, number), 0, 1_000_000)[0]:
                    assert isinstance(output, Output)
                    if output.shard.stage == stage:
                        found[output.key].append((output.ident, output.count))
            for key in sorted(expected | found):
                if len(topics) > 1:  # in which order they come together the inputs don't tell
                    expected[key], found[key] = _unordered(expected[key]), _unordered(found[key])
                if expected[key] != found[key]:
                    self.fail(f"outputs of {stage}, key {key}: {found[key]}, a recount gives {expected[key]}")
        self._check_repartition()
        for (topic, number), (offset, metadata, _) in self.kafka.offsets.items():
            shard = ShardId(STAGE_OF_SOURCE[topic], number)
            which = self.inputs[shard.stage].index(topic)
            if self._standing(shard).position.of_input(which) != decode_position(offset, metadata):
                self.fail(f"{shard} was committed to {self._standing(shard).position}, Kafka says {offset}")

    def _check_repartition(self) -> None:
        """Every input has come through the repartition once, and those of a key in their order."""
        source: list[int] = []
        for number in range(self.partitions):
            source += [r.ident for _, r in self.kafka.read_committed((SOURCE, number), 0, 1_000_000)[0]]
        for topic in REPARTITIONS if self.merged else (REPARTITION,):
            through: list[int] = []
            for number in range(self.partitions):
                through += [r.ident for _, r in self.kafka.read_committed((topic, number), 0, 1_000_000)[0]]
            if sorted(source) != sorted(through):
                self.fail(f"the repartition holds {sorted(through)}, the source {sorted(source)}")

    def _standing(self, shard: ShardId) -> _Standing:
        standing = self._standings.get(shard)
        if standing is None:
            further = tuple(InputOffset(0) for _ in self.inputs[shard.stage][1:])
            position = CommittedPosition(0, 0, 0, "", further=further)
            standing = self._standings[shard] = _Standing(position, {}, {})
        return standing

    def fail(self, what: str) -> Any:
        """Raise the violation."""
        self.world.note("checks", "VIOLATION: %s", what)
        raise Violation(what)


def _decoded(encoded: Mapping[bytes, bytes]) -> State:
    return {key[STORE_PREFIX_BYTES:].decode(): decode_state(value) for key, value in encoded.items() if value}


def _unordered(outputs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What two outputs tell that may come in either order: the records, and by themselves the counts."""
    idents, counts = sorted(ident for ident, _ in outputs), [count for _, count in outputs]
    return list(zip(idents, counts, strict=True))


def _offsets(position: CommittedPosition) -> str:
    return "+".join(str(at.offset) for at in position.inputs)


def _shown(outputs: list[tuple[Partition, Any]]) -> str:
    return "[" + ", ".join(f"{p[0]}/{p[1]} {v.key}={v.ident}" for p, v in outputs) + "]"
