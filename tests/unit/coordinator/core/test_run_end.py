"""Bounded runs in the coordinator's core: what workers are told, what is journalled, and when it is over."""

from __future__ import annotations

from datetime import timedelta

import msgspec

from fcluster import Job, Tumbling, count
from fcluster.common.exit_codes import ExitCode
from fcluster.common.settings import Settings
from fcluster.coordinator.core import events
from fcluster.coordinator.core.model import Phase
from fcluster.coordinator.core.run_end import RUN_END_KEY, RunEnd
from fcluster.graph.topology import Topology
from fcluster.wire import messages
from fcluster.wire.messages import EndOffset, ShardStatus, TimeStatus
from tests.unit.coordinator.coordinator_harness import (
    FakeWorker,
    Harness,
    as_in_kafka,
    merged_stages,
    one_stage,
    shard,
    status,
    two_stages,
)


def bounded(topology: Topology, partitions: dict[str, int], **ends: dict[int, int]) -> Harness:
    end = RunEnd("the end", ends)
    journal = {RUN_END_KEY: end.document()}
    return Harness(topology=topology, partitions=partitions, workers=1, run_end=end, journal=journal)


def joined(harness: Harness) -> FakeWorker:
    worker = FakeWorker(harness, "w0")
    worker.hello()
    worker.running()
    return worker


def ended(one: ShardStatus, *, is_ended: bool = True) -> ShardStatus:
    return msgspec.structs.replace(one, time=TimeStatus(1, 1, False, ended=is_ended))


def test_workers_are_told_the_ends_with_their_shards() -> None:
    harness = bounded(one_stage(), {"in": 2}, **{"in": {0: 10, 1: 0}})
    worker = joined(harness)
    assert harness.unread == [], "the ends are known already"
    (assign,) = harness.messages_to(worker.peer, messages.Assign)
    assert assign.ends == [EndOffset(shard(0), 10), EndOffset(shard(1), 0)]


def test_partition_that_was_added_later_has_no_record_of_the_run() -> None:
    harness = bounded(one_stage(), {"in": 2}, **{"in": {0: 10}})
    worker = joined(harness)
    (assign,) = harness.messages_to(worker.peer, messages.Assign)
    assert assign.ends == [EndOffset(shard(0), 10), EndOffset(shard(1), 0)]


def test_run_is_over_when_the_last_record_before_the_end_is_committed() -> None:
    harness = bounded(one_stage(), {"in": 2}, **{"in": {0: 10, 1: 5}})
    worker = joined(harness)
    worker.heartbeat(status(shard(0), 10, 10), status(shard(1), 5, 4, dirty=True))
    assert harness.core.phase is Phase.RUNNING
    assert harness.core.run_end is not None
    assert not harness.core.run_end.is_over
    worker.heartbeat(status(shard(1), 5, 5))
    assert harness.core.phase is Phase.DRAINING
    assert harness.core.run_end.is_over
    worker.drained()
    assert harness.stopped is not None
    assert harness.stopped.exit_code == ExitCode.DONE
    assert "the run has come to its end (the end)" in harness.stopped.reason


def test_behind_a_repartition_the_end_is_that_of_what_upstream_has_written() -> None:
    harness = bounded(two_stages(), {"in": 1, "job-b-repartition": 1}, **{"in": {0: 10}})
    worker = joined(harness)
    assert harness.unread == []
    worker.heartbeat(status(shard(0), 10, 10))
    assert harness.unread == ["b"]
    written = dict(harness.journal)
    harness.feed(events.EndOffsetsRead("b", {0: 30}))
    assert harness.journal[RUN_END_KEY] == written[RUN_END_KEY], "nobody else writes there"
    worker.heartbeat(status(shard(0, "b"), 29, 29))
    assert harness.core.phase is Phase.RUNNING
    worker.heartbeat(status(shard(0, "b"), 30, 30))
    assert harness.core.phase is Phase.DRAINING


def windowed() -> Topology:
    job = Job("job")
    minutes = Tumbling(timedelta(minutes=1))
    per_key = job.stream(job.topic("in")).window(minutes, name="w").aggregate(n=count())
    per_key.through(job.topic("between")).to(job.topic("out"))
    return job.build(Settings())


