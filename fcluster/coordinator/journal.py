"""The coordinator's memory: a compacted Kafka topic that only the leader can write.

Responsible for: taking over the journal (`open_journal`), and writing to it. Invariants:

- Only the newest leader writes. Opening the journal fences every older leader by its transactional id. A
  write that an older leader had begun is either visible to the read that follows, or never (invariant 14).
- A write is in the journal completely or not at all, and is acknowledged only when Kafka has committed it.
- An unknown outcome is never guessed. The journal is then lost to this process, and the next leadership reads
  what happened.

Must not: know what the entries mean. Values are JSON; a value of None deletes its key.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from confluent_kafka import KafkaError, KafkaException, Producer

from fcluster.common import failpoints
from fcluster.common.errors import KafkaUnavailable
from fcluster.common.ids import coordinator_id, journal_topic
from fcluster.common.settings import Settings
from fcluster.coordinator.core.events import Deposed, JournalWritten, WriteJournal
from fcluster.kafka.asking import cause_of, reason_of, remedy_for
from fcluster.kafka.clients import LASTING, make_producer, serve_rest
from fcluster.kafka.outcasts import Outcasts, Relief
from fcluster.wire.discovery import read_journal

_log = logging.getLogger("fcluster.coordinator")

OPEN_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_MS = 4_000
"""How long to wait for a broker's answer before its successor is asked. The journal is idle for long times,
so its producer notices late that a broker hangs, while workers wait for the write.
"""
WRITE_TIMEOUT_S = 60.0
"""Epochs don't wait for the journal, so it can be patient with brokers that are down."""
STEP_S = 0.5
"""A call that takes longer is repeated, which resumes it."""

_FENCED = frozenset({"_FENCED", "PRODUCER_FENCED", "INVALID_PRODUCER_EPOCH"})
_FORGOTTEN = "INVALID_PRODUCER_ID_MAPPING"
"""The error if the transactional id was idle for longer than the brokers remember ids
(transactional.id.expiration.ms). Aborting initialises it again. If another producer has taken the id in the
meantime, the abort reports that this producer is fenced.
"""


class JournalLostError(Exception):
    """This process can no longer write the journal."""


class DeposedError(JournalLostError):
    """Another coordinator has taken over the journal."""


class Journal:
    """An open journal. It belongs to one thread at a time.

    Args:
        producer: the producer, with initialised transactions.
        topic: the journal's topic.
        relief: is told how long a write has waited for Kafka.
    """

    def __init__(self, producer: Producer, topic: str, relief: Relief | None = None) -> None:
        self.is_ours: Callable[[], bool] = lambda: True
        """Whether the topic still names this journal's owner as the newest leader. Called if Kafka has
        forgotten the transactional id."""
        self._producer = producer
        self._topic = topic
        self._relief = relief

    def write(self, entries: Mapping[str, Any], timeout_s: float = WRITE_TIMEOUT_S) -> None:
        """Write all entries in one transaction. Returns when it is committed.

        Raises:
            DeposedError: another coordinator leads the job.
            JournalLostError: Kafka didn't commit it within `timeout_s` seconds; it may have done so later.
        """
        deadline_s = time.monotonic() + timeout_s
        failpoints.reach("coordinator.before-journal")
        while not self._try_to_write(entries, deadline_s):
            if time.monotonic() >= deadline_s:
                raise JournalLostError(
                    f"the journal {self._topic!r} could not be written within {timeout_s:g} s"
                )
        failpoints.reach("coordinator.after-journal")

    def close(self) -> None:
        """Release the producer. There must be no write in progress. The journal can't be written after
        that.
        """
        self._producer.flush(0.5)
        serve_rest(self._producer)
        del self._producer

    def _try_to_write(self, entries: Mapping[str, Any], deadline_s: float) -> bool:
        """Returns False if the transaction was aborted and may be retried."""
        producer = self._producer
        try:
            producer.begin_transaction()
            for key, value in entries.items():
                encoded = None if value is None else msgspec.json.encode(value)
                producer.produce(self._topic, key=key.encode(), value=encoded, partition=0)
            failpoints.reach("coordinator.mid-journal")
            _repeat(producer.commit_transaction, deadline_s, self._relief)
        except KafkaException as error:
            self._judge(error)
            self._abort(deadline_s)
            if cause_of(error).name() == _FORGOTTEN:
                self._take_again()
            return False
        return True

    def _take_again(self) -> None:
        """The id belongs to this producer again. In the meantime, another leader may have come and gone."""
        if not self.is_ours():
            raise DeposedError(f"another coordinator has written the journal {self._topic!r}")
        _log.info(
            "Kafka had forgotten the transactional id of the journal %s, which was idle for a long time: "
            "initialising it again and continuing the term",
            self._topic,
        )

    def _judge(self, error: KafkaException) -> None:
        """Returns if it is right to abort and retry. Otherwise raises."""
        cause = cause_of(error)
        if cause.name() in _FENCED:
            raise DeposedError(f"another coordinator writes the journal {self._topic!r}") from error
        if not cause.txn_requires_abort():
            raise JournalLostError(
                f"the outcome of a write to {self._topic!r} is unknown: {reason_of(error)}"
            ) from error

    def _abort(self, deadline_s: float) -> None:
        try:
            _repeat(self._producer.abort_transaction, deadline_s, self._relief)
        except KafkaException as error:
            self._judge(error)
            raise JournalLostError(
                f"a write to {self._topic!r} can't be aborted: {reason_of(error)}"
            ) from error


