"""Reads the group's committed offsets, and accepts no answer that is known to be outdated.

A group coordinator that is cut off from the other brokers doesn't know that it was deposed: it still answers,
with earlier offsets. No error makes its client look for another coordinator; only a new client asks which
broker coordinates the group now. After a restore from such an answer, records that are already committed
would be processed again.

Responsible for: the reader of committed offsets, and for replacing it if its answer lacks what a worker has
reported as committed (`core.reported_offsets` has the rule).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from confluent_kafka import Consumer, TopicPartition

from fcluster.common.positions import CommittedPosition
from fcluster.kafka.asking import ANSWER_TIMEOUT_S
from fcluster.kafka.offsets import read_committed_positions
from fcluster.worker.core.reported_offsets import ReportedOffsets

OLD_ANSWERS_S: Final = 10.0
"""How long other brokers are asked if an answer is older than what was reported."""
PAUSE_S: Final = 0.3

_log = logging.getLogger("fcluster.worker")


class CommittedOffsets:
    """The committed offsets of a job's sources.

    Args:
        job: its name, which is also the name of the group.
        make_reader: creates a read-committed consumer of that group.
        stopping: ends the waits.
        old_answers_s: see `OLD_ANSWERS_S`.
    """

    def __init__(
        self,
        job: str,
        make_reader: Callable[[], Consumer],
        stopping: threading.Event,
        old_answers_s: float = OLD_ANSWERS_S,
    ) -> None:
        self._job = job
        self._make_reader = make_reader
        self._stopping = stopping
        self._old_answers_s = old_answers_s
        self._reader = make_reader()
        self._using = threading.Lock()
        """A reader isn't closed while another thread uses it."""
        self._reported = ReportedOffsets()

    def reported(self, topic: str, partition: int, offset: int) -> None:
        """Note that at least this offset of the partition is committed."""
        self._reported.report(topic, partition, offset)

    def connect(self, partition: TopicPartition, timeout_s: float) -> None:
        """Find the group's coordinator.

        Raises:
            KafkaUnavailable: it isn't found in time.
        """
        with self._using:
            read_committed_positions(self._reader, self._job, [partition], timeout_s)

    def read(
        self, wanted: Sequence[TopicPartition], timeout_s: float = ANSWER_TIMEOUT_S
    ) -> Mapping[TopicPartition, CommittedPosition | None]:
        """The committed offset of each partition. None where there is none.

        Raises:
            KafkaUnavailable: no settled answer came in time.
            IncompatibleState: the offsets were not committed by fcluster.
        """
        deadline_s = time.monotonic() + self._old_answers_s
        while True:
            with self._using:
                committed = read_committed_positions(self._reader, self._job, wanted, timeout_s)
            answered = {(at.topic, at.partition): _offset_of(committed[at]) for at in wanted}
            old = self._reported.find_older(answered)
            if old is None:
                return committed
            what = (
                f"the answer for {old[0]}/{old[1]} is offset {answered[old]}, but "
                f"{self._reported.known(old)} is committed"
            )
            if self._stopping.is_set() or time.monotonic() > deadline_s:
                # No broker knows of a later offset: somebody has set the offsets back. What to do about it is
                # decided where they are compared with the state.
                _log.warning("committed offsets were set back from outside: %s", what)
                self._reported.forget()
                return committed
            _log.info("asking another broker for the committed offsets: %s", what)
            with self._using:
                self._reader.close()
                self._reader = self._make_reader()
            self._stopping.wait(PAUSE_S)

    def close(self) -> None:
        """After that, nothing can be read."""
        self._reader.close()


def _offset_of(position: CommittedPosition | None) -> int:
    return 0 if position is None else position.offset
