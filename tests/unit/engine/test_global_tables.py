"""Global tables: each shard of a joining stage has all rows, reads them first, and joins by any function."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Job, Tumbling, Watermark, count
from fcluster.common.ids import ShardId
from fcluster.engine import loading
from fcluster.engine.operators import broadcast
from fcluster.testing import Driver, JobStopped, driver, shards

PARTITIONS = {"calls": 3, "rates": 2}


def priced(call: Any, rate: Any) -> Any:
    return [call, rate]


def currency(call: Any) -> Any:
    return call["in"]


def joined_job(how: Any = "inner", **options: Any) -> Job:
    """The stream "calls", joined with the global table "rates"; results go to "out"."""
    job = Job("j")
    table_options = {name: options.pop(name) for name in ("history", "table_on_error") if name in options}
    if "table_on_error" in table_options:
        table_options["on_error"] = table_options.pop("table_on_error")
    rates = job.global_table(job.topic("rates"), **table_options)
    options.setdefault("on", currency)
    job.stream(job.topic("calls")).join(rates, priced, how=how, **options).to(job.topic("out"))
    return job


def rates_of(driver: Driver, name: str = "rates-in-calls", stage: str = "calls") -> list[dict[bytes, Any]]:
    """The rows of each shard."""
    found = driver.topology.stage(stage)
    (table,) = (table for table in found.tables if table.name == name)
    return [
        driver._shard(found, partition).rows_of(table) for partition in range(driver._stage_sizes[found.name])
    ]


# --- rows that can't be kept -------------------------------------------------------------------------------


def test_row_without_a_timestamp_is_skipped_by_the_rule_of_a_table_with_history() -> None:
    job = joined_job(history=timedelta(days=1), table_on_error="skip")
    with Driver(job, partitions=PARTITIONS) as driver:
        driver.send("rates", 1, key="usd", timestamp=-1)
        driver.send("rates", 2, key="gbp", timestamp=0)
        assert driver.skipped == 1
        assert rates_of(driver) == [{b"gbp": 2}] * 3
    strict = Driver(joined_job(history=timedelta(days=1)), partitions=PARTITIONS)
    with strict as driver, pytest.raises(JobStopped, match=r"global table 'rates'.*no timestamp"):
        driver.send("rates", 1, key="usd", timestamp=-1)


# --- what a record meets ------------------------------------------------------------------------------------


def test_each_shard_has_all_rows_whatever_partitions_and_keys_the_stream_has() -> None:
    with Driver(joined_job(), partitions=PARTITIONS) as driver:
        for number, key in enumerate(["usd", "gbp", "yen", "eur"]):
            driver.send("rates", number, key=key)
        assert rates_of(driver) == [{b"usd": 0, b"gbp": 1, b"yen": 2, b"eur": 3}] * 3
        for partition in range(3):
            driver.send("calls", {"in": "yen"}, partition=partition)
        assert driver.read_values("out") == [[{"in": "yen"}, 2]] * 3
        assert driver.table("rates") == {"usd": 0, "gbp": 1, "yen": 2, "eur": 3}


def test_key_time_and_headers_are_those_of_the_stream_and_a_later_row_changes_no_result() -> None:
    with Driver(joined_job(), partitions=PARTITIONS) as driver:
        driver.send("rates", 1, key="usd", timestamp=5)
        driver.send("calls", {"in": "usd"}, key="k", timestamp=7, headers=[("h", b"x")])
        driver.send("rates", 2, key="usd", timestamp=9)
        (record,) = driver.read("out")
        assert (record.key, record.timestamp, record.headers) == ("k", 7, [("h", b"x")])
        driver.send("calls", {"in": "usd"}, key="k", timestamp=11)
        assert driver.read_values("out") == [[{"in": "usd"}, 2]]


@pytest.mark.parametrize("how", ["inner", "left"])
def test_call_to_which_no_row_belongs(how: Any) -> None:
    """The function gives None, the row was never there, or it was deleted."""
    with Driver(joined_job(how), partitions=PARTITIONS) as driver:
        driver.send("rates", 1, key="usd")
        driver.send("rates", None, key="usd")
        for called in (None, "gbp", "usd"):
            driver.send("calls", {"in": called})
        found = [[{"in": called}, None] for called in (None, "gbp", "usd")]
        assert driver.read_values("out") == (found if how == "left" else [])
        assert driver.table("rates") == {}


def test_null_in_the_stream_is_joined_and_null_in_the_table_is_a_row() -> None:
    with Driver(joined_job(on=lambda _call: "usd"), partitions=PARTITIONS) as driver:
        driver.send_raw("rates", b"null", key=b"usd")
        driver.send("calls", None, key="k")
        assert driver.read_values("out") == [[None, None]]


def test_field_may_be_the_key_and_keys_of_both_may_be_of_any_kind() -> None:
    job = Job("j")
    rates = job.global_table(job.topic("rates", key="int"), name="r")
    job.stream(job.topic("calls", key="bytes")).join(rates, on="in").to(job.topic("out", key="bytes"))
    with Driver(job, partitions=PARTITIONS) as driver:
        driver.send("rates", "x", key=7)
        driver.send("calls", {"in": 7}, key=b"\xff")
        assert driver.read_values("out") == [{"left": {"in": 7}, "right": "x"}]
        assert driver.table(rates) == driver.table("r") == {7: "x"}


def test_without_on_the_records_key_is_looked_up() -> None:
    job = Job("j")
    rates = job.global_table(job.topic("rates"))
    stream = job.stream(job.topic("calls"))
    stream.join(rates, priced, on_error="skip").to(job.topic("out"))
    stream.join(rates, priced, how="left").to(job.topic("all"))
    with Driver(job, partitions=PARTITIONS) as driver:
        driver.send("rates", 1, key="usd")
        driver.send("calls", "a", key="usd")
        driver.send("calls", "b")
        assert driver.read_values("out") == [["a", 1]]
        assert driver.read_values("all") == [["a", 1], ["b", None]]
        assert driver.skipped == 1


def test_filtered_and_mapped_rows() -> None:
    job = Job("j")
    rates = job.global_table(job.topic("rates"))
    halves = rates.filter(lambda rate: rate % 2 == 0).map(lambda rate: rate // 2)
    job.stream(job.topic("calls")).join(halves, priced, on=currency, how="left").to(job.topic("out"))
    with Driver(job, partitions=PARTITIONS) as driver:
        driver.send("rates", 8, key="usd")
        driver.send("rates", 7, key="gbp")
        for called in ("usd", "gbp"):
            driver.send("calls", {"in": called})
        assert [row for _call, row in driver.read_values("out")] == [4, None]
        assert driver.table(halves) == {"usd": 4}


def test_history_gives_the_row_of_the_records_own_time() -> None:
    with Driver(joined_job(history=timedelta(seconds=1)), partitions=PARTITIONS) as driver:
        for at_ms in (10, 20):
            driver.send("rates", at_ms, key="usd", timestamp=at_ms)
        for at_ms in (25, 15):
            driver.send("calls", {"in": "usd"}, timestamp=at_ms)
        assert [row for _call, row in driver.read_values("out")] == [20, 10]


def test_joins_of_one_stage_share_a_copy_and_each_stage_has_its_own() -> None:
    job = Job("j")
    rates = job.global_table(job.topic("rates"))
    calls = job.stream(job.topic("calls"))
    calls.join(rates, priced, on=currency).join(rates, priced, on=lambda _pair: "usd").to(job.topic("out"))
    calls.key_by("to", name="by-to").join(rates, priced, on=currency).to(job.topic("other"))
    with Driver(job, partitions={"calls": 3, "rates": 1}) as driver:
        assert [stage.name for stage in driver.topology.stages] == ["rates", "calls", "by-to"]
        assert driver.topology.stage("calls").stores == ("rates-in-calls",)
        assert driver.topology.stage("by-to").stores == ("rates-in-by-to",)
        driver.send("rates", 1, key="usd")
        driver.send("rates", 2, key="gbp")
        driver.send("calls", {"in": "gbp", "to": "x"})
        call = {"in": "gbp", "to": "x"}
        assert driver.read_values("out") == [[[call, 2], 1]]
        assert driver.read_values("other") == [[call, 2]]
        assert rates_of(driver, "rates-in-by-to", "by-to") == [{b"usd": 1, b"gbp": 2}] * 3


def test_topic_may_be_read_as_a_table_and_as_a_stream_besides() -> None:
    job = Job("j")
    topic = job.topic("rates")
    rates = job.global_table(topic)
    job.stream(job.topic("calls")).join(rates, priced, on=currency).to(job.topic("out"))
    job.table(topic, name="newest").to_stream().to(job.topic("changes"))
    job.stream(topic).map(lambda rate: rate + 100).to(job.topic("seen"))
    with Driver(job, partitions=PARTITIONS) as driver:
        driver.send(topic, 1, key="usd")
        driver.send("calls", {"in": "usd"})
        assert [driver.read_values(name) for name in ("out", "changes", "seen")] == [
            [[{"in": "usd"}, 1]],
            [1],
            [101],
        ]


def test_event_time_does_not_wait_for_the_rows_and_a_bounded_run_ends() -> None:
    job = Job("j")
    rates = job.global_table(job.topic("rates"))
    calls = job.topic("calls", watermark=Watermark())
    joined = job.stream(calls).join(rates, priced, on=currency)
    joined.window(Tumbling(timedelta(milliseconds=10)), name="w").aggregate(n=count()).to(job.topic("out"))
    with Driver(job, partitions={"calls": 1, "rates": 2}) as driver:
        driver.send("rates", 1, key="usd", timestamp=1)
        for at_ms in (101, 102, 115):
            driver.send(calls, {"in": "usd"}, key="k", timestamp=at_ms)
        assert [row["n"] for row in driver.read_values("out")] == [2]
        driver.finish()
        assert [row["n"] for row in driver.read_values("out")] == [1]


# --- failures -------------------------------------------------------------------------------------------


def test_row_without_a_key_or_that_is_no_json_is_one_failure_however_many_stages_have_copies() -> None:
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    rates = job.global_table(job.topic("rates"), on_error=dead)
    for name in ("calls", "more"):
        job.stream(job.topic(name)).join(rates, priced, on=currency).to(job.topic("out"))
    with Driver(job, partitions={**PARTITIONS, "more": 2}) as driver:
        driver.send("rates", 1)
        driver.send_raw("rates", b"{", key=b"usd")
        driver.send("rates", 3, key="usd")
        assert [letter.handler for letter in driver.dead_letters(dead)] == ["rates", "rates"]
        assert driver.skipped == 2
        driver.send("calls", {"in": "usd"})
        assert driver.read_values("out") == [[{"in": "usd"}, 3]]


def test_row_without_a_key_stops_the_job_with_the_name_of_the_table() -> None:
    told = "in the global table 'rates': the record has no key"
    with Driver(joined_job(), partitions=PARTITIONS) as driver, pytest.raises(JobStopped, match=told):
        driver.send("rates", 1)


@pytest.mark.parametrize(
    ("on", "told"),
    [
        (lambda call: call["nothing"], "KeyError: 'nothing'"),
        (lambda _call: 7, "convert it"),
        ("in", "takes the field 'in', but the value is null"),
        ("out", "takes the field 'out', and the value has no such field, only in"),
    ],
)
def test_function_that_gives_no_key_of_the_table_fails_the_record(on: Any, told: str) -> None:
    with Driver(joined_job(on=on), partitions=PARTITIONS) as driver:
        with pytest.raises(JobStopped) as stopped:
            driver.send("calls", None if on == "in" else {"in": "usd"})
        assert "join with 'rates' by 'priced'" in stopped.value.message
        assert told in f"{stopped.value.message} {stopped.value.remedy}"
    job = joined_job(on=on, on_error="skip")
    with Driver(job, partitions=PARTITIONS) as driver:
        driver.send("calls", None if on == "in" else {"in": "usd"})
        assert driver.skipped == 1


# --- the start ------------------------------------------------------------------------------------------


def feeding_job() -> Job:
    """It only writes what the next version reads."""
    job = Job("j")
    job.stream(job.topic("rows-in")).to(job.topic("rates"))
    job.stream(job.topic("calls-in")).to(job.topic("calls"))
    return job


def joining_job(how: Any = "left", **options: Any) -> Job:
    """The same, and calls meet rates."""
    job = feeding_job()
    rates = job.global_table(job.topic("rates"), **options)
    job.stream(job.topic("calls")).join(rates, priced, on=currency, how=how).to(job.topic("out"))
    return job


def test_all_rows_that_there_are_at_the_start_come_before_the_first_record() -> None:
    with Driver(feeding_job(), partitions=PARTITIONS) as driver:
        driver.send("calls-in", {"in": "usd"}, timestamp=1)
        for number in range(20):
            driver.send("rows-in", number, key="usd" if number % 3 else "gbp", timestamp=100 + number)
        driver.restart(joining_job())
        assert driver.read_values("out") == [[{"in": "usd"}, 19]]


def test_records_wait_until_each_partition_of_the_topic_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with Driver(feeding_job(), partitions=PARTITIONS) as run:
        run.send("calls-in", {"in": "usd"})
        told = shards.Shard.note_loaded
        with monkeypatch.context() as patched:
            patched.setattr(
                shards.Shard, "note_loaded", lambda shard: shard.id.partition == 0 and told(shard)
            )
            run.restart(joining_job())
            run.send("rates", 1, key="usd")
            assert run.read_values("out") == []
            run.crash()
            assert run.read_values("out") == []
        run.send("rates", 2, key="usd")
        assert run.read_values("out") == [[{"in": "usd"}, 2]]
        run.crash()
        run.send("calls", {"in": "usd"})
        assert run.read_values("out") == [[{"in": "usd"}, 2]]


# --- any order, any barrier, any crash ------------------------------------------------------------------


class Shuffled(Driver):
    """Reads the inputs of all shards in any order, and leaves records unread for some time. One of the topics
    may be read much later than the others.
    """

    chance = random.Random(0)
    slow = ""
    is_lazy = False
    is_down = False

    def _next(self) -> Any:
        if self.is_down:
            return None
        if self.is_lazy and self.chance.random() < 0.3:
            return None
        heads: list[Any] = []
        for stage in self.topology.stages:
            for partition in range(self._stage_sizes[stage.name]):
                unloaded = self._shard(stage, partition).unloaded() if stage.copies else ()
                for number, source in enumerate(stage.inputs):
                    if unloaded and number not in unloaded:
                        continue
                    if self.is_lazy and source.name == self.slow and self.chance.random() < 0.9:
                        continue
                    record = self._first_of(stage, number, partition)
                    if record is not None:
                        heads.append((stage, record))
        if not heads:
            return None
        stage, record = self.chance.choice(heads)
        return self._shard(stage, record.partition()), record

    def catch_up(self) -> None:
        """Process everything."""
        self.is_lazy = False
        self.settle()
        while self._next() is not None or self._dirty():
            self._advance(one_by_one=False)
            self.settle()
        self.is_lazy = True

    def shake(self) -> None:
        """Perhaps a barrier, perhaps a crash."""
        if self.chance.random() < 0.4:
            self.barrier()
        if self.chance.random() < 0.1:
            self.crash()


# --- further starts -------------------------------------------------------------------------------------


def backlog_run(job: Job) -> Shuffled:
    """A run that has joined all there is, with a rate of 1."""
    run = Shuffled(job, partitions=PARTITIONS, auto_barrier=False)
    run.send("rates", 1, key="usd")
    run.catch_up()
    return run


def test_backlog_meets_the_rows_that_there_are_when_the_job_is_started_again() -> None:
    with backlog_run(joining_job()) as run:
        run.is_down = True
        run.send("calls", {"in": "usd"}, timestamp=1)
        run.send("rates", 2, key="usd", timestamp=2)
        run.is_down = False
        run.restart(joining_job())
        run.catch_up()
        assert run.read_values("out") == [[{"in": "usd"}, 2]]


def test_process_that_dies_is_no_start() -> None:
    """Its shards have heard already what they wait for: they go on without waiting for anybody."""
    with backlog_run(joining_job()) as run:
        run.is_down = True
        run.send("calls", {"in": "usd"}, timestamp=1)
        run.send("rates", 2, key="usd", timestamp=2)
        run.is_down = False
        run.slow = "rates-in-calls"
        run.crash()
        stage = run.topology.stage("calls")
        assert not any(run._shard(stage, partition).unloaded() for partition in range(PARTITIONS["calls"]))


def reminding_job() -> Job:
    """Calls are joined a second later, by the wall clock."""

    def remember(ctx: Any, call: Any) -> None:
        ctx.state["call"] = call
        ctx.timer("later", at=ctx.processing_time + 1_000, clock="processing")

    def later(_key: Any, ctx: Any) -> Any:
        return ctx.state["call"]

    job = Job("j")
    rates = job.global_table(job.topic("rates"))
    remembered = job.stream(job.topic("calls")).process(remember, name="remember", timers={"later": later})
    remembered.join(rates, priced, on=currency).to(job.topic("out"))
    return job


def test_timers_wait_for_the_rows_too() -> None:
    with backlog_run(reminding_job()) as run:
        run.send("calls", {"in": "usd"}, key="ann")
        run.catch_up()
        run.is_down = True
        run.send("rates", 2, key="usd")
        run.now_ms += 10_000
        run.is_down = False
        run.restart(reminding_job())
        run.catch_up()
        assert run.read_values("out") == [[{"in": "usd"}, 2]]


CURRENCIES = ["usd", "gbp", "yen"]


def check(seed: int) -> None:
    """First, rows that are there before the job begins, and then don't change: each call meets those, in
    whatever order everything is read. Then the job stands still, and both topics get records: those calls
    meet what there is when the job is started again. Then rows change: each call is joined once, rows of a
    key that calls of a shard meet never go back, and in the end all shards have the newest.
    """
    chance = random.Random(seed)
    how = chance.choice(["inner", "left"])
    counts = {"calls": chance.randrange(1, 4), "rates": chance.randrange(1, 4)}
    rows: dict[str, int] = {}
    sent = 0
    with Shuffled(feeding_job(), partitions=counts, auto_barrier=False) as run:
        run.chance = chance

        def row(number: int, topic: str) -> None:
            key, value = chance.choice(CURRENCIES), None if chance.random() < 0.2 else number
            run.send(topic, value, key=key, timestamp=chance.randrange(1, 100))
            if value is None:
                rows.pop(key, None)
            else:
                rows[key] = value

        def call(topic: str) -> None:
            nonlocal sent
            value = {"in": chance.choice([*CURRENCIES, "xxx", None]), "n": sent}
            run.send(topic, value, key=f"k{chance.randrange(9)}", timestamp=chance.randrange(1, 100))
            sent += 1

        for number in range(chance.randrange(12)):
            row(number, "rows-in")
        for _ in range(chance.randrange(6)):
            call("calls-in")
        run.catch_up()
        run.slow = chance.choice(["", "calls", "rates", "rates-in-calls"])
        run.restart(joining_job(how))
        for _ in range(chance.randrange(1, 20)):
            call("calls")
            run.shake()
        run.catch_up()

        def check_since(number: int) -> None:
            """Calls with this number or a greater one have met the rows that there are."""
            results = [one for one in run.records("out") if one.value[0]["n"] >= number]
            calls = [record.value for record in run.records("calls") if record.value["n"] >= number]
            wanted = [call for call in calls if how == "left" or call["in"] in rows]
            found = {record.value[0]["n"]: record.value for record in results}
            assert found == {call["n"]: [call, rows.get(call["in"])] for call in wanted}
            assert len(results) == len(wanted), "once"

        check_since(0)
        run.is_down = True
        first = sent
        for number in range(50, 50 + chance.randrange(1, 12)):
            row(number, "rates") if chance.random() < 0.5 else call("calls")
        run.is_down = False
        run.restart(joining_job(how))
        for _ in range(chance.randrange(4)):
            call("calls")
            run.shake()
        run.catch_up()
        check_since(first)

        run.read("out")
        first = sent
        for number in range(100, 100 + chance.randrange(1, 30)):
            row(number, "rates") if chance.random() < 0.5 else call("calls")
            run.shake()
        run.catch_up()
        assert rates_of(run) == [{key.encode(): value for key, value in rows.items()}] * counts["calls"]
        results = run.read("out")
        numbers = sorted(record.value[0]["n"] for record in results)
        assert numbers == sorted(set(numbers))
        assert how == "inner" or numbers == list(range(first, sent))
        newest: dict[tuple[int, str], int] = {}
        for record in results:
            told, met = record.value
            at = record.partition, told["in"]
            if met is not None:
                assert newest.get(at, -1) <= met
                newest[at] = met


@pytest.mark.parametrize("seed", range(100))
def test_calls_meet_the_same_rows_in_whatever_order_everything_is_read(seed: int) -> None:
    check(seed)


def assert_caught() -> None:
    """At least one seed notices."""
    for seed in range(60):
        try:
            check(seed)
        except (AssertionError, JobStopped):
            return
    raise RuntimeError("nobody has noticed")


def nothing_waits(_stage: Any, _tables: Any, _job_start: int) -> Callable[[], frozenset[int]]:
    return frozenset[int]


def test_records_that_do_not_wait_for_the_rows_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "unloaded_inputs", nothing_waits)
    assert_caught()


def test_marks_that_come_too_early_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.Driver, "_first_of", first_of_no_rows(driver.Driver._first_of))
    assert_caught()


def first_of_no_rows(plain: Any) -> Any:
    """Rows count as read, when it is asked whether they are."""

    def first_of(run: Any, stage: Any, number: int, partition: int) -> Any:
        asks = run._shards.get(ShardId(stage.name, partition))
        record = plain(run, stage, number, partition)
        return None if stage.broadcasts and asks is not None and asks._loading == "reads" else record

    return first_of


def test_mark_of_one_partition_that_counts_for_all_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def note(self: Any, record: Any) -> bool:
        said = loading._said_in(record)
        if said is None:
            return False
        self._heard.put(bytes(4), int(said.split(b"/")[2]))
        self._heard.put(b"all", 1)
        return True

    monkeypatch.setattr(loading.Loading, "note", note)
    assert_caught()


def is_loaded_once(self: Any) -> bool:
    shards = self._heard.get(b"all")
    return shards is not loading.ABSENT and all(
        self._heard.get(shard.to_bytes(4, "big")) is not loading.ABSENT for shard in range(shards)
    )


def test_marks_of_a_former_start_that_count_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.Loading, "is_loaded", property(is_loaded_once))
    assert_caught()


def test_rows_that_reach_one_shard_only_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = broadcast.BroadcastOperator.compile

    def compiled(operator: Any, surroundings: Any, following: Any) -> Any:
        sizes = dict.fromkeys(surroundings.stage_sizes, 1)
        return plain(operator, replace(surroundings, stage_sizes=sizes), following)

    monkeypatch.setattr(broadcast.BroadcastOperator, "compile", compiled)
    assert_caught()
