"""Fences slots: aborts open transactions of their transactional ids, and keeps previous owners from
committing.

Responsible for: carrying out `FenceSlot` in threads, both ids of a slot in parallel, and reporting the result
as an event; and for keeping producers connected after `PrepareFence`. Rules: a slot is reported as fenced
only when *both* ids are, and a result is always reported, in bounded time. With at-least-once there are no
transactions and nothing to fence.

Must not: decide which slot is fenced, or retry.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from confluent_kafka import Producer

from fcluster.common import failpoints
from fcluster.common.errors import FclusterError
from fcluster.common.ids import transactional_ids
from fcluster.common.settings import Settings
from fcluster.coordinator.core.events import SlotFenced, SlotFenceFailed
from fcluster.kafka.asking import REQUEST_TIMEOUT_S
from fcluster.kafka.fencing import fence_transactional_id, fencing_producers

FENCES_AT_ONCE = 16
"""How many ids are fenced in parallel. Each takes two short-lived producers."""
PREPARED_MAX = 16
"""For how many ids producers are kept connected: those of eight workers. With more workers, suspected ones
come first.
"""

_Ready = list[Producer]
"""The producers of one id. The code that uses them empties the list: a producer that kept sending would fence
the id's next owner.
"""


def _fence(settings: Settings, transactional_id: str, ready: _Ready) -> None:
    fence_transactional_id(settings, transactional_id, REQUEST_TIMEOUT_S, ready)


class Fencer:
    """Fences slots in the background. All methods are called by one thread.

    Args:
        settings: the cluster's settings.
        job: the job that the slots belong to.
        report: called in some thread with `SlotFenced` or `SlotFenceFailed`, once for each `fence`.
        fence_id: fences one id, with the producers that are connected for it, or raises an FclusterError.
        connect: creates such producers, or raises an FclusterError.
    """

    def __init__(
        self,
        settings: Settings,
        job: str,
        report: Callable[[SlotFenced | SlotFenceFailed], None],
        fence_id: Callable[[Settings, str, _Ready], None] = _fence,
        connect: Callable[[Settings, str], _Ready] = fencing_producers,
    ) -> None:
        self._settings = settings
        self._job = job
        self._report = report
        self._fence_id = fence_id
        self._connect = connect
        self._lock = threading.Lock()
        self._prepared: dict[str, Future[_Ready]] = {}
        self._threads = ThreadPoolExecutor(FENCES_AT_ONCE, thread_name_prefix="fence")

    def prepare(self, slot: int, *, soon: bool) -> None:
        """Connect producers, so that `fence` is fast.

        Args:
            slot: the slot that may have to be fenced later.
            soon: whether it will probably have to be fenced. Then, if there are too many producers, others
                are dropped.
        """
        if self._settings.processing_guarantee == "at-least-once":
            return
        for identity in transactional_ids(self._job, slot):
            former = self._prepared.get(identity)
            if former is not None and not (former.done() and former.exception()):
                continue
            if former is None and len(self._prepared) >= PREPARED_MAX:
                if not soon:
                    return
                longest = next(iter(self._prepared))
                self._threads.submit(_taken, self._prepared.pop(longest))  # destroying them takes a moment
            self._prepared[identity] = self._threads.submit(self._connect, self._settings, identity)

    def forget(self, slot: int) -> None:
        """Destroy the producers that `prepare` connected for the slot."""
        for identity in transactional_ids(self._job, slot):
            prepared = self._prepared.pop(identity, None)
            if prepared is not None:
                self._threads.submit(_taken, prepared)  # destroying them takes a moment

    def fence(self, slot: int) -> None:
        """Start to fence both ids of the slot."""
        failpoints.reach("coordinator.before-fence", slot)
        if self._settings.processing_guarantee == "at-least-once":
            self._report(SlotFenced(slot))
            return
        futures = [
            self._threads.submit(self._fence_one, identity, self._prepared.pop(identity, None))
            for identity in transactional_ids(self._job, slot)
        ]
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

    def _fence_one(self, identity: str, prepared: Future[_Ready] | None) -> None:
        self._fence_id(self._settings, identity, _taken(prepared))

    def close(self) -> None:
        """Start no more fences. Those that are running end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._prepared.clear()


def _taken(prepared: Future[_Ready] | None) -> _Ready:
    """The producers, once they are connected. None if connecting failed: then the fence connects by
    itself.
    """
    if prepared is None or prepared.cancelled():
        return []
    try:
        producers = prepared.result()
    except FclusterError:
        return []
    taken = producers.copy()
    producers.clear()  # the future would keep them alive
    return taken


def _outcome(slot: int, futures: list[Future[None]]) -> SlotFenced | SlotFenceFailed:
    for future in futures:
        if future.cancelled():
            return SlotFenceFailed(slot, "the coordinator is exiting")
        error = future.exception()
        if error is not None:
            reason = error.message if isinstance(error, FclusterError) else f"{type(error).__name__}: {error}"
            return SlotFenceFailed(slot, reason)
    return SlotFenced(slot)
