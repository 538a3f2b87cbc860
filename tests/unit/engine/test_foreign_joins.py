"""Joins of tables by a foreign key: what is told, and that the result is the relational join in the end, in
whatever order subscriptions, rows and answers are read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from fcluster import Job, Table, Tumbling, count
from fcluster.common.errors import JobError
from fcluster.common.ids import ShardId, repartition_topic
from fcluster.engine.entries import EntryTable
from fcluster.engine.operators import foreign
from fcluster.graph.compatibility import incompatibility
from fcluster.graph.foreign import decode_link, decode_version
from fcluster.kafka.topics import plan_topics
from fcluster.testing import Driver, JobStopped

Sent = tuple[str, str, Any, int]
"""Topic, key, value and timestamp."""


def customer_of(order: Any) -> str | None:
    return order[0]


def priced(order: Any, customer: Any) -> Any:
    return [order[1], customer]


def joined(job: Job, how: Any = "inner", **options: Any) -> Table:
    """Orders, pairs of a customer's key and a number, each with its customer."""
    orders, customers = job.table(job.topic("orders")), job.table(job.topic("customers"))
    return orders.join(customers, priced, on=customer_of, name="priced", how=how, **options)


def told(sent: list[Sent], how: Any = "inner", partitions: Any = 1, **options: Any) -> list[Any]:
    """The changes that are told for these records: key, old and new value, and time."""
    job = Job("j")
    changes = joined(job, how, **options).changes().map(lambda change: [change.old, change.new])
    changes.to(job.topic("out"))
    with Driver(job, partitions=partitions) as driver:
        for topic, key, value, at_ms in sent:
            driver.send(topic, value, key=key, timestamp=at_ms)
        return [(record.key, *record.value, record.timestamp) for record in driver.records("out")]


SENT: list[Sent] = [
    ("orders", "o1", ["ann", 1], 10),
    ("customers", "ann", "Ann", 5),
    ("orders", "o2", ["ann", 2], 11),
    ("orders", "o3", [None, 3], 12),
    ("customers", "ann", "Anna", 20),
    ("orders", "o1", ["ann", 9], 15),  # the same customer
    ("orders", "o1", ["bob", 9], 21),  # a customer whom nobody knows
    ("customers", "bob", "Bob", 22),
    ("orders", "o1", ["ann", 9], 23),  # and back
    ("orders", "o2", None, 24),
    ("customers", "ann", None, 30),
    ("customers", "bob", None, 31),  # nobody refers to him any more
]


@pytest.mark.parametrize("partitions", [1, {"orders": 3, "customers": 2}])
def test_inner_join_has_the_left_rows_that_refer_to_a_row(partitions: Any) -> None:
    found = told(SENT, partitions=partitions)
    by_key = {key: [change for change in found if change[0] == key] for key in ("o1", "o2", "o3")}
    assert by_key == {
        "o1": [
            ("o1", None, [1, "Ann"], 10),
            ("o1", [1, "Ann"], [1, "Anna"], 20),
            ("o1", [1, "Anna"], [9, "Anna"], 20),
            ("o1", [9, "Anna"], None, 21),
            ("o1", None, [9, "Bob"], 22),
            ("o1", [9, "Bob"], [9, "Anna"], 23),
            ("o1", [9, "Anna"], None, 30),
        ],
        "o2": [
            ("o2", None, [2, "Ann"], 11),
            ("o2", [2, "Ann"], [2, "Anna"], 20),
            ("o2", [2, "Anna"], None, 24),
        ],
        "o3": [],
    }


@pytest.mark.parametrize("partitions", [1, {"orders": 2, "customers": 3}])
def test_left_join_has_all_left_rows(partitions: Any) -> None:
    found = told(SENT, "left", partitions)
    by_key = {key: [change for change in found if change[0] == key] for key in ("o1", "o2", "o3")}
    assert by_key == {
        "o1": [
            ("o1", None, [1, None], 10),
            ("o1", [1, None], [1, "Ann"], 10),
            ("o1", [1, "Ann"], [1, "Anna"], 20),
            ("o1", [1, "Anna"], [9, "Anna"], 20),
            ("o1", [9, "Anna"], [9, None], 21),
            ("o1", [9, None], [9, "Bob"], 22),
            ("o1", [9, "Bob"], [9, "Anna"], 23),
            ("o1", [9, "Anna"], [9, None], 30),
        ],
        "o2": [
            ("o2", None, [2, "Ann"], 11),
            ("o2", [2, "Ann"], [2, "Anna"], 20),
            ("o2", [2, "Anna"], None, 24),
        ],
        "o3": [("o3", None, [3, None], 12)],
    }


