"""What status says about event time, given what workers report."""

from __future__ import annotations

from typing import Any

from fcluster import Job, Watermark
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.coordinator.core.event_times import describe_event_times
from fcluster.coordinator.core.progress import Progress
from fcluster.graph.topology import Topology
from fcluster.wire.messages import ShardStatus, TimeStatus


def topology(*watermarks: Watermark) -> Topology:
    job = Job("j")
    a, b = job.topic("a", watermark=watermarks[0] if watermarks else None), job.topic("b")
    job.merge(a, b).process(lambda _ctx, value: value, name="h", to=job.topic("out"))
    return job.build(Settings())


def described(*times: tuple[int, int, TimeStatus]) -> dict[str, Any]:
    """The entry of the only stage, after these reports of a partition and an input."""
    job = topology(Watermark())
    shards = [ShardId("a", number) for number in range(2)]
    progress = Progress(job, shards, until_caught_up=False)
    for partition, number, time in times:
        progress.learn(ShardStatus(ShardId("a", partition), 1, 1, 1, False, 1, number, time))
    (entry,) = describe_event_times(job, shards, progress)
    return entry


def test_job_without_event_time_has_no_entries() -> None:
    job = topology()
    assert describe_event_times(job, [], Progress(job, [], until_caught_up=False)) == []


def test_stage_is_as_far_as_its_slowest_shard_which_waits_for_its_slowest_input() -> None:
    entry = described(
        (0, 0, TimeStatus(500, 500, False)),
        (0, 1, TimeStatus(500, 900, False)),
        (1, 0, TimeStatus(400, 700, False)),
        (1, 1, TimeStatus(400, 400, False, 6, wall_ms=1_000)),
    )
    assert entry["time_ms"] == 400
    assert entry["behind_ms"] == 600
    assert entry["held_back_by"] == {"topic": "b", "partition": 1, "upstream": 6}
    assert entry["idle"] == []


def test_idle_shards_and_inputs_are_named_and_do_not_count() -> None:
    entry = described(
        (0, 0, TimeStatus(500, 500, False)),
        (0, 1, TimeStatus(500, None, True)),
        (1, 0, TimeStatus(100, 100, True)),
        (1, 1, TimeStatus(100, 300, True, -1, 2)),
    )
    assert entry["time_ms"] == 500
    assert entry["behind_ms"] == -1
    assert entry["held_back_by"] == {"topic": "a", "partition": 0, "upstream": -1}
    assert [(one["topic"], one["partition"]) for one in entry["idle"]] == [("b", 0), ("a", 1), ("b", 1)]
    assert entry["idle_upstream"] == 2


def test_topics_of_tables_are_not_waited_for() -> None:
    job = Job("j")
    table = job.table(job.topic("t"))
    job.stream(job.topic("s", watermark=Watermark())).join(table).to(job.topic("out"))
    built = job.build(Settings())
    shards = [ShardId("s", 0)]
    progress = Progress(built, shards, until_caught_up=False)
    progress.learn(ShardStatus(ShardId("s", 0), 1, 1, 1, False, 1, 0, TimeStatus(500, 500, False)))
    progress.learn(ShardStatus(ShardId("s", 0), 1, 1, 1, False, 1, 1, TimeStatus(500, 100, True)))
    (entry,) = describe_event_times(built, shards, progress)
    assert entry["time_ms"] == 500
    assert entry["held_back_by"] == {"topic": "s", "partition": 0, "upstream": -1}
    assert entry["idle"] == []


def test_shard_without_a_report_holds_the_stage_back() -> None:
    entry = described((0, 0, TimeStatus(500, 500, False)), (0, 1, TimeStatus(500, 500, False)))
    assert entry["time_ms"] == -1
    assert entry["held_back_by"]["partition"] == 1


def test_all_idle_holds_nothing_back() -> None:
    entry = described(*((shard, number, TimeStatus(7, 7, True)) for shard in (0, 1) for number in (0, 1)))
    assert (entry["time_ms"], entry["held_back_by"], entry["idle_inputs"]) == (7, None, 4)


def test_timers_of_all_shards_are_added_up_once_all_are_known() -> None:
    first = [(0, number, TimeStatus(7, 7, False, timers=5)) for number in (0, 1)]
    assert described(*first)["timers"] == -1
    second = [(1, number, TimeStatus(7, 7, False, timers=6)) for number in (0, 1)]
    assert described(*first, *second)["timers"] == 11


def test_commit_keeps_the_event_time_of_the_last_heartbeat() -> None:
    job, shard = topology(Watermark()), ShardId("a", 0)
    progress = Progress(job, [shard], until_caught_up=False)
    time = TimeStatus(500, 500, False)
    progress.learn(ShardStatus(shard, 1, 1, 1, False, 1, 0, time))
    progress.learn_commit(ShardStatus(shard, 2, 2, 2, False, 2, 0))
    standing = progress.standing(shard)
    assert standing is not None
    assert standing.time == time


def test_shards_that_wait_for_others_are_named_farthest_first() -> None:
    entry = described(
        (0, 0, TimeStatus(500, 500, False, ahead_ms=0, ahead_of="c/1")),
        (0, 1, TimeStatus(500, 500, False, ahead_ms=0, ahead_of="c/1")),
        (1, 0, TimeStatus(900, 900, False, ahead_ms=400, ahead_of="c/0")),
        (1, 1, TimeStatus(900, 900, False, ahead_ms=400, ahead_of="c/0")),
    )
    assert entry["ahead"] == [
        {"topic": "a", "partition": 1, "ahead_ms": 400, "ahead_of": "c/0"},
        {"topic": "a", "partition": 0, "ahead_ms": 0, "ahead_of": "c/1"},
    ]
    assert entry["ahead_inputs"] == 2
