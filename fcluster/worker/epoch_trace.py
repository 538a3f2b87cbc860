"""Where the time of an epoch goes: a stopwatch that travels with it, and the figures of the newest epochs.

Responsible for: the names of the phases, in their order, and their figures. Must not know what happens in a
phase. An epoch's trace belongs to the thread to which the epoch belongs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from fcluster.wire.messages import PhaseTimes

PHASES: Final[dict[str, str]] = {
    "open": "from the first record to the barrier",
    "freeze": "what has changed is collected, in the main thread",
    "encode": "deltas are encoded, once the commit thread is free",
    "deltas": "deltas are handed to the client",
    "offsets": "the group's coordinator takes the offsets into the transaction",
    "outputs": "outputs that aren't acknowledged yet",
    "flush": "deltas that aren't acknowledged yet",
    "sources": "the check that no source was replaced, if one is due",
    "declare": "the coordinator waits for the other workers, and declares the epoch complete",
    "commit": "the transactions' coordinator decides the commit",
    "apply": "changes become committed state, and now and then go to the local store",
}
TRACES_KEPT: Final = 500
SLOW_MS: Final = 3_000.0
"""An epoch that takes longer than this after its barrier is worth a line in the log."""
FIGURES_INTERVAL_S: Final = 1.0


class EpochTrace:
    """The phases of one epoch.

    Args:
        begun_s: when it began, on a monotonic clock.

    Attributes:
        took_ms: how long each phase took so far.
    """

    __slots__ = ("_since_s", "took_ms")

    def __init__(self, begun_s: float) -> None:
        self._since_s = begun_s
        self.took_ms: dict[str, float] = {}

    def ended(self, phase: str) -> None:
        """The phase ends now, and the next one begins."""
        now_s = time.monotonic()
        self.took_ms[phase] = (now_s - self._since_s) * 1000
        self._since_s = now_s

    def slowness(self) -> str:
        """Where the time went, if the epoch took long after its barrier. Otherwise empty."""
        after_ms = {phase: took_ms for phase, took_ms in self.took_ms.items() if phase != "open"}
        total_ms = sum(after_ms.values())
        if total_ms < SLOW_MS:
            return ""
        longest = sorted(after_ms.items(), key=lambda item: -item[1])
        parts = [f"{phase} {took_ms / 1000:.1f} s" for phase, took_ms in longest if took_ms >= SLOW_MS / 10]
        return f"{total_ms / 1000:.1f} s: {', '.join(parts)}"


class EpochTraces:
    """The newest traces.

    Args:
        clock_s: returns the time on a clock that never goes back.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._traces: deque[EpochTrace] = deque(maxlen=TRACES_KEPT)
        self._clock_s = clock_s
        self._figures: list[PhaseTimes] = []
        self._figures_s = float("-inf")

    def add(self, trace: EpochTrace) -> None:
        """The epoch is committed and applied. May be called from any thread."""
        self._traces.append(trace)

    def figures(self) -> list[PhaseTimes]:
        """Median and 99th percentile of each phase. They are computed once a second at most."""
        now_s = self._clock_s()
        if now_s - self._figures_s >= FIGURES_INTERVAL_S:
            self._figures_s = now_s
            self._figures = list(_figures(tuple(self._traces)))
        return self._figures


def _figures(traces: Sequence[EpochTrace]) -> Iterable[PhaseTimes]:
    for phase in PHASES:
        took_ms = sorted(trace.took_ms[phase] for trace in traces if phase in trace.took_ms)
        if took_ms:
            yield PhaseTimes(phase, quantile(took_ms, 0.5), quantile(took_ms, 0.99))


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """The value below which this fraction of the ordered values is. 0 if there are none."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * fraction))] if ordered else 0.0
