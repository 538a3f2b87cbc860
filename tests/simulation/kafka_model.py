"""A model of what fcluster relies on in Kafka: transactions, fencing, committed offsets, visibility.

These properties are modelled, because the protocol's safety depends on them:

- A transactional id has a producer epoch. `init_producer` increases it and aborts the id's open transaction.
  From then on, every call of an older epoch is refused (`Fenced`).
- Records of a transaction are in the log at once, in the order of their arrival. A read_committed reader sees
  records only up to the last stable offset (the first record of a transaction without its marker), and never
  a record of an aborted transaction. Markers take offsets.
- A commit is decided in one step. Its markers reach each partition, and its offsets reach the group, a little
  later, each separately. Until then the id is busy (`Busy`: clients ask again), and so is `init_producer`
  with it.
- Offsets sent to a transaction are pending until its marker reaches the group. A stable reader waits while an
  offset of its partition is pending (`offset_pending`). If two markers arrive in the wrong order, the offset
  that was sent later remains.
- If a transaction is open for longer than its timeout, the broker aborts it and fences its producer.
- The journal: a compacted topic with one transactional writer at a time.

Requests are atomic here. The caller (`world`) adds delays, losses and unknown outcomes. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Partition = tuple[str, int]

OPEN, COMMITTED, ABORTED = "open", "committed", "aborted"


class Fenced(Exception):  # noqa: N818  Kafka's own name for it
    """The producer's epoch is over."""


class Busy(Exception):  # noqa: N818
    """The id's last transaction hasn't ended everywhere yet (CONCURRENT_TRANSACTIONS): ask again."""


@dataclass(frozen=True, slots=True)
class Producer:
    """A handle: one life of a transactional id. `session` is used only by the checks."""

    transactional_id: str
    producer_epoch: int
    session: int = 0

    def __str__(self) -> str:
        return f"{self.transactional_id}#{self.producer_epoch}"


@dataclass(slots=True)
class Entry:
    """One offset of a log: a record, or the marker that ends a transaction there."""

    value: Any
    transaction: Transaction | None
    marker: bool = False


@dataclass(eq=False, slots=True)
class Transaction:
    """What one producer epoch does between begin and end.

    Attributes:
        state: what was decided.
        unmarked: partitions with its records that have no marker yet, and the first record's offset.
        records: all of its records, in the order of their arrival.
        offsets: what it commits: offset, metadata, and the order of arrival among all offsets.
        offsets_pending: whether its marker hasn't reached the group yet.
    """

    producer: Producer
    began_ms: float
    state: str = OPEN
    unmarked: dict[Partition, int] = field(default_factory=dict[Partition, int])
    records: list[tuple[Partition, int, Any]] = field(default_factory=list[tuple[Partition, int, Any]])
    offsets: dict[Partition, tuple[int, str, int]] = field(
        default_factory=dict[Partition, tuple[int, str, int]]
    )
    offsets_pending: bool = True

    @property
    def over(self) -> bool:
        """Whether it is decided, and its end is known everywhere."""
        return self.state is not OPEN and not self.unmarked and not self.offsets_pending


def _at_once(_delay_ms: float, action: Callable[[], None]) -> None:
    action()


def _never(_delay_ms: float, _action: Callable[[], None]) -> None:
    pass


