"""Declared states in `fcluster.testing` can be inspected, and don't depend on barriers and crashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.orders.orders import COUNT, LAST, PRICES, SEEN, counted, orders
from examples.orders.orders import job as orders_job
from fcluster import Job, ListState, MapState, ValueState
from fcluster.engine import entries
from fcluster.engine.state import ShardState, StoreMeta
from fcluster.testing import Driver
from fcluster.testing.shards import MemoryStore

HOUR_MS = 3_600_000


def order(number: str, price: int) -> dict[str, Any]:
    return {"number": number, "price": price}


# --- the example ----------------------------------------------------------------------------------------


def test_orders_are_counted_once_within_an_hour() -> None:
    with Driver(orders_job) as driver:
        for number, price, at_ms in [("a", 5, 0), ("b", 3, 1), ("a", 5, HOUR_MS - 1), ("a", 5, 3 * HOUR_MS)]:
            driver.send(orders, order(number, price), key="ann", timestamp=1 + at_ms)
        assert [value["number"] for value in driver.read_values(counted)] == ["a", "b", "a"]
        assert driver.state("customer", "ann", COUNT) == 3
        assert driver.state("customer", "ann", LAST) == ["a", "b", "a"]
        assert list(driver.state("customer", "ann", PRICES)) == [(3, "b"), (5, "a")]
        assert driver.state("customer", "ann", SEEN) == {"a": 1 + 3 * HOUR_MS}


def test_customer_who_never_ordered_has_no_state() -> None:
    with Driver(orders_job) as driver:
        found = [driver.state("customer", "ann", state) for state in (COUNT, LAST, PRICES, SEEN)]
        assert found == [None, [], {}, {}]


def test_state_that_the_handler_does_not_declare_is_refused() -> None:
    with Driver(orders_job) as driver, pytest.raises(LookupError, match="declares no value 'count'"):
        driver.state("customer", "ann", ValueState("count", "int"))


# --- the same whatever happens in between ---------------------------------------------------------------

TOTAL: ValueState[Any] = ValueState("total")
RECENT: MapState[int, Any] = MapState("recent", key="int", ttl=timedelta(milliseconds=10))
WORDS: MapState[str, int] = MapState("words", value="int")
QUEUE: ListState[str] = ListState("queue", "text", ttl=timedelta(milliseconds=15))


class Kinds:
    """A job whose outputs show everything in its handler's states."""

    def __init__(self) -> None:
        self.job = Job("kinds")
        self.words, self.out = self.job.topic("words"), self.job.topic("out")

        @self.job.process(self.words, to=self.out, states=[TOTAL, RECENT, WORDS, QUEUE], on_error="skip")
        def handle(ctx: Any, word: str) -> Iterator[Any]:
            total, recent = ctx.value(TOTAL), ctx.map(RECENT)
            words, queue = ctx.map(WORDS), ctx.list(QUEUE)
            if word == "forget":
                for known, _count in words.scan("b"):
                    del words[known]
                total.clear()
            counts = total.get({})
            counts[word] = counts.get(word, 0) + 1
            total.set(counts)
            recent[ctx.offset] = [word]
            words[word] = words.get(word, 0) + 1
            queue.append(word)
            if len(queue) > 3:
                queue.popleft()
            yield {
                "total": counts,
                "recent": list(recent.scan()),
                "newest": next(recent.scan(reverse=True), None),
                "words": list(words.scan()),
                "queue": list(queue),
            }
            if word == "fail":
                raise ValueError("after the changes")


sent_words = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "forget", "fail"]), st.sampled_from(["k", "l"]), st.integers(0, 12)
    ),
    max_size=12,
)
pauses = st.lists(st.sampled_from(["", "", "barrier", "crash", "look"]), min_size=12, max_size=12)


def run_with(sent: list[tuple[str, str, int]], between: list[str]) -> tuple[Any, Any]:
    """All outputs and states, with these actions between the records."""
    kinds = Kinds()
    driver = Driver(kinds.job, partitions=1, auto_barrier=not between)
    at_ms = 100

    def look() -> Any:
        return [driver.state("handle", key, one) for key in "kl" for one in (TOTAL, RECENT, WORDS, QUEUE)]

    for (word, key, passed_ms), what in zip(sent, between or [""] * len(sent), strict=False):
        at_ms += passed_ms
        driver.send(kinds.words, word, key=key, timestamp=at_ms)
        if what == "look":
            look()
        elif what:
            getattr(driver, what)()
    driver.settle()
    return driver.read_values(kinds.out), look()


@settings(max_examples=150, deadline=None)
@given(sent_words, pauses)
def test_states_do_not_depend_on_barriers_crashes_and_inspection(
    sent: list[tuple[str, str, int]], between: list[str]
) -> None:
    assert run_with(sent, between) == run_with(sent, [])


keys = st.binary(max_size=2)


@given(
    st.lists(st.dictionaries(keys, st.sampled_from([b"", b"1", b"2"]), max_size=6), max_size=6),
    keys,
    keys,
    st.integers(0, 5),
    st.booleans(),
)
def test_store_scans_in_the_order_of_the_keys(
    batches: list[dict[bytes, bytes]], start: bytes, stop: bytes, limit: int, reverse: bool
) -> None:
    store, model = MemoryStore(), dict[bytes, bytes]()
    for changes in batches:
        store.apply(changes, StoreMeta())
        model = {key: value for key, value in {**model, **changes}.items() if value}
    wanted = sorted((pair for pair in model.items() if start <= pair[0] < stop), reverse=reverse)
    assert store.scan(start, stop, limit, reverse=reverse) == wanted[:limit]
    assert [store.get(key) for key in model] == list(model.values())


# --- it must be able to fail ----------------------------------------------------------------------------


def scan_misses_the_open_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans use only what is in the store."""
    monkeypatch.setattr(entries.EntryTable, "_note_group", lambda _self, _key: None)


def expiry_is_not_in_the_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expired entries are deleted in the store, and are back after a restore."""
    original = ShardState.freeze

    def planted(self: ShardState, epoch: int) -> Any:
        delta = original(self, epoch)
        if delta is not None:
            kept = {key: value for key, value in delta.changes.items() if value}
            delta = type(delta)(delta.epoch, delta.previous_epoch, kept)
        return delta

    monkeypatch.setattr(ShardState, "freeze", planted)


def failed_record_leaves_its_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo leaves them out."""
    monkeypatch.setattr(entries.EntryTable, "rollback", lambda _self: None)


@pytest.mark.parametrize(
    "plant", [scan_misses_the_open_layer, expiry_is_not_in_the_delta, failed_record_leaves_its_entries]
)
def test_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = [("a", "k", 1), ("fail", "k", 1), ("b", "k", 1), ("forget", "k", 9), ("c", "k", 9), ("a", "k", 9)]
    wanted = run_with(sent, [])
    plant(monkeypatch)
    assert run_with(sent, ["", "", "barrier", "barrier", "crash", ""]) != wanted