def test_stage_with_event_time_is_done_only_when_its_event_time_has_ended() -> None:
    harness = bounded(windowed(), {"in": 1, "between": 1}, **{"in": {0: 10}})
    worker = joined(harness)
    worker.heartbeat(ended(status(shard(0), 10, 10), is_ended=False))
    worker.committed(1, False, status(shard(0), 10, 10))
    assert harness.unread == []
    worker.heartbeat(ended(status(shard(0), 10, 10)))
    assert harness.unread == ["between"]


def test_end_of_a_topic_that_the_job_also_writes_is_journalled_before_workers_are_told() -> None:
    harness = bounded(windowed(), {"in": 1, "between": 1}, **{"in": {0: 10}})
    worker = joined(harness)
    (assign,) = harness.messages_to(worker.peer, messages.Assign)
    assert assign.ends == [EndOffset(shard(0), 10)]
    worker.heartbeat(ended(status(shard(0), 10, 10)))
    harness.auto_journal = False
    harness.feed(events.EndOffsetsRead("between", {0: 30}))
    worker.heartbeat()
    assert harness.messages_to(worker.peer, messages.HeartbeatAck)[-1].ends == []
    harness.write_journal()
    worker.heartbeat()
    acks = harness.messages_to(worker.peer, messages.HeartbeatAck)
    assert acks[-1].ends == [EndOffset(shard(0, "between"), 30)]
    worker.heartbeat(ended(status(shard(0, "between"), 30, 30)))
    assert harness.core.phase is Phase.DRAINING


def test_next_leader_keeps_the_ends_and_reads_none_again() -> None:
    harness = bounded(windowed(), {"in": 1, "between": 1}, **{"in": {0: 10}})
    worker = joined(harness)
    worker.heartbeat(ended(status(shard(0), 10, 10)))
    harness.feed(events.EndOffsetsRead("between", {0: 30}))
    harness.journal = as_in_kafka(harness.journal)
    harness.run_end = RunEnd.of_document(harness.journal[RUN_END_KEY])
    harness.lead()
    again = FakeWorker(harness, "w0")
    again.hello(session=worker.session, owned=worker.assigned, slot=worker.slot)
    again.running(worker.assigned)
    again.heartbeat(ended(status(shard(0), 10, 10)), status(shard(0, "between"), 20, 20))
    assert harness.unread == []
    assert harness.messages_to(again.peer, messages.HeartbeatAck)[-1].ends == [
        EndOffset(shard(0, "between"), 30)
    ]
    again.heartbeat(ended(status(shard(0, "between"), 30, 30)))
    assert harness.core.phase is Phase.DRAINING


def test_end_of_a_merged_input_is_told_with_its_number() -> None:
    partitions = {"in": 1, "more": 1, "job-more-b-repartition": 1}
    harness = bounded(merged_stages(), partitions, **{"in": {0: 10}, "more": {0: 20}})
    worker = joined(harness)
    (assign,) = harness.messages_to(worker.peer, messages.Assign)
    assert assign.ends == [EndOffset(shard(0), 10), EndOffset(shard(0, "more"), 20)]
    worker.heartbeat(status(shard(0, "more"), 20, 20), status(shard(0), 10, 10))
    harness.feed(events.EndOffsetsRead("more", {0: 7}, 1))
    assert harness.core.phase is Phase.RUNNING
    worker.heartbeat(status(shard(0, "more"), 7, 7, number=1))
    assert harness.core.phase is Phase.DRAINING


def test_status_says_how_far_the_run_is() -> None:
    harness = bounded(one_stage(), {"in": 2}, **{"in": {0: 10, 1: 5}})
    worker = joined(harness)
    worker.heartbeat(status(shard(0), 10, 10), status(shard(1), 2, 2))
    harness.say(b"admin", messages.StatusRequest())
    (reply,) = harness.messages_to(b"admin", messages.StatusReply)
    document = msgspec.msgpack.decode(reply.status)
    assert document["run_end"] == {"end": "the end", "inputs": 2, "inputs_left": 1, "records_left": 3}


def test_job_that_is_stopped_before_its_end_is_not_over() -> None:
    harness = bounded(one_stage(), {"in": 1}, **{"in": {0: 10}})
    worker = joined(harness)
    harness.feed(events.StopRequested())
    worker.drained()
    assert harness.stopped is not None
    assert harness.core.run_end is not None
    assert not harness.core.run_end.is_over
