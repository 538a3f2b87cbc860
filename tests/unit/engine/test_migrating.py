"""States whose declaration has changed: former entries are migrated once, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster import Context, DocumentState, Job, ListState, MapState, ValueState
from fcluster.common.errors import IncompatibleState, JobError, ProcessingError
from fcluster.engine.state import StateTable
from fcluster.engine.steps import RecordError
from fcluster.graph.states import State
from fcluster.testing import Driver, JobStopped
from tests.unit.engine.test_entries import Handler


class Counted:
    """A function of a migration that counts its calls."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function, self.calls = function, 0

    def __call__(self, value: Any) -> Any:
        self.calls += 1
        return self._function(value)


def reopened(handler: Handler, *states: State) -> None:
    """The handler as another version of the job has it, after a restart."""
    handler.shard.flush()
    handler.states = states
    handler.open()


def in_cents(value: Any) -> Any:
    return {"cents": round(100 * value["euros"])}


# --- once -------------------------------------------------------------------------------------------------


def test_former_entry_is_migrated_when_it_is_met_and_never_again() -> None:
    handler = Handler((ValueState("v"),))
    handler.value().set({"euros": 1.5})
    handler.barrier()
    migrate = Counted(in_cents)
    state: Any = ValueState("v", version=2, migrate={1: migrate})
    reopened(handler, state)
    assert handler.value().get() == {"cents": 150}
    assert handler.value().get() == {"cents": 150}
    assert len(handler.barrier()) == 1
    assert handler.value().get() == {"cents": 150}
    assert handler.barrier() == {}
    reopened(handler, state)
    assert handler.value().get() == {"cents": 150}
    assert migrate.calls == 1
    assert handler.barrier() == {}


def test_number_that_is_only_read_is_migrated_once_too() -> None:
    handler = Handler((ValueState("v", "int"),))
    handler.value().set(7)
    handler.barrier()
    migrate = Counted(str)
    state: Any = ValueState("v", "text", version=2, migrate={1: ("int", migrate)})
    reopened(handler, state)
    assert [handler.value().get() for _ in range(3)] == ["7", "7", "7"]
    assert len(handler.barrier()) == 1
    reopened(handler, state)
    assert handler.value().get() == "7"
    assert migrate.calls == 1


def test_entries_that_no_record_meets_stay_as_they_are() -> None:
    handler = Handler((MapState("m", value="int"),))
    handler.map().update({"a": 1, "b": 2})
    handler.barrier()
    handler.shard.flush()
    before = dict(handler.store.values)
    reopened(handler, MapState("m", value="int", version=2, migrate={1: lambda n: n + 100}))
    handler.map()["a"] += 1
    (key,) = handler.barrier()
    handler.shard.flush()
    assert {one: raw for one, raw in handler.store.values.items() if one != key} == {
        one: raw for one, raw in before.items() if one != key
    }
    assert dict(handler.map()) == {"a": 102, "b": 102}


def test_maps_and_lists_are_migrated_entry_by_entry_also_in_scans() -> None:
    handler = Handler((MapState("m", value="int"), ListState("l")))
    handler.map().update({f"{n:03}": n for n in range(50)})
    handler.list().extend([{"euros": n} for n in range(5)])
    handler.barrier()
    first, second = Counted(lambda n: [n]), Counted(in_cents)
    reopened(
        handler,
        MapState("m", version=2, migrate={1: ("int", first)}),
        ListState("l", version=2, migrate={1: second}),
    )
    assert dict(handler.map().scan("010", "020", reverse=True)) == {f"{n:03}": [n] for n in range(10, 20)}
    assert first.calls == 10
    handler.map()["010"].append(1)
    assert handler.list().popleft() == {"cents": 0}
    assert handler.list()[-1] == {"cents": 400}
    handler.barrier()
    assert dict(handler.map()) == {f"{n:03}": [n, 1] if n == 10 else [n] for n in range(50)}
    assert list(handler.list()) == [{"cents": 100 * n} for n in range(1, 5)]
    assert (first.calls, second.calls) == (50, 5)