def journal_producer(settings: Settings, job: str) -> Producer:
    """A connected producer for `open_journal`. It has no effect until it is used there.

    Raises:
        KafkaUnavailable: the brokers don't answer.
    """
    patience_ms = min(ANSWER_TIMEOUT_MS, settings.transaction_timeout_ms)
    producer = make_producer(settings, coordinator_id(job), **{"socket.timeout.ms": patience_ms}, **LASTING)
    try:
        producer.list_topics(timeout=OPEN_TIMEOUT_S)
    except KafkaException as error:
        raise _cant_take_over(job, error) from error
    return producer


def open_journal(
    settings: Settings, job: str, producer: Producer | None = None
) -> tuple[Journal, dict[str, Any]]:
    """Depose the previous leader, if there is one, and take over the journal. Its topic has to exist.

    Args:
        settings: the cluster's settings.
        job: the job's name.
        producer: from `journal_producer`, to save time. From then on it belongs to the journal.

    Returns:
        The journal and its contents.

    Raises:
        KafkaUnavailable: the brokers didn't answer in time.
        IncompatibleState: the topic's contents are not a journal.
    """
    deadline_s = time.monotonic() + OPEN_TIMEOUT_S
    relief = Relief(Outcasts(settings).leave)
    producer = producer or journal_producer(settings, job)  # fast once it is connected
    try:
        _repeat(producer.init_transactions, deadline_s, relief)
    except KafkaException as error:
        raise _cant_take_over(job, error) from error
    journal = Journal(producer, journal_topic(job), relief)
    return journal, read_journal(settings, job, OPEN_TIMEOUT_S, must_exist=True)


def _cant_take_over(job: str, error: KafkaException) -> KafkaUnavailable:
    return KafkaUnavailable(
        f"Can't take over the journal of job {job!r}: {reason_of(error)}.",
        remedy=remedy_for(cause_of(error)),
    )


def _repeat(call: Callable[[float], Any], deadline_s: float, relief: Relief | None) -> None:
    """Call it until it succeeds. A call that has timed out is resumed by the next one.

    Raises:
        KafkaException: repeating doesn't help, or the deadline has passed.
    """
    begun_s = time.monotonic()
    while True:
        try:
            call(min(STEP_S, _remaining_s(deadline_s)))
            return
        except KafkaException as error:
            cause = cause_of(error)
            retriable = cause.retriable() or cause.code() == KafkaError._TIMED_OUT
            now_s = time.monotonic()
            if not retriable or now_s >= deadline_s:
                raise
            if relief is not None:
                relief.waited(now_s - begun_s)


def _remaining_s(deadline_s: float) -> float:
    return max(0.1, deadline_s - time.monotonic())


class JournalThread:
    """Writes the journal in order. Queued writes go into one transaction."""

    def __init__(self, journal: Journal, post: Callable[[JournalWritten | Deposed], None]) -> None:
        self._journal = journal
        self._post = post
        self._queue: queue.SimpleQueue[WriteJournal | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def write(self, effect: WriteJournal) -> None:
        """Write these entries. `JournalWritten` reports it, unless the sequence is 0, because nothing waits
        for such a write.
        """
        self._queue.put(effect)

    def close(self) -> None:
        """Write what is queued, but only for a short time."""
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            batch, ending = self._take()
            if batch and not self._write(batch):
                self._journal.close()
                return
            if ending:
                self._journal.close()
                return

    def _take(self) -> tuple[list[WriteJournal], bool]:
        item = self._queue.get()
        batch: list[WriteJournal] = []
        while item is not None:
            batch.append(item)
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _write(self, batch: list[WriteJournal]) -> bool:
        entries: dict[str, Any] = {}
        for effect in batch:
            entries.update(effect.entries)
        try:
            self._journal.write(entries)
        except DeposedError as error:
            self._post(Deposed(str(error)))
            return False
        except Exception as error:  # noqa: BLE001  without a journal it can't lead, whatever the reason
            self._post(Deposed(f"the journal is lost: {error}"))
            return False
        if sequence := max(effect.sequence for effect in batch):
            self._post(JournalWritten(sequence))
        return True
