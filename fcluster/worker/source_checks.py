"""Makes sure that records which come after a pause are still of the topic that reading began in.

A topic that is deleted and made again leaves a gap in what a client gets of it: the broker refuses the
former topic's id, and the client waits (librdkafka's `fetch.error.backoff.ms`, half a second) before it goes
on, at the same offset, in the new topic, without a word. So an epoch that holds records of a partition from
which nothing had come for a while is prepared only when a look at the topic, begun after these records were
read, has shown the former id. The look goes on beside the epoch's own requests. What it misses (records that
waited here beside those of the former topic, a broker that lags behind) the coordinator's watch finds later.

Keeps the rule that not knowing is no fact: no answer is no objection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Final

from fcluster.common.topic_ids import Look, fits, source_replaced

PAUSE_S: Final = 0.25
"""Half of what the client waits: what comes sooner after a record is of the same topic."""
ANSWER_TIMEOUT_S: Final = 5.0


class SourceChecks:
    """All methods but what `begin` returns are for the main thread.

    Args:
        job: for messages.
        look: begins a look at topics, in another thread.
        settled: looks until an answer that contradicts these ids has been given for a while.
        clock_s: of a clock that never goes back.
    """

    def __init__(
        self,
        job: str,
        look: Callable[[Iterable[str]], Future[Look]],
        settled: Callable[[dict[str, str]], Look],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job = job
        self._look = look
        self._settled = settled
        self._clock_s = clock_s
        self._read_s: dict[tuple[str, int], float] = {}
        self._doubtful: dict[str, str] = {}

    def read(self, topic: str, partition: int, topic_id: str) -> None:
        """Records of the partition were processed, read a moment ago from the topic that had this id."""
        now_s = self._clock_s()
        if topic_id and now_s - self._read_s.get((topic, partition), float("-inf")) > PAUSE_S:
            self._doubtful[topic] = topic_id
        self._read_s[topic, partition] = now_s

    def forget(self) -> None:
        """What was read isn't going to be committed, and is read again."""
        self._read_s.clear()
        self._doubtful.clear()

    def begin(self) -> Callable[[], None]:
        """The epoch ends here: begin to look, if there is need.

        Returns:
            To be called by another thread before the epoch is told to be prepared. It raises TopicReplaced if
            a topic isn't the former one.
        """
        expected, self._doubtful = self._doubtful, {}
        if not expected:
            return _nothing
        looking = self._look(expected)

        def confirm() -> None:
            try:
                look = looking.result(ANSWER_TIMEOUT_S)
            except Exception:  # noqa: BLE001  whatever keeps the brokers from answering
                return
            contradicted = {
                topic: topic_id
                for topic, topic_id in expected.items()
                if (seen := look.get(topic)) is not None and not fits(seen, topic_id)
            }
            settled: Look = self._settled(contradicted) if contradicted else {}
            for topic, topic_id in contradicted.items():
                seen = settled.get(topic)
                if seen is not None and not fits(seen, topic_id):
                    affected = "Nothing of the new topic is committed."
                    raise source_replaced(self._job, topic, topic_id, seen.topic_id, affected)

        return confirm


def _nothing() -> None:
    pass
