"""Joins of two streams: which records are pairs, what stays alone, what is late, and what is left of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Codec, Job, Tumbling, Watermark, count
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.engine.state import store_prefix
from fcluster.graph.codecs import decode_json, encode_json
from fcluster.testing import Driver, JobStopped
from tests.unit.graph.test_compatibility import built, change

MS = timedelta(milliseconds=1)
Written = tuple[str, Any, int]
"""Key, value and timestamp."""


def both(left: Any, right: Any) -> list[Any]:
    return [left, right]


def failing(left: Any, right: Any) -> list[Any]:
    if "bad" in (left, right):
        raise ValueError("no good")
    return [left, right]


def joined_job(how: Any = "inner", with_: Any = both, *, within: Any = 10 * MS, **options: Any) -> Job:
    """The streams "l" and "r", joined; results go to "out"."""
    job = Job("j")
    late = job.topic("late")
    if options.pop("late", False):
        options["late"] = late
    if options.get("on_error") == "dead":
        options["on_error"] = job.topic("dead", value="bytes")
    right = job.stream(job.topic("r"))
    left = job.stream(job.topic("l"))
    left.join(right, with_, within=within, name="pairs", how=how, **options).to(job.topic("out"))
    return job


def written(driver: Driver, topic: str = "out") -> list[Written]:
    return [(record.key, record.value, record.timestamp) for record in driver.read(topic)]


def send(driver: Driver, *records: tuple[str, Any, int], key: str | None = "k") -> list[Written]:
    """Send these records (side, value, timestamp); what is written then."""
    for topic, value, at_ms in records:
        driver.send(topic, value, key=key, timestamp=at_ms, partition=0)
    return written(driver)


# --- pairs -----------------------------------------------------------------------------------------------


def test_pairs_are_records_of_a_key_that_are_not_too_far_apart() -> None:
    with Driver(joined_job(), partitions=1) as driver:
        assert send(driver, ("l", "A", 20)) == []
        assert send(driver, ("r", "a", 9), ("r", "b", 10)) == [("k", ["A", "b"], 20)]
        assert send(driver, ("r", "c", 30), ("r", "d", 31)) == [("k", ["A", "c"], 30)]
        assert send(driver, ("l", "B", 25)) == [("k", ["B", "c"], 30), ("k", ["B", "d"], 31)]
        assert send(driver, ("l", "C", 25), key="other") == []


def test_interval_may_be_longer_on_one_side() -> None:
    with Driver(joined_job(within=(0 * MS, 5 * MS), grace=100 * MS), partitions=1) as driver:
        send(driver, ("l", "A", 20))
        assert send(driver, ("r", "a", 19), ("r", "b", 20), ("r", "c", 25), ("r", "d", 26)) == [
            ("k", ["A", "b"], 20),
            ("k", ["A", "c"], 25),
        ]


def test_partners_may_all_be_later_or_all_be_earlier() -> None:
    with Driver(joined_job("left", within=(-5 * MS, 10 * MS)), partitions=1) as driver:
        send(driver, ("l", "A", 20))
        rights = [("r", "a", 24), ("r", "b", 25), ("r", "c", 30), ("r", "d", 31)]
        assert send(driver, *rights) == [("k", ["A", "b"], 25), ("k", ["A", "c"], 30)]
        assert send(driver, ("l", "B", 27), ("r", "e", 200), ("l", "C", 200)) == [("k", ["B", None], 27)]
    with Driver(joined_job("outer", within=(10 * MS, -5 * MS)), partitions=1) as driver:
        send(driver, ("r", "a", 10), ("r", "b", 15), ("r", "c", 16), ("r", "d", 40))
        assert send(driver, ("l", "A", 20)) == [("k", ["A", "a"], 20), ("k", ["A", "b"], 20)]
        found = send(driver, ("r", "e", 300), ("l", "B", 300))
        assert found == [("k", [None, "c"], 16), ("k", [None, "d"], 40)]


def test_interval_that_ends_before_it_begins_is_refused() -> None:
    for within in [(-5 * MS, 4 * MS), -5 * MS]:
        with pytest.raises(JobError, match=r"is empty: it ends before it begins|is out of range"):
            joined_job(within=within)


def test_several_pairs_come_in_the_order_of_time_and_then_of_arrival() -> None:
    with Driver(joined_job(grace=100 * MS), partitions=1) as driver:
        send(driver, ("r", "late", 18), ("r", "1st", 12), ("r", "2nd", 12), ("r", "early", 11))
        assert [value[1] for _key, value, _at in send(driver, ("l", "A", 15))] == [
            "early",
            "1st",
            "2nd",
            "late",
        ]


def test_records_of_one_moment_meet_all_those_of_their_key_that_came_before() -> None:
    with Driver(joined_job(within=100 * MS), partitions=1) as driver:

        def sent(topic: str, *values: str) -> list[str]:
            """What comes of values whose first letter is their key."""
            for value in values:
                driver.send(topic, value, key=value[0], timestamp=5, partition=0)
            return ["".join(both) for _key, both, _at in written(driver)]

        assert sent("l", "a1", "b1") == []
        assert sent("r", "aX", "bX") == ["a1aX", "b1bX"]
        assert sent("l", "a2", "b2", "c1") == ["a2aX", "b2bX"]
        assert sent("r", "aY", "bY", "cX") == ["a1aY", "a2aY", "b1bY", "b2bY", "c1cX"]
        assert sent("l", "a3", "c2", "d1") == ["a3aX", "a3aY", "c2cX"]
        assert sent("r", "aZ") == ["a1aZ", "a2aZ", "a3aZ"]


def test_headers_are_those_of_the_record_that_makes_the_pair() -> None:
    with Driver(joined_job(), partitions=1) as driver:
        driver.send("l", "A", key="k", timestamp=20, headers=[("of", b"left")])
        driver.send("r", "a", key="k", timestamp=15, headers=[("of", b"right")])
        (record,) = driver.records("out")
        assert (record.timestamp, record.headers) == (20, [("of", b"right")])


def test_stream_can_be_joined_with_itself() -> None:
    job = Job("j")
    stream = job.stream(job.topic("s"))
    stream.join(stream, within=10 * MS, name="pairs").map(lambda pair: pair["left"] + pair["right"]).to(
        job.topic("out")
    )
    with Driver(job, partitions=1) as driver:
        assert [value for _key, value, _at in send(driver, ("s", "A", 1), ("s", "B", 2))] == [
            "AA",
            "BA",
            "AB",
            "BB",
        ]


def test_what_a_join_does_to_its_values_changes_no_other_pair() -> None:
    def spoil(left: Any, right: Any) -> list[Any]:
        left.append("seen")
        right.append("seen")
        return [left, right]

    with Driver(joined_job(with_=spoil), partitions=1, auto_barrier=False) as driver:
        for topic, value in (("l", ["A"]), ("r", ["a"]), ("r", ["b"]), ("l", ["B"])):
            driver.send(topic, value, key="k", timestamp=5)
        driver.barrier()
        found = {(value[0][0], value[1][0]): value for _key, value, _at in written(driver)}
        assert set(found) == {("A", "a"), ("A", "b"), ("B", "a"), ("B", "b")}
        assert all(value == [[left, "seen"], [right, "seen"]] for (left, right), value in found.items())


@pytest.mark.parametrize("kind", ["bytes", "int", "msgpack", Codec("own", encode_json, decode_json)])
def test_values_are_kept_in_the_codec_of_their_topic(kind: Any) -> None:
    job = Job("j")
    left, right = (
        job.stream(job.topic("l", value=kind)),
        job.stream(job.topic("r")).map(lambda value: [value]),
    )
    left.join(right, lambda one, other: [str(one), other], within=10 * MS, name="p").to(job.topic("out"))
    value: Any = {"bytes": b"raw", "int": 2**70}.get(kind if isinstance(kind, str) else "", {"x": 1})
    with Driver(job, partitions=1) as driver:
        send(driver, ("l", value, 5))
        driver.crash()
        assert send(driver, ("r", 1, 6)) == [("k", [str(value), [1]], 6)]


def test_null_values_are_joined_like_others() -> None:
    with Driver(joined_job(), partitions=1) as driver:
        assert send(driver, ("l", None, 5), ("r", None, 5)) == [("k", [None, None], 5)]


def test_streams_with_other_keys_meet_behind_a_key_by() -> None:
    job = Job("j")
    left = job.stream(job.topic("l")).key_by("of", name="left")
    right = job.stream(job.topic("r")).key_by("of", name="right")
    left.join(right, within=10 * MS, name="p").map(lambda pair: pair["left"]["of"]).to(job.topic("out"))
    assert [stage.name for stage in job.build(Settings()).stages] == ["l", "r", "left"]
    with Driver(job, partitions={"l": 3, "r": 2}) as driver:
        for topic in "lr":
            for number, key in enumerate("abcdef"):
                driver.send(topic, {"of": key}, key=str(number), timestamp=5)
        assert sorted(driver.read_values("out")) == list("abcdef")


# --- alone, and late -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "alone"),
    [("inner", []), ("left", [["A", None]]), ("outer", [["A", None], [None, "b"]])],
)
def test_record_without_a_partner_is_passed_on_once_its_time_and_the_grace_are_over(
    how: str, alone: Any
) -> None:
    with Driver(joined_job(how, grace=5 * MS), partitions=1) as driver:
        send(driver, ("l", "A", 20), ("r", "b", 50))
        driver.advance(to_ms=35, clock="event")
        assert written(driver) == []
        driver.crash()
        driver.advance(to_ms=36, clock="event")
        assert [value for _key, value, _at in written(driver)] == alone[:1]
        driver.advance(to_ms=1_000, clock="event")
        assert [value for _key, value, _at in written(driver)] == alone[1:]
        assert not rest(driver)


def rest(driver: Driver) -> list[bytes]:
    """What is left of the join's state, apart from its grace."""
    stored = [key for shard in driver._shards.values() for key in shard._store._values]
    return [key for key in stored if key != store_prefix("pairs//grace")]


