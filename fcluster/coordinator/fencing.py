"""Fences slots: aborts what their transactional ids have open, and keeps their former owners from committing.

Responsible for: carrying out `FenceSlot` in threads, both ids of a slot at once, and reporting the outcome
as an event. Keeps the rules that a slot is reported fenced only when *both* ids are, and that an answer
always comes, in bounded time. With at-least-once there are no transactions and nothing to fence.

Must not: decide which slot is fenced, or retry.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fcluster.common import failpoints
from fcluster.common.errors import FclusterError
from fcluster.common.ids import transactional_ids
from fcluster.common.kafka_clients import fence_transactional_id
from fcluster.common.settings import Settings
from fcluster.coordinator.events import SlotFenced, SlotFenceFailed

FENCES_AT_ONCE = 16
"""Ids fenced at the same time: each takes two short-lived producers."""


class Fencer:
    """Fences slots in the background.

    Args:
        settings: of the cluster.
        job: whose slots they are.
        report: called in some thread with `SlotFenced` or `SlotFenceFailed`, once for each `fence`.
        fence_id: fences one id or raises an FclusterError.
    """

    def __init__(
        self,
        settings: Settings,
        job: str,
        report: Callable[[SlotFenced | SlotFenceFailed], None],
        fence_id: Callable[[Settings, str], None] = fence_transactional_id,
    ) -> None:
        self._settings = settings
        self._job = job
        self._report = report
        self._fence_id = fence_id
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(FENCES_AT_ONCE, thread_name_prefix="fence")

    def fence(self, slot: int) -> None:
        """Begin to fence both ids of the slot."""
        failpoints.reach("coordinator.before-fence", slot)
        if self._settings.processing_guarantee == "at-least-once":
            self._report(SlotFenced(slot))
            return
        ids = transactional_ids(self._job, slot)
        futures = [self._threads.submit(self._fence_id, self._settings, identity) for identity in ids]
        pending = [len(futures)]

        def done(_: Future[None]) -> None:
            with self._lock:
                pending[0] -= 1
                last = pending[0] == 0
            if last:
                failpoints.reach("coordinator.after-fence", slot)
                self._report(_outcome(slot, futures))

        for future in futures:
            future.add_done_callback(done)

    def close(self) -> None:
        """Begin no more fences; those under way end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _outcome(slot: int, futures: list[Future[None]]) -> SlotFenced | SlotFenceFailed:
    for future in futures:
        if future.cancelled():
            return SlotFenceFailed(slot, "the coordinator is ending")
        error = future.exception()
        if error is not None:
            reason = error.message if isinstance(error, FclusterError) else f"{type(error).__name__}: {error}"
            return SlotFenceFailed(slot, reason)
    return SlotFenced(slot)
