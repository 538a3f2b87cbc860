"""Where the time of an epoch goes."""

from __future__ import annotations

from fcluster.wire.messages import PhaseTimes
from fcluster.worker.epoch_trace import PHASES, TRACES_KEPT, EpochTrace, EpochTraces


def trace(**took_ms: float) -> EpochTrace:
    made = EpochTrace(0.0)
    made.took_ms = took_ms
    return made


def test_phase_lasts_from_the_end_of_the_one_before() -> None:
    made = EpochTrace(0.0)
    made.ended("open")
    made.ended("freeze")
    assert made.took_ms["open"] > made.took_ms["freeze"] >= 0, "the clock began long ago"


def test_figures_are_those_of_the_newest_epochs_in_the_order_of_the_phases() -> None:
    traces = EpochTraces()
    traces.add(trace(open=1000.0, commit=1000.0))
    for number in range(TRACES_KEPT):
        traces.add(trace(commit=float(number), open=2.0))
    assert traces.figures() == [PhaseTimes("open", 2.0, 2.0), PhaseTimes("commit", 250.0, 495.0)]


def test_figures_are_computed_once_a_second() -> None:
    """The main thread asks after each batch of records."""
    now_s = [0.0]
    traces = EpochTraces(lambda: now_s[0])
    assert traces.figures() == []
    traces.add(trace(open=2.0))
    now_s[0] = 0.9
    assert traces.figures() == []
    now_s[0] = 1.0
    assert traces.figures() == [PhaseTimes("open", 2.0, 2.0)]


def test_slow_epoch_tells_its_longest_phases_first() -> None:
    slow = trace(open=9000.0, freeze=1.0, offsets=1500.0, flush=2100.0, commit=299.0)
    assert slow.slowness() == "3.9 s: flush 2.1 s, offsets 1.5 s"
    assert trace(open=9000.0, offsets=1500.0).slowness() == ""


def test_each_phase_says_what_it_is() -> None:
    assert all(PHASES.values())