def test_without_a_function_a_row_has_both_values_and_a_field_may_be_the_foreign_key() -> None:
    job = Job("j")
    orders, customers = job.table(job.topic("orders")), job.table(job.topic("customers", key="int"))
    table = orders.join(customers, on="customer", name="both")
    table.to_stream().to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("customers", {"name": "Ann"}, key=7)
        driver.send("orders", {"customer": 7}, key="o1")
        assert driver.table(table) == {"o1": {"left": {"customer": 7}, "right": {"name": "Ann"}}}


def test_result_can_be_grouped_looked_up_and_joined() -> None:
    job = Job("j")
    table = joined(job, "left").filter(lambda row: row[0] < 100)
    groups = table.group_by(lambda row: row[1], name="customers-orders").aggregate(n=count())
    groups.to_stream().to(job.topic("groups"))
    notes = job.table(job.topic("notes"))
    both = table.join(notes, lambda row, note: [*row, note], how="left")
    both.to_stream().to(job.topic("out"))
    job.stream(job.topic("calls")).join(table, lambda call, row: [call, *row]).to(job.topic("called"))
    with Driver(job, partitions={"orders": 3, "customers": 2, "notes": 4, "calls": 4}) as driver:
        for topic, key, value, at_ms in SENT[:5]:
            driver.send(topic, value, key=key, timestamp=at_ms)
        driver.send("notes", "urgent", key="o2")
        driver.send("calls", "hello", key="o2")
        assert driver.table(groups) == {"Ann": {"n": 0}, "Anna": {"n": 2}}
        assert driver.table(both) == {
            "o1": [1, "Anna", None],
            "o2": [2, "Anna", "urgent"],
            "o3": [3, None, None],
        }
        assert driver.read_values("called") == [["hello", 2, "Anna"]]


def test_event_time_crosses_all_stages_and_a_bounded_run_ends() -> None:
    job = Job("j")
    table = joined(job, "left")
    changes = table.to_stream().filter(lambda row: row is not None)
    windows = changes.window(Tumbling(timedelta(milliseconds=10)), name="changes")
    windows.aggregate(n=count()).to(job.topic("out"))
    with Driver(job, partitions={"orders": 3, "customers": 2}) as driver:
        for number in range(100, 130):
            driver.send("customers", number, key=f"c{number % 3}", timestamp=number)
            driver.send("orders", [f"c{number % 4}", number], key=f"o{number}", timestamp=number)
        driver.finish()
        assert driver.late == 0
        counted = {row["start"]: 0 for row in driver.read_values("out")}
        for record in driver.records("out"):
            counted[record.value["start"]] += record.value["n"]
    assert set(counted) == {100, 110, 120}
    assert sum(counted.values()) == 30 + sum(1 for _ in answers_again())


def answers_again() -> Iterator[int]:
    """The orders that change because their customer does, in the test above."""
    for number in range(100, 130):
        for order in range(100, number):
            if order % 4 == number % 3:
                yield order


# --- the relational join, in any order ----------------------------------------------------------------------


class Shuffled(Driver):
    """Reads the inputs of all shards in any order, and leaves records unread for some time. One of the
    repartition topics may be read much later than the others.
    """

    chance: random.Random
    slow = ""
    is_lazy = False

    def _next(self) -> Any:
        if self.is_lazy and self.chance.random() < 0.3:
            return None
        heads: list[Any] = []
        for stage in self.topology.stages:
            for partition in range(self._stage_sizes[stage.name]):
                shard = self._shards.get(ShardId(stage.name, partition))
                for number, source in enumerate(stage.inputs):
                    committed, _ = self._committed.get((source.topic.name, partition), (0, ""))
                    offset = committed if shard is None else shard.next_offset(number)
                    held = self._topics.partitions(source.topic.name)[partition]
                    record = held.first_from(offset, source.topic.isolation)
                    if self.is_lazy and source.name == self.slow and self.chance.random() < 0.9:
                        continue
                    if record is not None:
                        heads.append((stage, record))
        if not heads:
            return None
        stage, record = self.chance.choice(heads)
        return self._shard(stage, record.partition()), record


