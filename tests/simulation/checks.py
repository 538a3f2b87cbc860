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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fcluster.common import messages
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition, decode_position
from fcluster.coordinator.core import Coordinator
from fcluster.coordinator.model import HELD_PHASES, ShardPhase
from fcluster.coordinator.outbox import assignment_key, slot_key
from fcluster.engine.changelog import DeltaReader
from fcluster.engine.state import STORE_PREFIX_BYTES, StoreMeta
from fcluster.engine.values import decode_state
from tests.simulation.counter_job import (
    CHANGELOGS,
    REPARTITION,
    SINK,
    SOURCES,
    STAGE_OF_SOURCE,
    Input,
    Output,
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
        harm_only: look only at what a user would see, not at rules whose breach may do no harm yet.
    """

    def __init__(self, world: World, partitions: int, *, harm_only: bool = False) -> None:
        self.world = world
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
            elif topic == REPARTITION:
                assert origin is not None, "a repartitioned record follows its output"
                outputs[origin].append((partition, value))
            else:
                stage = next(stage for stage, changelog in CHANGELOGS.items() if changelog == topic)
                deltas[ShardId(stage, partition[1])].append((offset, value))
        shards: set[ShardId] = set()
        for (topic, number), (offset, metadata, _) in transaction.offsets.items():
            shard = ShardId(STAGE_OF_SOURCE[topic], number)
            shards.add(shard)
            position = decode_position(offset, metadata)
            self._check_right(transaction, shard, position)
            self._check_shard(transaction, shard, position, outputs.get(shard, []), deltas.get(shard, []))
        for shard in [*outputs, *deltas]:
            if shard not in shards:
                self.fail(f"{transaction.producer} commits outputs or state of {shard} without its offset")

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
        if position.offset < before.offset:
            self.fail(f"{who}: the offset goes back from {before.offset} to {position.offset}")
        source = (SOURCES[shard.stage], shard.partition)
        inputs, reached = self.kafka.read_committed(source, before.offset, position.offset - before.offset)
        inputs = [(offset, record) for offset, record in inputs if offset < position.offset]
        if reached < position.offset:
            self.fail(f"{who}: offset {position.offset} is beyond what is readable")
        state = {key: {**value, "seen": list(value["seen"])} for key, value in standing.state.items()}
        expected: list[tuple[Partition, Any]] = []
        for offset, record in inputs:
            expected += handle(shard, offset, record, state.setdefault(record.key, {}), self.partitions)
        state = {key: value for key, value in state.items() if value}
        if outputs != expected:
            self.fail(
                f"{who}: from offset {before.offset} to {position.offset} the outputs should be "
                f"{_shown(expected)}, but are {_shown(outputs)}"
            )
        encoded = self._check_delta(who, shard, standing, position, state, deltas)
        self._standings[shard] = _Standing(position, state, encoded)
        self._encoded_at[shard][position.state_epoch] = encoded

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
        for stage, topic in SOURCES.items():
            for number in range(self.partitions):
                shard = ShardId(stage, number)
                at = self._standings[shard].position.offset if shard in self._standings else 0
                if self._unprocessed((topic, number), at):
                    return False
        return not self.kafka.unfinished()

    def behind(self) -> list[str]:
        """What isn't committed, for the report."""
        lines: list[str] = []
        for stage, topic in SOURCES.items():
            for number in range(self.partitions):
                shard = ShardId(stage, number)
                at = self._standings[shard].position.offset if shard in self._standings else 0
                if self._unprocessed((topic, number), at):
                    lines.append(
                        f"{shard} is committed up to {at} of {self.kafka.end_offset((topic, number))}"
                    )
        lines += [f"{transaction.producer} has a transaction open" for transaction in self.kafka.unfinished()]
        return lines

    def _unprocessed(self, partition: Partition, offset: int) -> bool:
        end = self.kafka.end_offset(partition)
        if self.kafka.last_stable_offset(partition) < end:
            return True
        return bool(self.kafka.read_committed(partition, offset, 1)[0])

    def final(self) -> None:
        """A recount that knows nothing of commits: what a read_committed reader finds from the start."""
        for stage, topic in SOURCES.items():
            expected: dict[str, list[tuple[int, int]]] = defaultdict(list)
            states: State = defaultdict(dict)
            for number in range(self.partitions):
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
                if expected[key] != found[key]:
                    self.fail(f"outputs of {stage}, key {key}: {found[key]}, a recount gives {expected[key]}")
        self._check_repartition()
        for (topic, number), (offset, metadata, _) in self.kafka.offsets.items():
            shard = ShardId(STAGE_OF_SOURCE[topic], number)
            if self._standing(shard).position != decode_position(offset, metadata):
                self.fail(f"{shard} was committed to {self._standing(shard).position}, Kafka says {offset}")

    def _check_repartition(self) -> None:
        """Every input has come through the repartition once, and those of a key in their order."""
        source: list[int] = []
        for number in range(self.partitions):
            source += [
                r.ident for _, r in self.kafka.read_committed((SOURCES["in"], number), 0, 1_000_000)[0]
            ]
        through: list[int] = []
        for number in range(self.partitions):
            through += [r.ident for _, r in self.kafka.read_committed((REPARTITION, number), 0, 1_000_000)[0]]
        if sorted(source) != sorted(through):
            self.fail(f"the repartition holds {sorted(through)}, the source {sorted(source)}")

    def _standing(self, shard: ShardId) -> _Standing:
        standing = self._standings.get(shard)
        if standing is None:
            standing = self._standings[shard] = _Standing(CommittedPosition(0, 0, 0, ""), {}, {})
        return standing

    def fail(self, what: str) -> Any:
        """Raise the violation."""
        self.world.note("checks", "VIOLATION: %s", what)
        raise Violation(what)


def _decoded(encoded: Mapping[bytes, bytes]) -> State:
    return {key[STORE_PREFIX_BYTES:].decode(): decode_state(value) for key, value in encoded.items() if value}


def _shown(outputs: list[tuple[Partition, Any]]) -> str:
    return "[" + ", ".join(f"{p[0]}/{p[1]} {v.key}={v.ident}" for p, v in outputs) + "]"