def test_versions_are_passed_one_after_another() -> None:
    handler = Handler((ValueState("v"),))
    handler.value().set({"euros": 1})
    handler.barrier()
    second: Any = MapState("m", version=2)
    reopened(handler, ValueState("v", version=2, migrate={1: in_cents}), second)
    handler.map()["k"] = {"cents": 5}
    handler.barrier()

    def in_mills(value: Any) -> Any:
        return {"mills": 10 * value["cents"]}

    third: Any = {1: in_cents, 2: in_mills}
    reopened(
        handler,
        ValueState("v", version=3, migrate=third),
        MapState("m", version=3, migrate={2: in_mills}),
    )
    assert handler.value().get() == {"mills": 1000}
    assert handler.map()["k"] == {"mills": 50}


@dataclass
class Cents:
    cents: int


@dataclass
class Money:
    cents: int
    currency: str


def as_cents(value: Any) -> Cents:
    return Cents(round(100 * value["euros"]))


@pytest.mark.parametrize("former", [None, Cents], ids=["dict", "model"])
def test_next_function_gets_the_same_from_an_entry_and_from_the_function_before(former: Any) -> None:
    handler = Handler((MapState("m"),))
    handler.map().update({"met": {"euros": 1}, "unmet": {"euros": 2}})
    handler.barrier()
    reopened(handler, MapState("m", value=Cents, version=2, migrate={1: as_cents}))
    assert handler.map()["met"] == Cents(100)
    handler.barrier()
    got: list[Any] = []

    def in_money(value: Any) -> Money:
        got.append(value)
        return Money(value.cents if former else value["cents"], "EUR")

    last: Any = in_money if former is None else (former, in_money)
    reopened(handler, MapState("m", value=Money, version=3, migrate={1: as_cents, 2: last}))
    assert dict(handler.map()) == {"met": Money(100, "EUR"), "unmet": Money(200, "EUR")}
    assert got == ([{"cents": 100}, {"cents": 200}] if former is None else [Cents(100), Cents(200)])


def test_entry_that_is_put_or_deleted_needs_no_migration() -> None:
    handler = Handler((MapState("m"),))
    handler.map().update({"a": 1, "b": 1})
    handler.barrier()
    reopened(handler, MapState("m", version=2, migrate={1: lambda _: 1 / 0}))
    handler.map()["a"] = 2
    handler.tables["h/m"].delete(handler.map()._entry("b"))
    handler.barrier()
    assert dict(handler.map()) == {"a": 2}


# --- undo, crashes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "value"), [("int", 7), ("json", {"n": 7})])
def test_migration_is_undone_with_its_record(kind: Any, value: Any) -> None:
    handler = Handler((ValueState("v", kind),))
    handler.value().set(value)
    handler.barrier()
    migrate = Counted(lambda former: [former])
    reopened(handler, ValueState("v", version=2, migrate={1: (kind, migrate)}))
    table = handler.tables["h/v"]
    table.begin_undo()
    handler.value().get().append("wrong")
    table.rollback()
    assert handler.barrier() == {}
    table.begin_undo()
    assert handler.value().get() == [value]
    table.check_changed()
    assert len(handler.barrier()) == 1
    assert migrate.calls == 2


def test_migration_of_an_epoch_that_is_lost_is_done_again() -> None:
    handler = Handler((ValueState("v", "int"),))
    handler.value().set(7)
    handler.barrier()
    migrate = Counted(lambda n: n + 1)
    reopened(handler, ValueState("v", "int", version=2, migrate={1: migrate}))
    assert handler.value().get() == 8
    handler.freeze()
    handler.shard.discard()
    assert handler.value().get() == 8
    handler.epoch -= 1
    handler.barrier()
    assert handler.value().get() == 8
    assert migrate.calls == 2


def test_time_of_an_entry_stays_and_expired_ones_are_deleted_unmigrated() -> None:
    hour = timedelta(hours=1)
    handler = Handler((MapState("m", ttl=hour),))
    handler.at(0)
    handler.map()["old"] = 1
    handler.at(1_800_000)
    handler.map()["new"] = 1
    handler.barrier()
    migrate = Counted(lambda n: [n])
    state: Any = MapState("m", ttl=hour, version=2, migrate={1: migrate})
    reopened(handler, state)
    handler.at(3_600_000)
    assert dict(handler.map()) == {"new": [1]}
    handler.barrier()
    reopened(handler, state)
    handler.at(5_399_999)
    assert dict(handler.map()) == {"new": [1]}
    handler.at(5_400_000)
    assert dict(handler.map()) == {}
    handler.barrier()
    assert migrate.calls == 1, "only the one that a record met"