class KafkaModel:
    """One cluster, one consumer group.

    Args:
        timeout_ms: the timeout of transactions.
        marker_delay_ms: drawn for each marker. 0: at once, with the decision.
        defer: runs an action after a delay, for markers.
        expire_later: the same, for timeouts.
        on_commit: called with each transaction when its commit is decided.
        on_stable: called with each partition whose last stable offset may have moved.
    """

    def __init__(
        self,
        *,
        timeout_ms: float = 60_000,
        marker_delay_ms: Callable[[], float] = lambda: 0,
        defer: Callable[[float, Callable[[], None]], None] = _at_once,
        expire_later: Callable[[float, Callable[[], None]], None] = _never,
        on_commit: Callable[[Transaction], None] = lambda _transaction: None,
        on_stable: Callable[[Partition], None] = lambda _partition: None,
    ) -> None:
        self.logs: dict[Partition, list[Entry]] = {}
        self.begins: dict[Partition, int] = {}
        self.offsets: dict[Partition, tuple[int, str, int]] = {}
        self.journal = Journal()
        self._timeout_ms = timeout_ms
        self._marker_delay_ms = marker_delay_ms
        self._defer = defer
        self._expire_later = expire_later
        self._on_commit = on_commit
        self._on_stable = on_stable
        self._epochs: dict[str, int] = {}
        self._last: dict[str, Transaction] = {}
        self._unmarked: dict[Partition, dict[Transaction, int]] = {}
        self._pending: dict[Partition, dict[Transaction, None]] = {}
        self._offsets_sent = 0

    # --- producers ------------------------------------------------------------------------------------

    def init_producer(self, transactional_id: str, session: int = 0) -> Producer:
        """A new life for the id. It ends all earlier ones.

        Raises:
            Busy: this ends the id's open transaction, but not everywhere yet: ask again.
        """
        last = self._last.get(transactional_id)
        if last is not None and not last.over:
            if last.state is OPEN:
                # The id's former life ends here, although the answer has to wait.
                self._epochs[transactional_id] += 1
                self._end(last, ABORTED)
            if not last.over:
                raise Busy(transactional_id)
        epoch = self._epochs.get(transactional_id, -1) + 1
        self._epochs[transactional_id] = epoch
        return Producer(transactional_id, epoch, session)

    def append(self, producer: Producer, records: list[tuple[Partition, Any]], now_ms: float) -> list[int]:
        """Write records in the producer's transaction, which is begun if there is none. Returns their
        offsets.
        """
        transaction = self._transaction(producer, now_ms)
        offsets: list[int] = []
        for partition, value in records:
            log = self.logs.setdefault(partition, [])
            offset = len(log)
            if partition not in transaction.unmarked:
                transaction.unmarked[partition] = offset
                self._unmarked.setdefault(partition, {})[transaction] = offset
            log.append(Entry(value, transaction))
            transaction.records.append((partition, offset, value))
            offsets.append(offset)
        return offsets

    def append_plain(self, partition: Partition, value: Any) -> int:
        """Write one record outside of any transaction."""
        self.logs.setdefault(partition, []).append(Entry(value, None))
        self._on_stable(partition)
        return len(self.logs[partition]) - 1

    def send_offsets(
        self, producer: Producer, offsets: dict[Partition, tuple[int, str]], now_ms: float
    ) -> None:
        """Add offsets, with their metadata, to the producer's transaction."""
        transaction = self._transaction(producer, now_ms)
        for partition, (offset, metadata) in offsets.items():
            self._offsets_sent += 1
            transaction.offsets[partition] = (offset, metadata, self._offsets_sent)
            self._pending.setdefault(partition, {})[transaction] = None

    def commit(self, producer: Producer) -> None:
        """End the producer's transaction. All of it becomes visible."""
        self._check(producer)
        transaction = self._last.get(producer.transactional_id)
        if transaction is not None and transaction.state is OPEN:
            self._end(transaction, COMMITTED)

    def abort(self, producer: Producer) -> None:
        """End the producer's transaction. None of it ever becomes visible."""
        self._check(producer)
        transaction = self._last.get(producer.transactional_id)
        if transaction is not None and transaction.state is OPEN:
            self._end(transaction, ABORTED)

    def abort_and_go_on(self, producer: Producer) -> Producer:
        """End the producer's transaction, and give it its next epoch: requests that are still on their way
        come too late.

        Raises:
            Busy: the transaction hasn't ended everywhere yet: ask again.
        """
        self._check(producer)
        last = self._last.get(producer.transactional_id)
        if last is not None and not last.over:
            if last.state is OPEN:
                self._end(last, ABORTED)
            if not last.over:
                raise Busy(producer.transactional_id)
        self._epochs[producer.transactional_id] += 1
        return Producer(producer.transactional_id, self._epochs[producer.transactional_id], producer.session)

    def is_current(self, producer: Producer) -> bool:
        """Whether the producer isn't fenced."""
        return self._epochs.get(producer.transactional_id) == producer.producer_epoch

    # --- readers --------------------------------------------------------------------------------------

    def last_stable_offset(self, partition: Partition) -> int:
        """The offset up to which a read_committed reader can read."""
        unmarked = self._unmarked.get(partition)
        if unmarked:
            return next(iter(unmarked.values()))  # they are in the order of their first offsets
        return len(self.logs.get(partition, ()))

    def end_offset(self, partition: Partition) -> int:
        """The offset after the last record, including those of open transactions."""
        return len(self.logs.get(partition, ()))

    def read_committed(
        self, partition: Partition, offset: int, records_max: int
    ) -> tuple[list[tuple[int, Any]], int]:
        """Records from `offset` on as (offset, value), and the position after what was looked at."""
        log = self.logs.get(partition, [])
        end = self.last_stable_offset(partition)
        assert offset >= self.begins.get(partition, 0), f"{partition} begins at {self.begins[partition]}"
        records: list[tuple[int, Any]] = []
        position = offset
        while position < end and len(records) < records_max:
            entry = log[position]
            transaction = entry.transaction
            if not entry.marker and (transaction is None or transaction.state is COMMITTED):
                records.append((position, entry.value))
            position += 1
        return records, position

    def committed(self, partition: Partition) -> tuple[int, str] | None:
        """The committed offset and its metadata. None if there is none."""
        found = self.offsets.get(partition)
        return None if found is None else found[:2]

    def offset_pending(self, partition: Partition) -> bool:
        """Whether a transaction that isn't decided or marked yet holds an offset for the partition."""
        return bool(self._pending.get(partition))

    def unfinished(self) -> list[Transaction]:
        """Transactions that haven't ended everywhere."""
        return [transaction for transaction in self._last.values() if not transaction.over]

    def delete_before(self, partition: Partition, offset: int) -> None:
        """Delete the records before `offset`."""
        self.begins[partition] = max(self.begins.get(partition, 0), offset)

    # --- inside ---------------------------------------------------------------------------------------

    def _check(self, producer: Producer) -> None:
        if self._epochs.get(producer.transactional_id) != producer.producer_epoch:
            raise Fenced(f"{producer} is fenced, now is #{self._epochs.get(producer.transactional_id)}")

    def _transaction(self, producer: Producer, now_ms: float) -> Transaction:
        self._check(producer)
        last = self._last.get(producer.transactional_id)
        if last is None or last.over:
            last = self._last[producer.transactional_id] = Transaction(producer, now_ms)
            self._expire_later(self._timeout_ms, lambda transaction=last: self._expire(transaction))
        elif last.state is not OPEN:
            raise Busy(producer.transactional_id)
        return last

    def _expire(self, transaction: Transaction) -> None:
        if transaction.state is OPEN:
            self._epochs[transaction.producer.transactional_id] += 1
            self._end(transaction, ABORTED)

    def _end(self, transaction: Transaction, state: str) -> None:
        transaction.state = state
        if state is COMMITTED:
            self._on_commit(transaction)
        for partition in list(transaction.unmarked):
            self._after_marker_delay(lambda partition=partition: self._mark(transaction, partition))
        self._after_marker_delay(lambda: self._mark_offsets(transaction))

    def _after_marker_delay(self, action: Callable[[], None]) -> None:
        delay_ms = self._marker_delay_ms()
        if delay_ms:
            self._defer(delay_ms, action)
        else:
            action()

    def _mark(self, transaction: Transaction, partition: Partition) -> None:
        del transaction.unmarked[partition]
        del self._unmarked[partition][transaction]
        self.logs[partition].append(Entry(None, transaction, marker=True))
        self._on_stable(partition)

    def _mark_offsets(self, transaction: Transaction) -> None:
        transaction.offsets_pending = False
        for partition, offset in transaction.offsets.items():
            del self._pending[partition][transaction]
            known = self.offsets.get(partition)
            if transaction.state is COMMITTED and (known is None or known[2] < offset[2]):
                self.offsets[partition] = offset


class Journal:
    """The coordinator's compacted topic. Each `begin_term` fences the writers before it."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self.leader: Any = None
        self._writer = 0

    def begin(self) -> int:
        """A new writer. Returns its handle."""
        self._writer += 1
        return self._writer

    def is_current(self, writer: int) -> bool:
        """Whether there is no newer writer."""
        return writer == self._writer

    def check(self, writer: int) -> None:
        """Raises Fenced if there is a newer writer."""
        if not self.is_current(writer):
            raise Fenced(f"journal writer {writer}, now is {self._writer}")

    def write(self, writer: int, entries: dict[str, Any]) -> None:
        """Write entries atomically. None deletes."""
        self.check(writer)
        for key, value in entries.items():
            if value is None:
                self.entries.pop(key, None)
            else:
                self.entries[key] = value