def test_record_with_a_partner_is_never_alone() -> None:
    with Driver(joined_job("outer", within=10 * MS), partitions=1) as driver:
        assert send(driver, ("l", "A", 20), ("l", "B", 20), ("r", "a", 25)) == [
            ("k", ["A", "a"], 25),
            ("k", ["B", "a"], 25),
        ]
        assert send(driver, ("l", "C", 20)) == [("k", ["C", "a"], 25)]
        assert not [key for key in rest(driver) if key.endswith((b"left", b"right"))], "nothing to wait for"
        driver.advance(to_ms=1_000, clock="event")
        assert written(driver) == []
        assert not rest(driver)


def test_timestamp_of_a_record_that_stays_alone_is_its_own() -> None:
    with Driver(joined_job("left"), partitions=1) as driver:
        assert send(driver, ("l", "A", 20), ("l", "B", 90), ("r", "b", 95)) == [
            ("k", ["B", "b"], 95),
            ("k", ["A", None], 20),
        ]


def test_late_record_finds_its_partners_within_the_grace_and_is_late_after_it() -> None:
    with Driver(joined_job("outer", grace=5 * MS, late=True), partitions=1) as driver:
        send(driver, ("l", "A", 20), ("r", "b", 100), ("l", "B", 35))
        assert driver.event_times("l") == {0: 35}
        assert send(driver, ("r", "a", 20)) == [("k", ["A", "a"], 20)]
        assert send(driver, ("l", "C", 36)) == []
        # A isn't open any more, so there is nothing with which `c` could be a pair.
        assert send(driver, ("r", "c", 21)) == []
        assert send(driver, ("r", "d", 20)) == []
        assert driver.late == 1
        assert written(driver, "late") == [("k", "d", 20)]