# --- failures ---------------------------------------------------------------------------------------------


def test_function_that_fails_is_named_with_state_and_version() -> None:
    handler = Handler((ValueState("v"),))
    handler.value().set({})
    handler.barrier()
    reopened(handler, ValueState("v", version=2, migrate={1: in_cents}))
    with pytest.raises(RecordError, match=r"migrate\[1\] of the state 'h/v' failed: KeyError: 'euros' \(.*:"):
        handler.value().get()
    assert handler.barrier() == {}


def test_result_that_can_not_be_stored_is_named() -> None:
    handler = Handler((ValueState("v", "int"),))
    handler.value().set(1)
    handler.barrier()
    reopened(handler, ValueState("v", version=2, migrate={1: ("int", lambda n: {n})}))
    handler.value().get()
    with pytest.raises(ProcessingError, match=r"store 'h/v'.* is a set"):
        handler.freeze()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            ValueState("v", Cents, version=2, migrate={1: lambda value: {"cents": 1}}),
            r"migrate\[1\] of the state 'h/v' returned \{'cents': 1\}, a dict, but Cents is declared",
        ),
        (
            ValueState("v", version=3, migrate={1: lambda value: {1, 2}, 2: lambda value: value}),
            r"migrate\[1\] of the state 'h/v' failed: .* is of type set, which JSON can't hold",
        ),
        (
            ValueState("v", version=3, migrate={1: lambda value: 5, 2: (Cents, lambda value: value)}),
            r"migrate\[1\] of the state 'h/v' failed: .*Cents",
        ),
    ],
    ids=["last", "before-the-last", "not-of-the-former-model"],
)
def test_result_that_is_not_of_its_version_is_named_with_its_function(state: Any, message: str) -> None:
    handler = Handler((ValueState("v"),))
    handler.value().set({})
    handler.barrier()
    reopened(handler, state)
    with pytest.raises(RecordError, match=message):
        handler.value().get()
    assert handler.barrier() == {}


def test_entry_of_a_version_that_nobody_knows_is_an_error() -> None:
    handler = Handler((ValueState("v"),))
    handler.value().set(1)
    handler.barrier()
    reopened(handler, ValueState("v", version=3, migrate={2: lambda value: value}))
    with pytest.raises(RecordError, match="has an entry of version 1, and its migrate= doesn't say how"):
        handler.value().get()


# --- ctx.state --------------------------------------------------------------------------------------------


def document(handler: Handler) -> StateTable:
    return handler.shard.documents["h"]


def test_documents_have_versions_too() -> None:
    handler = Handler(())
    document(handler).get(b"key")["euros"] = 1.5
    document(handler).get(b"other")["euros"] = 2
    handler.barrier()
    migrate = Counted(in_cents)
    state: Any = DocumentState(version=2, migrate={1: migrate})
    reopened(handler, state)
    assert document(handler).load_many([b"key"]) == 1
    document(handler).get(b"key")["cents"] += 1
    assert len(handler.barrier()) == 1
    assert document(handler).get(b"key") == {"cents": 151}
    assert handler.barrier() == {}
    reopened(handler, state)
    assert document(handler).load_many([b"key"]) == 1
    assert document(handler).get(b"key") == {"cents": 151}
    assert migrate.calls == 1
    assert document(handler).peek(b"other") == {"cents": 200}
    document(handler).begin_undo()
    document(handler).get(b"other").clear()
    document(handler).rollback()
    assert document(handler).get(b"other") == {"cents": 200}


def test_document_that_is_read_only_is_written_in_its_new_form() -> None:
    handler = Handler(())
    document(handler).get(b"key")["euros"] = 1
    handler.barrier()
    reopened(handler, DocumentState(version=2, migrate={1: in_cents}))
    document(handler).get(b"key")
    assert len(handler.barrier()) == 1
    document(handler).get(b"key").clear()
    assert list(handler.barrier().values()) == [b""]