KEYS = ["o1", "o2", "o3"]
CUSTOMERS = ["ann", "bob", "cid"]


def relational(orders: dict[str, Any], customers: dict[str, Any], how: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, (customer, number) in orders.items():
        right = customers.get(customer)
        if right is not None or how == "left":
            found[key] = [number, right]
    return found


def check(seed: int) -> None:
    """Play the changes of a seed, and compare the table, what was told, and what is kept with the model."""
    chance = random.Random(seed)
    how = chance.choice(["inner", "left"])
    job = Job("j")
    table = joined(job, how)
    table.to_stream().to(job.topic("out"))
    rows: dict[str, dict[str, Any]] = {"orders": {}, "customers": {}}
    counts = {"orders": chance.randrange(1, 4), "customers": chance.randrange(1, 4)}
    with Shuffled(job, partitions=counts, auto_barrier=False) as driver:
        driver.chance, driver.is_lazy = chance, True
        driver.slow = chance.choice(["", "priced", "priced-answers", "priced-subscriptions"])
        for number in range(chance.randrange(1, 60)):
            topic = chance.choice(["orders", "orders", "customers"])
            key = chance.choice(KEYS if topic == "orders" else CUSTOMERS)
            value: Any = None
            if chance.random() < 0.75:
                value = [chance.choice([*CUSTOMERS, None]), number] if topic == "orders" else number
            driver.send(topic, value, key=key, timestamp=chance.randrange(1, 100))
            if value is None:
                rows[topic].pop(key, None)
            else:
                rows[topic][key] = value
            if chance.random() < 0.4:
                driver.barrier()
            if chance.random() < 0.1:
                driver.crash()
        driver.is_lazy = False
        driver.settle()
        while driver._next() is not None:  # what was left unread with nothing open
            driver._advance(one_by_one=False)
            driver.settle()
        expected = relational(rows["orders"], rows["customers"], how)
        assert driver.table(table) == expected
        last = {record.key: record.value for record in driver.records("out")}
        assert {key: value for key, value in last.items() if value is not None} == expected
        assert_nothing_is_left_over(driver, rows["orders"], how)


def entries_of(driver: Driver, stage: str, store: str) -> dict[tuple[int, bytes], bytes]:
    """The entries of a store in all shards."""
    found: dict[tuple[int, bytes], bytes] = {}
    for partition in range(driver._stage_sizes[stage]):
        shard = driver._shard(driver.topology.stage(stage), partition)
        table: Any = shard.state.tables[store]
        for key in shard._store.keys_of(store):
            found[partition, key] = table.get(key)
    return found


def assert_nothing_is_left_over(driver: Driver, orders: dict[str, Any], how: str) -> None:
    """Each foreign key of an order has one subscription, with its version; and no answer waits."""
    links = {
        key.decode(): decode_link(raw)
        for (_partition, key), raw in entries_of(driver, "orders", "priced-links//links").items()
    }
    assert set(links) == {key for key, (target, _) in orders.items() if target is not None or how == "left"}
    entries = entries_of(driver, "customers", "priced-subscribers//subscribers")
    subscribed = {key: decode_version(raw) for (_partition, key), raw in entries.items()}
    expected = {
        bytes((len(link.target),)) + link.target + key.encode(): link.version
        for key, link in links.items()
        if link.target is not None
    }
    assert subscribed == expected
    assert entries_of(driver, "priced", "priced//early") == {}


@pytest.mark.parametrize("seed", range(150))
def test_result_is_the_relational_join_in_whatever_order_everything_is_read(seed: int) -> None:
    check(seed)


def assert_caught() -> None:
    """At least one seed notices."""
    for seed in range(60):
        try:
            check(seed)
        except AssertionError:
            return
    raise RuntimeError("nobody has noticed")


def test_model_notices_answers_that_are_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any answer counts, whatever its version is."""
    plain = foreign.ForeignTableOperator.compile
    newest: dict[bytes, Any] = {}

    def compiled(operator: Any, surroundings: Any, following: Any) -> Any:
        step = plain(operator, surroundings, following)

        def any_version(record: Any, key: bytes, message: Any) -> None:
            if isinstance(message, foreign.LeftRow):
                newest[key] = message.version
            elif key in newest:
                message = message._replace(version=newest[key])
            step(record, key, message)

        return any_version

    monkeypatch.setattr(foreign.ForeignTableOperator, "compile", compiled)
    assert_caught()


def test_model_notices_early_answers_that_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign._EarlyAnswers, "keep", lambda *_: None)
    assert_caught()


def test_model_notices_early_answers_that_are_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign._SeenVersions, "have", lambda *_: False)
    monkeypatch.setattr(foreign._SeenVersions, "add", lambda *_: None)
    assert_caught()


def test_model_notices_subscriptions_that_are_never_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = EntryTable.delete

    def delete(table: EntryTable, key: bytes) -> None:
        if not table.name.endswith("//subscribers"):
            plain(table, key)

    monkeypatch.setattr(EntryTable, "delete", delete)
    assert_caught()


def test_model_notices_versions_that_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = EntryTable.put

    def put(table: EntryTable, key: bytes, value: Any) -> None:
        if not table.name.endswith("//count"):
            plain(table, key, value)

    monkeypatch.setattr(EntryTable, "put", put)
    assert_caught()


# --- failures -------------------------------------------------------------------------------------------


def failing_for(bad: int, function: Callable[..., Any]) -> Callable[..., Any]:
    def checked(order: Any, *others: Any) -> Any:
        if order[1] == bad:
            raise ValueError("bad order")
        return function(order, *others)

    return checked


@pytest.mark.parametrize("part", ["on", "with_"])
def test_function_that_fails_stops_the_job_or_leaves_the_row_alone(part: str) -> None:
    def run(on_error: Any) -> tuple[list[Any], int]:
        job = Job("j")
        orders, customers = job.table(job.topic("orders")), job.table(job.topic("customers"))
        on = failing_for(2, customer_of) if part == "on" else customer_of
        with_ = failing_for(2, priced) if part == "with_" else priced
        table = orders.join(customers, with_, on=on, name="priced", on_error=on_error)
        table.to_stream().to(job.topic("out"))
        with Driver(job) as driver:
            driver.send("customers", "Ann", key="ann")
            for number in (1, 2, 3):
                driver.send("orders", ["ann", number], key="o1")
            return driver.read_values("out"), driver.skipped

    assert run("skip") == ([[1, "Ann"], [3, "Ann"]], 1)
    with pytest.raises(JobStopped, match="bad order"):
        run("stop")


def test_right_row_whose_function_has_failed_counts_as_no_row() -> None:
    def named(customer: Any) -> Any:
        if customer == "?":
            raise ValueError("no name")
        return customer

    job = Job("j")
    orders = job.table(job.topic("orders"))
    customers = job.table(job.topic("customers")).map(named, on_error="skip")
    orders.join(customers, priced, on=customer_of, name="priced", how="left").to_stream().to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("customers", "?", key="ann")
        driver.send("orders", ["ann", 1], key="o1")
        driver.send("customers", "Ann", key="ann")
        assert driver.read_values("out") == [[1, None], [1, "Ann"]]


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on": customer_of}, "got on=, but no name="),
        ({"name": "x"}, "got name= or version=, which are for joins by a foreign key"),
        ({"on": customer_of, "name": "x", "how": "outer"}, "how='outer' doesn't go with on="),
        ({"on": customer_of, "name": "two words"}, "join name"),
        ({"on": "", "name": "x"}, "empty field name"),
        ({"on": 3, "name": "x"}, "not a function"),
        ({"on": lambda: None, "name": "x"}, "is called with 1 argument"),
    ],
)
def test_impossible_joins_are_refused(options: dict[str, Any], message: str) -> None:
    job = Job("j")
    left, right = job.table(job.topic("a")), job.table(job.topic("b"))
    with pytest.raises(JobError, match=message):
        left.join(right, **options)


@dataclass
class Order:
    item: str
    customer: str | None = None


class PricedOrder(msgspec.Struct):
    item: str
    cents: int


@pytest.mark.parametrize("how", ["inner", "left"])
def test_field_that_the_model_lacks_is_refused_with_what_was_meant(how: Any) -> None:
    job = Job("j")
    orders, customers = job.table(job.topic("orders", value=Order)), job.table(job.topic("customers"))
    with pytest.raises(
        JobError, match="names the field 'costumer', but Order has none of that name"
    ) as refused:
        orders.filter(lambda order: order.item).join(customers, on="costumer", name="both", how=how)
    assert "Did you mean 'customer'?" in refused.value.remedy
    with pytest.raises(JobError, match="names a field, but the values there are text"):
        job.table(job.topic("t", value="text")).join(customers, on="customer", name="both", how=how)


def test_field_of_a_model_refers_and_none_refers_to_nothing() -> None:
    job = Job("j")
    orders, customers = job.table(job.topic("orders", value=Order)), job.table(job.topic("customers"))
    table = orders.join(
        customers, lambda order, name: [order.item, name], on="customer", name="both", how="left"
    )
    table.to_stream().to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("customers", "Ann", key="ann")
        driver.send("orders", Order("pen", "ann"), key="o1")
        driver.send("orders", Order("ink"), key="o2")
        assert driver.table(table) == {"o1": ["pen", "Ann"], "o2": ["ink", None]}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"item": "pen", "costumer": "ann"}, "the value has no such field, only item, costumer"),
        ({}, "the value has no fields"),
    ],
)
def test_row_without_the_field_fails_instead_of_referring_to_none(value: Any, reason: str) -> None:
    job = Job("j")
    orders, customers = job.table(job.topic("orders")), job.table(job.topic("customers"))
    table = orders.join(customers, on="customer", name="both", how="left", on_error=job.topic("bad"))
    table.to_stream().to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("orders", value, key="o1")
        driver.send("orders", {"customer": None}, key="o2")
        (letter,) = driver.records("bad")
        error = (dict(letter.headers)["fcluster.error"] or b"").decode()
        assert reason in error
        assert "lambda row: row.get('customer')" in error
        assert driver.table(table) == {"o2": {"left": {"customer": None}, "right": None}}


def test_objects_that_a_map_returns_and_that_lack_the_field_fail() -> None:
    job = Job("j")
    orders = job.table(job.topic("orders")).map(lambda order: PricedOrder(order["item"], 100))
    table = orders.join(job.table(job.topic("customers")), on="customer", name="both")
    table.to_stream().to(job.topic("out"))
    with Driver(job) as driver, pytest.raises(JobStopped, match="PricedOrder, which has none of that name"):
        driver.send("orders", {"item": "pen"}, key="o1")


def employees(job: Job, of: Any) -> None:
    people = job.table(job.topic("people"))
    people.join(of, priced, on=customer_of, name="bosses").to_stream().to(job.topic("out"))


def test_table_is_joined_with_a_copy_of_itself() -> None:
    job = Job("j")
    employees(job, job.table(job.topic("people")))
    with pytest.raises(
        JobError, match="The join 'bosses' by a foreign key would lead back to a stage in front of it"
    ) as refused:
        Driver(job)
    assert "job.stream(topic).to(copy)" in refused.value.remedy
    job = Job("j")
    copy = job.topic("copy")
    job.stream(job.topic("people")).to(copy)
    employees(job, job.table(copy))
    with Driver(job) as driver:
        driver.send("people", [None, 1], key="ann")
        driver.send("people", ["ann", 2], key="bob")
        assert driver.read_values("out") == [[2, [None, 1]]]


def test_result_is_not_joined_with_the_left_table_again() -> None:
    job = Job("j")
    again = joined(job).join(job.table(job.topic("orders")), lambda row, order: [*row, order])
    again.to_stream().to(job.topic("out"))
    with pytest.raises(JobError, match="'priced' by a foreign key would lead back"):
        Driver(job)


def built(grow: Callable[[Job], Table]) -> Any:
    job = Job("j")
    grow(job).to_stream().to(job.topic("out"))
    return Driver(job).topology


def test_repartition_topics_have_as_many_partitions_as_the_tables_that_they_lead_to() -> None:
    counts = plan_topics(built(joined), {"orders": 3, "customers": 2}).counts
    found = {
        name: counts[repartition_topic("j", f"priced{name}")] for name in ("", "-subscriptions", "-answers")
    }
    assert found == {"": 3, "-subscriptions": 2, "-answers": 3}


def test_internal_topics_may_have_other_names() -> None:
    plain = built(joined)
    topology = plain.with_internal_topics({name: f"{name}-x" for name in plain.internal_topics})
    read = {source.topic.name for source in topology.inputs if source.internal}
    written = {sink.name for stage in topology.stages for chain in stage.chains for sink in chain.sinks}
    assert read == written - {"out"}
    assert all(name.endswith("-x") for name in read)
    assert incompatibility(topology.describe(), plain) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda job: joined(job), None),
        (lambda job: joined(job).filter(lambda row: row[0]), None),
        (lambda job: joined(job, "left"), "used to have the inner join of two tables, and now has the left"),
        (
            lambda job: job.table(job.topic("orders")).join(
                job.table(job.topic("customers")), on=lambda order: order[1], name="priced"
            ),
            "on= of the join 'priced' used the function customer_of, and now uses the function <lambda>",
        ),
        (
            lambda job: job.table(job.topic("orders")).join(
                job.table(job.topic("customers")), on=customer_of, name="costly"
            ),
            "The join 'priced-links' of stage 'orders' has state, but is no longer in the job",
        ),
    ],
)
def test_changed_job_is_refused_if_what_is_kept_does_not_fit(changed: Any, reason: str | None) -> None:
    before, after = built(joined), built(changed)
    found = incompatibility(before.describe(), after)
    assert (found is None) if reason is None else (found is not None and reason in found)


def _unless_bad(row: Any) -> Any:
    if row[-1] == "bad":
        raise ValueError("bad")
    return row


@pytest.mark.parametrize("side", ["orders", "customers"])
def test_deleted_row_goes_although_its_function_failed_before(side: str) -> None:
    """The failure isn't told; so it is not known what the row was, when it is deleted."""
    job = Job("j")
    tables = {name: job.table(job.topic(name)) for name in ("orders", "customers")}
    tables[side] = tables[side].map(_unless_bad, on_error="skip")
    joined_table = tables["orders"].join(tables["customers"], priced, on=customer_of, name="priced")
    joined_table.to_stream().to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("customers", ["Ann"], key="ann")
        driver.send("orders", ["ann", 1], key="o1")
        assert driver.table(joined_table) == {"o1": [1, ["Ann"]]}
        driver.send(side, ["ann", "bad"], key={"orders": "o1", "customers": "ann"}[side])
        driver.send(side, None, key={"orders": "o1", "customers": "ann"}[side])
        driver.send("customers", ["Anna"], key="bob")
        assert driver.table(joined_table) == {}
        assert driver.skipped == 1


def test_left_row_that_a_new_filter_leaves_out_goes_when_it_is_deleted() -> None:
    def made(*, filtered: bool) -> tuple[Job, Table]:
        job = Job("j")
        orders, customers = job.table(job.topic("orders")), job.table(job.topic("customers"))
        if filtered:
            orders = orders.filter(lambda order: order[1] > 1)
        table = orders.join(customers, priced, on=customer_of, name="priced")
        table.to_stream().to(job.topic("out"))
        return job, table

    (before, _), (after, table) = made(filtered=False), made(filtered=True)
    with Driver(before) as driver:
        driver.send("customers", "Ann", key="ann")
        driver.send("orders", ["ann", 1], key="o1")
        driver.restart(after)
        driver.send("orders", None, key="o1")
        driver.send("customers", "Anna", key="ann")
        assert driver.table(table) == {}
        assert driver.read_values("out") == [[1, "Ann"], None]