def test_event_time_behind_a_join_waits_for_what_is_late() -> None:
    job = Job("j")
    left, right = job.stream(job.topic("l")), job.stream(job.topic("r"))
    joined = left.join(right, both, within=10 * MS, grace=5 * MS, how="left", name="pairs")
    joined.key_by(lambda pair: "all", name="all").window(Tumbling(10 * MS), name="w").aggregate(n=count()).to(
        job.topic("out")
    )
    with Driver(job, partitions=1) as driver:
        send(driver, ("l", "A", 5), ("l", "B", 7), ("l", "C", 100), ("r", "c", 100))
        assert driver.event_times("all") == {0: 84}
        (result,) = driver.records("out")
        assert result.value["n"] == 2


# --- failures --------------------------------------------------------------------------------------------


def test_record_that_fails_stops_the_job_before_it_or_leaves_no_trace() -> None:
    with Driver(joined_job(with_=failing), partitions=1) as driver:
        send(driver, ("l", "A", 1))
        with pytest.raises(JobStopped, match=r"r/0 at offset 0 failed in the join 'pairs': .*no good"):
            send(driver, ("r", "bad", 1))
    with Driver(joined_job(with_=failing, on_error="dead"), partitions=1) as driver:
        assert send(driver, ("l", "A", 1), ("r", "bad", 1), ("r", "good", 1), ("l", "B", 1)) == [
            ("k", ["A", "good"], 1),
            ("k", ["B", "good"], 1),
        ]
        assert send(driver, ("l", "C", 1), key=None) == []
        assert ["no key" in letter.error for letter in driver.dead_letters()] == [False, True]


