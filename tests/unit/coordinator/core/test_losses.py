"""Records that end workers are found. If workers are killed from outside, no record is blamed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fcluster.common.ids import ShardId
from fcluster.coordinator.core import events
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.coordinator import Coordinator
from fcluster.coordinator.core.losses import ANNOUNCED_FROM_TIMES, Losses
from fcluster.coordinator.core.model import Deaths
from fcluster.coordinator.core.outbox import LOSS_PREFIXES, Outbox
from fcluster.coordinator.core.progress import Progress
from fcluster.wire import messages
from tests.unit.coordinator.coordinator_harness import FakeWorker, Harness, as_in_kafka, shard, status

HELD = shard(0)
RECORD = "record in/0 at offset 5"


class Job:
    """A job with one worker at a time. After each death, the next one joins."""

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
            self.between()
            self.come(committed)
        return self

    def between(self) -> None:
        """What happens before the next worker joins."""

    def begin(self, offset: int = 5, step: str = "h", held: ShardId = HELD, span: int = 1) -> Job:
        record = RECORD.replace("5", str(offset))
        self.harness.say(
            self.worker.peer,
            messages.RecordBegun(self.worker.session, held, offset, step, record, span=span),
        )
        return self

    def end_record(self) -> Job:
        self.harness.say(self.worker.peer, messages.RecordEnded(self.worker.session))
        return self

    def commit(self, offset: int) -> Job:
        self.worker.committed(0, False, status(HELD, offset, offset))
        return self

    def hang(self, step: str = "h", reason: str = "it takes too long", offset: int = 5) -> Job:
        session = self.worker.session
        self.harness.say(self.worker.peer, messages.RecordOverdue(session, HELD, offset, reason, step))
        return self

    @property
    def assign(self) -> messages.Assign:
        """The last Assign to the present worker."""
        (assign,) = (
            message
            for message in self.harness.messages_to(self.worker.peer, messages.Assign)
            if message.session == self.worker.session
        )
        return assign

    @property
    def suspects(self) -> list[messages.SuspectRecord]:
        """What the present worker was told about suspect records of the shard."""
        return [suspect for suspect in self.assign.suspects if suspect.shard == HELD]


def suspect(times: int, offset: int = 5, step: str = "h") -> list[messages.SuspectRecord]:
    return [messages.SuspectRecord(HELD, offset, times, step, RECORD.replace("5", str(offset)))]


@pytest.mark.parametrize(
    ("deaths", "told"), [(1, []), (2, [messages.SuspectRecord(HELD)]), (3, [messages.SuspectRecord(HELD)])]
)
def test_owner_has_to_announce_records_after_deaths_without_a_commit_in_between(
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


def test_only_announcements_of_own_shards_are_answered() -> None:
    job = Job().begin()
    job.begin(held=ShardId("in", 77))
    noted = job.harness.messages_to(job.worker.peer, messages.RecordNoted)
    assert noted == [messages.RecordNoted(1, job.worker.session, HELD, 5)]


def test_last_announced_step_is_blamed() -> None:
    job = Job().begin(step="").begin(step="first").begin(step="second").die(2)
    assert job.suspects == suspect(1, step="second")


GROUP = [messages.SuspectRecord(HELD, 50, 0, "", RECORD.replace("5", "50"), span=50)]


def test_records_of_the_group_in_which_a_session_was_lost_are_announced_one_by_one() -> None:
    job = Job().die(2).begin(offset=50, step="", span=50).die()
    assert job.suspects == GROUP
    assert any("one of 50 records" in line for line in job.harness.log)
    assert job.die().suspects == GROUP, "it was lost before it came to the group"
    assert job.begin(offset=70).die().suspects == suspect(1, offset=70)
    assert job.begin(offset=70).die().begin(offset=70).die().suspects == suspect(3, offset=70)


@pytest.mark.parametrize(("committed", "told"), [(50, GROUP), (99, GROUP), (100, [])])
def test_group_is_suspect_until_all_of_it_is_committed(
    committed: int, told: list[messages.SuspectRecord]
) -> None:
    job = Job().die(2).begin(offset=50, step="", span=50).die()
    job.commit(committed)
    assert job.die(committed=committed).suspects == told


def test_group_that_was_committed_is_not_suspect() -> None:
    job = Job().die(2).begin(offset=50, step="", span=50)
    job.commit(100)
    assert job.die(committed=100).suspects == []


def test_group_begins_behind_what_was_committed_of_it() -> None:
    job = Job().die(2).begin(offset=50, step="", span=50)
    job.commit(80)
    (group,) = job.die(committed=80).suspects
    assert (group.offset, group.span, group.times) == (80, 20, 0)


def test_condemned_records_are_remembered_behind_which_a_group_is_suspect() -> None:
    job = Job().die(2)
    for _ in range(3):
        job.begin().die()
    job.die(2).begin(offset=50, step="", span=50).die()
    assert job.suspects == [*suspect(3), *GROUP]


def test_record_is_not_blamed_for_a_death_after_it() -> None:
    job = Job().die(2).begin().end_record().die()
    assert job.suspects == [messages.SuspectRecord(HELD)]


def test_another_record_is_counted_from_one() -> None:
    job = Job().die(2).begin().die().begin(offset=6).die()
    assert job.suspects == suspect(1, offset=6)


def test_death_outside_of_records_keeps_the_suspects() -> None:
    job = Job().die(2).begin().die().die()
    assert job.suspects == suspect(1)


@pytest.mark.parametrize(("committed", "told"), [(5, suspect(1)), (6, [])])
def test_record_that_was_committed_is_not_suspect(committed: int, told: list[messages.SuspectRecord]) -> None:
    job = Job().die(2).begin().die().commit(committed)
    job.die(committed=committed)
    assert job.suspects == told


def test_record_is_known_after_one_death_although_earlier_ones_were_committed_since() -> None:
    job = Job().die(2).commit(2).begin().die(committed=2)
    assert job.suspects == suspect(1)


def test_commit_in_between_restarts_the_count() -> None:
    job = Job().die().commit(1).die(committed=1)
    assert job.suspects == []


def test_commit_that_only_the_next_owner_reports_counts_as_well() -> None:
    job = Job().die(committed=1).die(committed=1)
    assert job.suspects == []


def test_worker_that_joins_again_does_not_count_as_dead() -> None:
    job = Job()
    for _ in range(5):
        job.worker.hello()
        job.worker.running()
    assert job.harness.core._cluster.deaths == {}


def test_worker_that_leaves_does_not_count_as_dead() -> None:
    job = Job()
    job.worker.goodbye()
    assert job.harness.core._cluster.deaths == {}


def test_silent_worker_counts_as_lost() -> None:
    job = Job().die(2).begin()
    job.harness.pass_ms(job.harness.settings.session_timeout_ms + 1_000)
    job.come()
    assert job.suspects == suspect(1)


def test_record_that_hangs_is_counted_as_hanging_and_not_twice() -> None:
    job = Job().die(2).begin().hang().die()
    assert job.suspects == [messages.SuspectRecord(HELD)]


def test_other_shards_of_the_worker_are_not_blamed() -> None:
    job = Job().die(2).begin().die()
    others: list[Any] = [known for held, known in job.harness.core._cluster.deaths.items() if held != HELD]
    assert [known.suspects for known in others] == [()] * 3


# --- several in a row -----------------------------------------------------------------------------------

TIMER, ANOTHER = "timer 'remind' of the handler 'h' for b'a'", "timer 'remind' of the handler 'h' for b'b'"


def test_lethal_record_after_a_known_one_is_found_as_well() -> None:
    job = Job().die(2)
    for _ in range(3):
        job.begin().die()
    assert job.suspects == suspect(3)
    job.die(2)  # the record after it ends workers before anything can be committed
    assert job.suspects == [*suspect(3), messages.SuspectRecord(HELD)]
    for times in (1, 2, 3):
        job.begin(offset=6).die()
        assert job.suspects == [*suspect(3), *suspect(times, offset=6)]
    job.commit(6).die(committed=6)
    assert job.suspects == suspect(3, offset=6)
    job.commit(7).die(committed=7)
    assert job.suspects == []


def test_timers_at_one_record_are_distinguished() -> None:
    job = Job().die(2).begin(step=TIMER).die().begin(step=TIMER).die()
    assert job.suspects == suspect(2, step=TIMER)
    job.begin(step=ANOTHER).die()
    assert job.suspects == suspect(1, step=ANOTHER), "the first timer isn't to blame"
    for times in (2, 3):
        job.begin(step=ANOTHER, offset=6).die()  # counted together, at the record before or after the timer
        assert job.suspects == suspect(times, step=ANOTHER, offset=6)


def test_hangs_at_several_records_are_known_until_the_records_are_committed() -> None:
    job = Job()
    for offset, step in ((5, "h"), (6, TIMER), (6, ANOTHER), (6, "h")):
        job.hang(step, offset=offset).die().hang(step, offset=offset).die()
    known = [(one.offset, one.step, one.times) for one in job.assign.overdue]
    assert known == [(5, "h", 2), (6, TIMER, 2), (6, ANOTHER, 2), (6, "h", 2)]
    job.commit(6).die(committed=6)
    assert [(one.offset, one.step) for one in job.assign.overdue] == [(6, TIMER), (6, ANOTHER), (6, "h")]


def test_number_of_suspect_records_of_a_shard_is_bounded() -> None:
    job = Job()
    for offset in range(20):
        job.hang(offset=offset).hang(offset=offset)
    job.die()
    assert [one.offset for one in job.assign.overdue] == list(range(10, 20))


# --- a new leader ---------------------------------------------------------------------------------------


class NewLeaders(Job):
    """A job whose leader dies after each worker's death."""

    def between(self) -> None:
        self.harness.journal = as_in_kafka(self.harness.journal)
        self.harness.lead()


