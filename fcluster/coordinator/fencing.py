"""Fences slots: aborts what their transactional ids have open, and keeps their former owners from committing.

Responsible for: carrying out `FenceSlot` in threads, both ids of a slot at once, and reporting the outcome
as an event; and having producers connected for it when `PrepareFence` came before. Keeps the rules that a slot is
reported fenced only when *both* ids are, and that an answer always comes, in bounded time. With at-least-once there
are no transactions and nothing to fence.

Must not: decide which slot is fenced, or retry.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from confluent_kafka import Producer

from fcluster.common import failpoints
from fcluster.common.errors import FclusterError
from fcluster.common.ids import transactional_ids
from fcluster.common.kafka_clients import REQUEST_TIMEOUT_S, fence_transactional_id, fencing_producers
from fcluster.common.settings import Settings
from fcluster.coordinator.events import SlotFenced, SlotFenceFailed

FENCES_AT_ONCE = 16
"""Ids fenced at the same time: each takes two short-lived producers."""
PREPARED_MAX = 16
"""Ids for which producers are kept ready; further ones connect when they are fenced."""
PREPARED_FOR_S = 10.0
"""A suspicion that came to nothing by then was unfounded."""

_Ready = list[Producer]
"""Producers of one id. Emptied by who uses them: one that goes on asking would fence the id's next owner."""


def _fence(settings: Settings, transactional_id: str, ready: _Ready) -> None:
    fence_transactional_id(settings, transactional_id, REQUEST_TIMEOUT_S, ready)


@dataclass(slots=True)
class _Prepared:
    """Producers of an id that are connected, or being connected."""

    producers: Future[_Ready]
    since_s: float = field(default_factory=time.monotonic)


class Fencer:
    """Fences slots in the background. All methods are for one thread.

    Args:
        settings: of the cluster.
        job: whose slots they are.
        report: called in some thread with `SlotFenced` or `SlotFenceFailed`, once for each `fence`.
        fence_id: fences one id, with the producers that are ready for it, or raises an FclusterError.
        connect: makes such producers, or raises an FclusterError.
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
        self._prepared: dict[str, _Prepared] = {}
        self._threads = ThreadPoolExecutor(FENCES_AT_ONCE, thread_name_prefix="fence")

    def prepare(self, slot: int) -> None:
        """Connect producers, so that `fence` is quick if it comes within the next seconds."""
        if self._settings.processing_guarantee == "at-least-once":
            return
        for identity in transactional_ids(self._job, slot):
            if identity not in self._prepared and len(self._prepared) < PREPARED_MAX:
                self._prepared[identity] = _Prepared(
                    self._threads.submit(self._connect, self._settings, identity)
                )

    def forget_unused(self) -> None:
        """Let go of producers that were prepared for nothing."""
        if not self._prepared:
            return
        now_s = time.monotonic()
        for identity, prepared in list(self._prepared.items()):
            if now_s - prepared.since_s >= PREPARED_FOR_S and prepared.producers.done():
                del self._prepared[identity]
                self._threads.submit(_connected, prepared)  # destroying them takes a moment
                del prepared

    def fence(self, slot: int) -> None:
        """Begin to fence both ids of the slot."""
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

    def _fence_one(self, identity: str, prepared: _Prepared | None) -> None:
        self._fence_id(self._settings, identity, _connected(prepared))

    def close(self) -> None:
        """Begin no more fences; those under way end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._prepared.clear()


def _connected(prepared: _Prepared | None) -> _Ready:
    """The producers, once they are connected; none if they can't be: the fence tries by itself."""
    if prepared is None or prepared.producers.cancelled():
        return []
    try:
        producers = prepared.producers.result()
    except FclusterError:
        return []
    taken = producers.copy()
    producers.clear()  # the future would keep them alive
    return taken


def _outcome(slot: int, futures: list[Future[None]]) -> SlotFenced | SlotFenceFailed:
    for future in futures:
        if future.cancelled():
            return SlotFenceFailed(slot, "the coordinator is ending")
        error = future.exception()
        if error is not None:
            reason = error.message if isinstance(error, FclusterError) else f"{type(error).__name__}: {error}"
            return SlotFenceFailed(slot, reason)
    return SlotFenced(slot)