@pytest.mark.parametrize("on_error", ["skip", "dead", "stop"])
def test_record_that_fails_alone_follows_the_rule(on_error: str) -> None:
    with Driver(joined_job("left", failing, on_error=on_error), partitions=1) as driver:
        send(driver, ("l", "bad", 1), ("l", "good", 2))
        if on_error == "stop":
            with pytest.raises(JobStopped, match=r"'left' of the join 'pairs' for the key .* failed"):
                driver.advance(to_ms=100, clock="event")
            return
        driver.advance(to_ms=100, clock="event")
        assert written(driver) == [("k", ["good", None], 2)]
        assert driver.skipped == 1
        assert len(driver.dead_letters()) == (on_error == "dead")
        assert not rest(driver)


# --- what may change, and mistakes -----------------------------------------------------------------------


def grown(**options: Any) -> Any:
    def grow(job: Job) -> None:
        given: dict[str, Any] = {"within": 10 * MS, "name": "pairs"} | options
        left, right = job.stream(job.topic("l")), job.stream(job.topic("r"))
        left.join(right, **given).to(job.topic("out"))

    return grow


def test_grace_and_function_may_change_and_the_rest_not() -> None:
    assert change(grown(), grown(grace=10 * MS, with_=both, on_error="skip")) is None
    told = str(change(grown(), grown(within=20 * MS)))
    assert "The join 'pairs' was declared as inner (before_ms=10, after_ms=10, json with json values)" in told
    assert "is now declared as left" in str(change(grown(), grown(how="left")))
    assert "no longer in the job (renamed to 'others'?)" in str(change(grown(), grown(name="others")))


def test_what_is_due_is_kept_without_the_grace_which_may_change() -> None:
    with Driver(joined_job("left", grace=5 * MS), partitions=1) as driver:
        send(driver, ("l", "A", 20))
        (shard,) = driver._shards.values()
        (key,) = [key for key in shard._store._values if key.endswith(b"left")]
        assert int.from_bytes(key[4:12], "big") == 30