def test_document_has_to_stay_a_dict() -> None:
    handler = Handler(())
    document(handler).get(b"key")["euros"] = 1
    handler.barrier()
    reopened(handler, DocumentState(version=2, migrate={1: lambda state: [state]}))
    with pytest.raises(RecordError, match=r"migrate\[1\] of ctx\.state of 'h' returned .*, not a dict"):
        document(handler).get(b"key")


# --- declarations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: ValueState("v", version=0), "is not a number from 1 to"),
        (lambda: ValueState("v", version="2"), "is not a number from 1 to"),  # type: ignore[arg-type]
        (lambda: ValueState("v", version=2, migrate=[in_cents]), "is not a dict"),  # type: ignore[arg-type]
        (lambda: ValueState("v", migrate={1: in_cents}), "has functions for 1, but the state has version=1"),
        (lambda: ValueState("v", version=3, migrate={1: in_cents}), "but the state has version=3"),
        (lambda: ValueState("v", version=2, migrate={"1": in_cents}), "but the state has version=2"),  # type: ignore[dict-item]
        (lambda: ValueState("v", version=1, migrate={0: in_cents}), "begins with version 0"),
        (lambda: ValueState("v", version=2, migrate={1: "int"}), r"migrate\[1\] of the state 'v' is 'int'"),
        (lambda: ValueState("v", version=2, migrate={1: ("float", in_cents)}), "is unknown"),
        (lambda: DocumentState("v", version=2), "ctx.state has no name, codec or TTL"),
        (lambda: DocumentState(ttl=timedelta(1)), "ctx.state has no name, codec or TTL"),
    ],
)
def test_wrong_declaration_is_refused_with_what_to_write(declare: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        declare()


# --- in a job ---------------------------------------------------------------------------------------------


@dataclass
class Total:
    euros: float


@dataclass
class TotalInCents:
    cents: int


def counting(state: State, add: Callable[[Any, Any], Any], **options: Any) -> Job:
    job = Job("count")
    dead = job.topic("dead", value="bytes", key="bytes")
    stream = job.stream(job.topic("in"))
    on_error = {"on_error": dead} if options.pop("tolerant", False) else {}
    stream.process(add, name="add", states=[state], to=job.topic("out"), **on_error, **options)
    return job


FORMER: ValueState[Total] = ValueState("total", Total)
CHANGED: ValueState[TotalInCents] = ValueState("total", TotalInCents)
MIGRATED: ValueState[TotalInCents] = ValueState(
    "total", TotalInCents, version=2, migrate={1: lambda former: TotalInCents(round(100 * former["euros"]))}
)


def add_euros(ctx: Context[str], euros: float) -> float:
    total = ctx.value(FORMER).get(Total(0.0))
    total.euros += euros
    ctx.value(FORMER).set(total)
    return total.euros


def add_cents(state: ValueState[TotalInCents]) -> Callable[[Any, Any], Any]:
    def add(ctx: Context[str], euros: float) -> int:
        total = ctx.value(state).get(TotalInCents(0))
        total.cents += round(100 * euros)
        ctx.value(state).set(total)
        return total.cents

    return add


def test_changed_model_is_refused_at_the_start_and_goes_on_with_a_migration() -> None:
    with Driver(counting(FORMER, add_euros)) as driver:
        for key in ("ann", "bob"):
            driver.send("in", 1.5, key=key)
        with pytest.raises(IncompatibleState) as refused:
            driver.restart(counting(CHANGED, add_cents(CHANGED)))
        assert refused.value.message == (
            "The state 'total' of the handler 'add' has a model that has changed: the field 'euros' is gone. "
            "(Undo the change; or declare it with version=2 and migrate={1: ('json', function)}, which gets "
            "each former value as JSON holds it.)"
        )
        driver.send("in", 1.5, key="ann")
        driver.restart(counting(MIGRATED, add_cents(MIGRATED)))
        driver.send("in", 0.01, key="ann")
        driver.crash()
        driver.send("in", 0.01, key="ann")
        assert driver.state("add", "bob", MIGRATED) == TotalInCents(150)
        driver.send("in", 0.01, key="bob")
        assert driver.read_values("out") == [1.5, 1.5, 3.0, 301, 302, 151]
        with pytest.raises(
            IncompatibleState, match="has entries of version 2, and is now declared with vers"
        ):
            driver.restart(counting(FORMER, add_euros))


def test_entry_that_can_not_be_migrated_is_a_failure_of_the_record_that_meets_it() -> None:
    def broken(_former: Any) -> Any:
        raise ValueError("no euros")

    state: Any = ValueState("total", TotalInCents, version=2, migrate={1: broken})
    with Driver(counting(FORMER, add_euros)) as driver:
        driver.send("in", 1.5, key="ann")
        driver.restart(counting(state, add_cents(state), tolerant=True))
        driver.send("in", 2.0, key="ann")
        driver.send("in", 2.0, key="bob")
        (letter,) = driver.dead_letters()
        assert "migrate[1] of the state 'add/total' failed: ValueError: no euros" in letter.error
        driver.restart(counting(state, add_cents(state)))
        with pytest.raises(JobStopped, match=r"migrate\[1\] of the state 'add/total' failed"):
            driver.send("in", 2.0, key="ann")
        driver.restart(counting(MIGRATED, add_cents(MIGRATED)))
        assert driver.read_values("out") == [1.5, 200, 350]


def test_documents_of_a_job_get_a_version() -> None:
    def former(ctx: Context[str], euros: float) -> None:
        ctx.state["euros"] = euros

    def present(ctx: Context[str], _euros: float) -> Any:
        return dict(ctx.state)

    job = Job("count")
    job.stream(job.topic("in")).process(former, name="add")
    with Driver(job) as driver:
        driver.send("in", 1.5, key="ann")
        with pytest.raises(
            IncompatibleState, match="may have entries of version 1, and migrate= has no func"
        ):
            driver.restart(counting(DocumentState(version=2), present))
        driver.restart(counting(DocumentState(version=2, migrate={1: in_cents}), present))
        assert driver.states("add") == {"ann": {"cents": 150}}
        driver.send("in", 0, key="ann")
        driver.crash()
        driver.send("in", 0, key="ann")
        assert driver.read_values("out") == [{"cents": 150}, {"cents": 150}]
        with pytest.raises(
            IncompatibleState, match=r"The state 'ctx\.state' of the handler 'add' has entries"
        ):
            driver.restart(job)


# --- at random --------------------------------------------------------------------------------------------

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "read", "scan", "delete", "barrier", "flush", "undo", "crash", "upgrade"]),
        st.sampled_from("abcd"),
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_any_order_of_changes_barriers_and_upgrades_gives_the_same_values(operations: Any) -> None:
    version = 1

    def declared() -> Any:
        migrate = {former: lambda value: [*value, "+"] for former in range(1, version)}
        return MapState("m", version=version, migrate=migrate)

    handler = Handler((declared(),))
    live: dict[str, list[Any]] = {}
    committed: dict[str, list[Any]] = {}

    def seen(entries: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {key: list(value) for key, value in entries.items()}

    def barrier() -> None:
        handler.barrier()
        committed.clear()
        committed.update(seen(live))

    for operation, key in operations:
        if operation == "put":
            handler.map()[key] = [version]
            live[key] = [version]
        elif operation == "read":
            assert handler.map().get(key) == live.get(key)
        elif operation == "scan":
            assert dict(handler.map().scan()) == live
        elif operation == "delete":
            handler.map().pop(key, None)
            live.pop(key, None)
        elif operation == "barrier":
            barrier()
        elif operation == "flush":
            handler.shard.flush()
        elif operation == "undo":
            handler.tables["h/m"].begin_undo()
            handler.map().setdefault(key, []).append("undone")
            handler.tables["h/m"].rollback()
            handler.tables["h/m"].end_undo()
        elif operation == "crash":
            handler.shard.discard()
            handler.epoch = handler.shard.state_epoch
            live.clear()
            live.update(seen(committed))
        else:
            barrier()
            version += 1
            reopened(handler, declared())
            for entries in (live, committed):
                for value in entries.values():
                    value.append("+")
    assert dict(handler.map().scan()) == live
