"""Records that end workers are found; workers that are killed from outside blame no record."""

from __future__ import annotations

from typing import Any

import pytest

from fcluster.common.ids import ShardId
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.losses import ANNOUNCED_FROM_TIMES, Losses
from fcluster.coordinator.core.model import Deaths
from fcluster.coordinator.core.outbox import Outbox
from fcluster.coordinator.core.progress import Progress
from fcluster.wire import messages
from tests.unit.coordinator.coordinator_harness import FakeWorker, Harness, shard, status

HELD = shard(0)
RECORD = "record in/0 at offset 5"


class Job:
    """A job of one worker at a time: each one comes after the one before has died."""

    def __init__(self) -> None:
        self.harness = Harness(workers=1)
        self.lives = 0
        self.worker = self.come()

    def come(self, committed: int = 0) -> FakeWorker:
        self.worker = FakeWorker(self.harness, f"w{self.lives}", slot=0)
        self.lives += 1
        self.worker.hello()
        statuses = [status(held, committed, committed) for held in self.worker.assigned]
        self.harness.say(self.worker.peer, messages.ShardsRunning(self.worker.session, statuses))
        return self.worker

    def die(self, times: int = 1, committed: int = 0) -> Job:
        for _ in range(times):
            self.worker.process_ends()
            self.worker.disconnect()
            self.harness.pass_ms(1_000)
            self.come(committed)
        return self

    def begin(self, offset: int = 5, step: str = "h", held: ShardId = HELD) -> Job:
        record = RECORD.replace("5", str(offset))
        self.harness.say(
            self.worker.peer, messages.RecordBegun(self.worker.session, held, offset, step, record)
        )
        return self

    def end_record(self) -> Job:
        self.harness.say(self.worker.peer, messages.RecordEnded(self.worker.session))
        return self

    def commit(self, offset: int) -> Job:
        self.worker.committed(0, False, status(HELD, offset, offset))
        return self

    @property
    def suspects(self) -> list[messages.SuspectRecord]:
        """What the present worker was told about the shard."""
        (assign,) = (
            message
            for message in self.harness.messages_to(self.worker.peer, messages.Assign)
            if message.session == self.worker.session
        )
        return [suspect for suspect in assign.suspects if suspect.shard == HELD]


def suspect(times: int, offset: int = 5, step: str = "h") -> list[messages.SuspectRecord]:
    return [messages.SuspectRecord(HELD, offset, times, step, RECORD.replace("5", str(offset)))]


@pytest.mark.parametrize(
    ("deaths", "told"), [(1, []), (2, [messages.SuspectRecord(HELD)]), (3, [messages.SuspectRecord(HELD)])]
)
def test_owner_is_told_to_announce_records_after_deaths_with_nothing_committed_in_between(
    deaths: int, told: list[messages.SuspectRecord]
) -> None:
    job = Job().die(deaths)
    assert job.suspects == told
    announced = "nothing was committed in between; the next one announces each record before it processes it"
    said = [line for line in job.harness.log if announced in line]
    assert len(said) >= (deaths >= ANNOUNCED_FROM_TIMES)


def test_announced_record_is_counted_for_each_death_and_named() -> None:
    job = Job().die(2).begin().die()
    assert job.suspects == suspect(1)
    job.begin().die().begin().die()
    assert job.suspects == suspect(3)
    assert f"warning: slot 0 was lost while it processed {RECORD} in 'h', 3 times in a row" in job.harness.log


def test_announcement_is_answered_and_that_of_another_shard_is_not() -> None:
    job = Job().begin()
    job.begin(held=ShardId("in", 77))
    noted = job.harness.messages_to(job.worker.peer, messages.RecordNoted)
    assert noted == [messages.RecordNoted(1, job.worker.session, HELD, 5)]


def test_step_that_began_last_is_the_one() -> None:
    job = Job().begin(step="").begin(step="first").begin(step="second").die(2)
    assert job.suspects == suspect(1, step="second")


def test_death_after_the_record_is_not_its_doing() -> None:
    job = Job().die(2).begin().end_record().die()
    assert job.suspects == [messages.SuspectRecord(HELD)]


def test_another_record_is_counted_from_the_start() -> None:
    job = Job().die(2).begin().die().begin(offset=6).die()
    assert job.suspects == suspect(1, offset=6)


def test_death_outside_of_records_keeps_what_is_known() -> None:
    job = Job().die(2).begin().die().die()
    assert job.suspects == suspect(1)


@pytest.mark.parametrize(("committed", "told"), [(5, suspect(1)), (6, [])])
def test_record_that_was_committed_is_not_suspect(committed: int, told: list[messages.SuspectRecord]) -> None:
    job = Job().die(2).begin().die().commit(committed)
    job.die(committed=committed)
    assert job.suspects == told


def test_record_is_known_after_one_death_where_good_ones_before_it_were_committed_meanwhile() -> None:
    job = Job().die(2).commit(2).begin().die(committed=2)
    assert job.suspects == suspect(1)


def test_commit_in_between_begins_the_count_anew() -> None:
    job = Job().die().commit(1).die(committed=1)
    assert job.suspects == []


def test_commit_that_only_the_next_owner_reports_counts_as_well() -> None:
    job = Job().die(committed=1).die(committed=1)
    assert job.suspects == []


def test_worker_that_begins_anew_has_not_died() -> None:
    job = Job()
    for _ in range(5):
        job.worker.hello()
        job.worker.running()
    assert job.harness.core._cluster.deaths == {}


def test_worker_that_leaves_has_not_died() -> None:
    job = Job()
    job.worker.goodbye()
    assert job.harness.core._cluster.deaths == {}


def test_silent_worker_counts_as_lost() -> None:
    job = Job().die(2).begin()
    job.harness.pass_ms(job.harness.settings.session_timeout_ms + 1_000)
    job.come()
    assert job.suspects == suspect(1)


def test_record_that_hangs_is_counted_as_such_and_not_twice() -> None:
    job = Job().die(2).begin()
    job.harness.say(
        job.worker.peer, messages.RecordOverdue(job.worker.session, HELD, 5, "it takes too long", "h")
    )
    job.die()
    assert job.suspects == [messages.SuspectRecord(HELD)]


def test_other_shards_of_the_worker_are_not_blamed() -> None:
    job = Job().die(2).begin().die()
    others: list[Any] = [known for held, known in job.harness.core._cluster.deaths.items() if held != HELD]
    assert [known.suspect for known in others] == [None] * 3


# --- shards with several inputs -------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "known"), [(0, True), (1, False)])
def test_only_a_commit_in_its_input_clears_a_record(number: int, known: bool) -> None:
    cluster = Cluster(Harness(workers=1).core.terms, 0)
    losses = Losses(cluster, Outbox(), Progress(cluster.terms.topology, cluster.shards, False))
    found = messages.SuspectRecord(HELD, 5, 2, "h", RECORD, input=1)
    cluster.deaths[HELD] = Deaths({0: 0, 1: 0}, 3, found)
    losses.committed(messages.ShardStatus(HELD, 50, 50, 60, False, 1, number))
    assert (HELD in cluster.deaths) == known