def test_deaths_are_counted_across_leaders() -> None:
    job = NewLeaders().die(2)
    assert job.suspects == [messages.SuspectRecord(HELD)]
    job.begin().die()
    assert job.suspects == suspect(1)
    job.begin().die().begin().die()
    assert job.suspects == suspect(3)


def test_what_was_committed_under_an_earlier_leader_is_not_suspect() -> None:
    job = NewLeaders().die(2).begin().die().commit(6)
    assert not any(key.startswith(f"deaths/{HELD.stage}/{HELD.partition}") for key in job.harness.journal)
    assert job.die(committed=6).suspects == []


def test_records_that_hang_are_counted_across_leaders() -> None:
    job: Job = NewLeaders()
    for times in (1, 2):
        job.hang().die()
        assert job.assign.overdue == [messages.OverdueRecord(HELD, 5, times, "it takes too long", "h")]
    job.commit(6).die(committed=6)
    assert job.assign.overdue == []


def test_longest_texts_take_little_space_in_the_journal() -> None:
    text = "\x00" * 1_000  # six bytes each in JSON
    job = Job()
    for _ in range(3):
        begun = messages.RecordBegun(job.worker.session, HELD, 5, text, text)
        job.harness.say(job.worker.peer, begun)
        job.die()
    job.hang(text, text * (messages.REASON_CHARACTERS_MAX // len(text)))
    entries = {key: value for key, value in job.harness.journal.items() if key.startswith(LOSS_PREFIXES)}
    assert {key.partition("/")[0] for key in entries} == {"deaths", "overdue"}
    assert len(msgspec.json.encode(entries)) < 100_000


def test_restarted_job_counts_from_zero() -> None:
    job = Job().die(2).begin().die(3).hang()
    job.harness.feed(events.StopRequested())
    assert not [key for key in job.harness.journal if key.startswith(LOSS_PREFIXES)]


def test_leader_recovers_from_a_journal_without_counts_or_with_unreadable_ones() -> None:
    job = NewLeaders().die(2)
    counted = {key for key in job.harness.journal if key.startswith(LOSS_PREFIXES)}
    assert counted
    for change in ({}, {key: {"of": "a later version"} for key in counted}, {"deaths/gone/7": {"times": 3}}):
        kept = {key: value for key, value in job.harness.journal.items() if key not in counted}
        leader = Coordinator.recover(kept | change, job.harness.core.terms, job.harness.now_ms)
        assert leader._cluster.deaths == {}


# --- shards with several inputs -------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "known"), [(0, True), (1, False)])
def test_only_a_commit_in_its_input_clears_a_record(number: int, known: bool) -> None:
    cluster = Cluster(Harness(workers=1).core.terms, 0)
    losses = Losses(cluster, Outbox(), Progress(cluster.terms.topology, cluster.shards, False))
    found = messages.SuspectRecord(HELD, 5, 2, "h", RECORD, input=1)
    cluster.deaths[HELD] = Deaths({0: 0, 1: 0}, 3, (found,))
    losses.committed(messages.ShardStatus(HELD, 50, 50, 60, False, 1, number))
    assert (HELD in cluster.deaths) == known
