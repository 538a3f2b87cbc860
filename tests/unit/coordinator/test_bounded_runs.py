"""Which end a leader goes by: that of the journal, that of its own option, or none."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from fcluster import Job, Tumbling, count
from fcluster.common.errors import ClusterConflict, IncompatibleState
from fcluster.common.offset_targets import Target
from fcluster.common.settings import Settings
from fcluster.coordinator.bounded_runs import recorded_end
from fcluster.coordinator.core.run_end import RUN_END_KEY, RunEnd
from fcluster.graph.topology import Topology

END = RunEnd("the end", {"in": {0: 10, 1: 20}})
LATEST = Target("latest")


def windowed() -> Topology:
    job = Job("j")
    windows = job.stream(job.topic("in")).window(Tumbling(timedelta(minutes=1)), name="w")
    windows.aggregate(n=count()).to(job.topic("out"))
    return job.build(Settings())


def past(end: RunEnd) -> dict[str, Any]:
    return {RUN_END_KEY: end.document()}


@pytest.mark.parametrize("wanted", [None, LATEST])
@pytest.mark.parametrize("takes_over", [False, True])
def test_run_that_is_under_way_keeps_its_end(wanted: Target | None, takes_over: bool) -> None:
    assert recorded_end(past(END), windowed(), wanted, takes_over=takes_over) == END


def test_another_end_is_refused_while_a_run_is_under_way() -> None:
    for wanted in (Target("time", 5), Target("offsets", offsets={("in", 0): 9, ("in", 1): 20})):
        with pytest.raises(ClusterConflict, match="another end"):
            recorded_end(past(END), windowed(), wanted, takes_over=False)
        assert recorded_end(past(END), windowed(), wanted, takes_over=True) == END


def test_same_offsets_are_the_same_end() -> None:
    wanted = Target("offsets", offsets={("in", 0): 10, ("in", 1): 20})
    end = RunEnd(str(wanted), END.offsets)
    assert recorded_end(past(end), windowed(), wanted, takes_over=False) == end


def test_process_that_takes_over_begins_no_bounded_run() -> None:
    assert recorded_end({}, windowed(), LATEST, takes_over=True) is None


@pytest.mark.parametrize("wanted", [None, LATEST])
def test_job_whose_event_time_has_ended_does_not_start_again(wanted: Target | None) -> None:
    with pytest.raises(IncompatibleState, match="has come to its end") as caught:
        recorded_end(past(END.over()), windowed(), wanted, takes_over=False)
    assert "fcluster reset" in caught.value.remedy


def test_end_is_read_back_from_the_journal_as_it_was_written() -> None:
    end = END.with_topic("between", {0: 7}).with_topic("in", {0: 99})
    assert end.offsets == {"between": {0: 7}, "in": {0: 10, 1: 20}}, "what is known stays"
    assert RunEnd.of_document(end.over().document()) == end.over()