def test_stage_describes_its_join() -> None:
    (stage,) = built(grown(how="outer")).stages
    assert (stage.topics, stage.stores, stage.results_late_ms) == (("l", "r"), ("pairs",), 11)
    assert stage.keeps_time
    assert stage.precedence == (0, 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": None}, "got no name= or no within="),
        ({"within": None}, "got no name= or no within="),
        ({"within": 5}, "within=5 of the join 'pairs' is not a timedelta"),
        ({"within": (MS, MS, MS)}, "isn't an interval"),
        ({"within": -MS}, "is out of range"),
        ({"grace": MS / 2}, "grace=500 us of the join 'pairs' is not a whole number of milliseconds"),
        ({"how": "right"}, "how='right' of the join 'pairs' is unknown"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(JobError) as caught:
        built(grown(**options))
    assert told in caught.value.message


def test_arguments_of_stream_joins_are_refused_with_a_table() -> None:
    job = Job("j")
    stream: Any = job.stream(job.topic("s"))
    with pytest.raises(JobError, match="which are for joins of two streams"):
        stream.join(job.table(job.topic("t")), within=MS)


def test_step_that_needs_records_in_time_does_not_follow_late_results() -> None:
    def follows(how: Any) -> Any:
        def grow(job: Job) -> None:
            left, right = job.stream(job.topic("l")), job.stream(job.topic("r"))
            joined = left.join(right, within=MS, name="pairs", how=how)
            joined.window(Tumbling(MS), name="w").aggregate(n=count()).to(job.topic("out"))

        return grow

    assert built(follows("inner"))
    with pytest.raises(JobError, match="The window 'w' follows the join 'pairs' directly"):
        built(follows("left"))


def test_watermark_delay_counts() -> None:
    job = Job("j")
    left, right = (job.stream(job.topic(name, watermark=Watermark(max_delay_ms=7))) for name in "lr")
    left.join(right, both, within=10 * MS, how="left", name="pairs").to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        assert send(driver, ("l", "A", 20), ("l", "B", 60), ("r", "b", 37)) == []
        assert send(driver, ("r", "c", 38)) == [("k", ["A", None], 20)]


# --- whatever happens in between -------------------------------------------------------------------------


@dataclass
class Model:
    """A slow and obvious join of one partition."""

    how: str
    before: int
    after: int
    grace: int
    found: list[Written] = field(default_factory=list[Written])
    late: int = 0
    newest: dict[str, int] = field(default_factory=dict[str, int])
    kept: list[tuple[str, str, Any, int, list[bool]]] = field(default_factory=list[Any])
    now: int = -1

    def reach(self, side: str) -> int:
        return max(0, self.after if side == "l" else self.before)

    def is_open(self, side: str, at: int) -> bool:
        return at + self.reach(side) + self.grace >= self.now

    def take(self, side: str, key: str, value: Any, at: int) -> None:
        if not self.is_open(side, at):
            self.late += 1
        else:
            self.pair(side, key, value, at)
        self.newest[side] = max(self.newest.get(side, -1), at)
        if len(self.newest) == 2:
            self.now = max(self.now, min(self.newest.values()))
        self.give_up()

    def pair(self, side: str, key: str, value: Any, at: int) -> None:
        partners: list[Any] = []
        for one in self.kept:
            other_side, other_key, _value, other_at, has_partner = one
            distance = other_at - at if side == "l" else at - other_at
            is_near = -self.before <= distance <= self.after
            if other_side != side and other_key == key and is_near and self.is_open(other_side, other_at):
                partners.append(one)
                has_partner[0] = True
        for _side, _key, other, other_at, _has_partner in sorted(partners, key=lambda one: one[3]):
            pair = [value, other] if side == "l" else [other, value]
            self.found.append((key, pair, max(at, other_at)))
        self.kept.append((side, key, value, at, [bool(partners)]))

    def give_up(self) -> None:
        over = [one for one in self.kept if not self.is_open(one[0], one[3])]
        self.kept = [one for one in self.kept if self.is_open(one[0], one[3])]
        over.sort(key=lambda one: (one[3] + self.reach(one[0]), one[1], one[0]))
        for side, key, value, at, has_partner in over:
            if not has_partner[0] and (self.how == "outer" or (self.how == "left" and side == "l")):
                self.found.append((key, [value, None] if side == "l" else [None, value], at))


@pytest.mark.parametrize("seed", range(60))
def test_results_are_those_of_the_model_whatever_barriers_and_crashes(seed: int) -> None:
    chance = random.Random(seed)
    model = Model(
        chance.choice(["inner", "left", "outer"]),
        chance.randrange(8),
        chance.randrange(8),
        chance.randrange(6),
    )
    if chance.random() < 0.4:  # partners are only later, or only earlier
        model.before, model.after = -model.before, model.before + model.after
    if chance.random() < 0.5:
        model.before, model.after = model.after, model.before
    within = model.before * MS, model.after * MS
    job = joined_job(
        model.how, within=within, grace=model.grace * MS, on_error=chance.choice(["stop", "skip"])
    )
    at_ms = 10
    with Driver(job, partitions=1, auto_barrier=chance.random() < 0.4) as driver:
        for number in range(120):
            at_ms += chance.choice([0, 0, 1, 1, 2, 6])
            sent_ms = max(1, at_ms - chance.choice([0, 0, 0, 1, 4, 15]))
            side, key = chance.choice("lr"), chance.choice("abc")
            model.take(side, key, number, sent_ms)
            driver.send(side, number, key=key, timestamp=sent_ms)
            if chance.random() < 0.2:
                driver.barrier()
            if chance.random() < 0.1:
                driver.barrier()  # otherwise records would come again in another order
                driver.crash()
        driver.settle()
        assert written(driver) == model.found
        assert driver.late == model.late
        driver.advance(to_ms=10_000, clock="event")
        driver.settle()
        assert not rest(driver)


@dataclass
class Bid:
    cents: int


@dataclass
class Ask:
    cents: int


def test_late_records_of_both_sides_go_to_one_topic_though_they_have_other_models() -> None:
    job = Job("j")
    bids, asks = job.topic("bids", value=Bid), job.topic("asks", value=Ask)
    pairs = job.stream(bids).join(job.stream(asks), within=5 * MS, name="pairs", late="late")
    pairs.to("out")
    with Driver(job, partitions=1) as driver:
        for at in (100, 5):
            driver.send(bids, Bid(at), key="k", timestamp=at)
            driver.send(asks, Ask(at), key="k", timestamp=at)
        assert driver.read_values("late") == [{"cents": 5}, {"cents": 5}]
        assert driver.late == 2
