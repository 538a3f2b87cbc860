"""Makes sure that records that come after a pause still belong to the topic in which reading began.

When a topic is deleted and created again, a client sees only a pause: the broker refuses the old topic's id,
and the client waits (librdkafka's `fetch.error.backoff.ms`, half a second) before it silently continues in
the new topic, at the same offset. So an epoch with records of a partition that had been quiet is prepared
only when a check of the topic, begun after these records were read, has shown the old id. The check runs in
parallel with the epoch's own requests. Some cases are missed (new records that waited here together with old
ones, or a broker that lags behind). The coordinator's watch finds those later.

Rule: a missing answer proves nothing, so it is no objection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Final

from fcluster.kafka.topic_ids import Look, fits, source_replaced

PAUSE_S: Final = 0.25
"""Half of the client's wait. A record that comes sooner than this after another one belongs to the same
topic.
"""
ANSWER_TIMEOUT_S: Final = 2.0
"""How long after the barrier an answer is waited for. When a broker goes away, all partitions pause, so all
of them are doubtful, and the request may wait for that very broker. Then the check must not hold up the epoch
for longer than the failover itself.
"""


class SourceChecks:
    """All methods are called by the main thread, except for the function that `begin` returns.

    Args:
        job: the job's name, for messages.
        look: begins a check of topics, in another thread.
        settled: checks until an answer that contradicts these ids has been given for a while.
        clock_s: returns the time on a clock that never goes back.
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
        """Records of the partition were processed. They were read just now from the topic with this id."""
        now_s = self._clock_s()
        if topic_id and now_s - self._read_s.get((topic, partition), float("-inf")) > PAUSE_S:
            self._doubtful[topic] = topic_id
        self._read_s[topic, partition] = now_s

    def forget(self) -> None:
        """What was read won't be committed, and will be read again."""
        self._read_s.clear()
        self._doubtful.clear()

    def begin(self) -> Callable[[], None]:
        """The epoch ends here: begin a check, if necessary.

        Returns:
            A function that another thread calls before the epoch is reported as prepared. It raises
            TopicReplaced if a topic was replaced.
        """
        expected, self._doubtful = self._doubtful, {}
        if not expected:
            return _nothing
        looking = self._look(expected)
        deadline_s = self._clock_s() + ANSWER_TIMEOUT_S

        def confirm() -> None:
            try:
                look = looking.result(max(0.0, deadline_s - self._clock_s()))
            except Exception:  # noqa: BLE001  the brokers may fail to answer for any reason
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
