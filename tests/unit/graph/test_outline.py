"""The outline of a job: every topic and step is in it, and what becomes of state."""

from __future__ import annotations

from datetime import timedelta

from fcluster import Circuit, Job, MapState, Retry, Tumbling, Watermark, count
from fcluster.common.settings import Settings
from fcluster.graph.outline import Flow, JobOutline, changes_to_state, outline
from fcluster.graph.topology import Topology

MINUTE = Tumbling(timedelta(minutes=1), grace=timedelta(seconds=5))


def number(order: dict[str, int]) -> int:
    return order["n"]


def built() -> Topology:
    """A job with one of everything."""
    job = Job("shop", on_error="skip")
    orders = job.topic("orders", watermark=Watermark(max_delay_ms=50, idle_ms=1_000))
    extras = job.topic("extras", key="json")
    late, dead, sums, seen = (job.topic(name) for name in ("late", "dead", "sums", "seen"))
    job.topic("named-by-records", value="bytes")

    def account(ctx, order):
        return None

    def remind(key, ctx):
        return None

    last = MapState("last", key="int", value="json")
    numbers = job.stream(orders).filter(bool, on_error=dead).map(number)
    numbers.process(account, to=seen, states=[last], timers={"remind": remind}, on_error="stop")
    rekeyed = job.stream(orders).key_by("n", version=2, on_error=dead)
    rekeyed.window(MINUTE, late=late, name="minute", on_error=dead).aggregate(n=count()).to(sums)
    job.stream(extras, on_error=dead).to(seen, on_error="stop")
    return job.build(Settings())


def roles(found: JobOutline) -> dict[str, tuple[str, ...]]:
    return {topic.name: topic.roles for topic in found.topics}


def test_each_topic_is_listed_once_with_what_it_is_to_the_job() -> None:
    topology = built()
    found = outline(topology)
    changelogs = [stage.changelog for stage in topology.stages if stage.changelog is not None]
    (repartition,) = (source.topic.name for source in topology.inputs if source.internal)
    assert roles(found) == {
        "orders": ("source",),
        "extras": ("source",),
        repartition: ("repartition",),
        "seen": ("output",),
        "dead": ("dead letters",),
        "sums": ("output",),
        "late": ("late records",),
        "named-by-records": ("declared",),
        changelogs[0]: ("changelog",),
        changelogs[1]: ("changelog",),
        "shop-journal": ("journal",),
    }
    assert len(found.topics) == len(roles(found))
    by_name = {topic.name: topic for topic in found.topics}
    assert (by_name["extras"].key, by_name["extras"].value, by_name["extras"].isolation) == (
        "json",
        "json",
        "read-committed",
    )
    assert (by_name["sums"].isolation, by_name["shop-journal"].key) == (None, None)


def test_steps_have_their_names_states_and_what_they_write() -> None:
    stages = {stage.name: stage for stage in outline(built()).stages}
    orders, extras, minute = (stages[name] for name in ("orders", "extras", "minute"))
    (source,) = orders.inputs
    assert (source.topic, source.watermark, source.on_error) == (
        "orders",
        Watermark(max_delay_ms=50, idle_ms=1_000),
        "skip",
    )
    first, second = orders.chains
    assert (first.name, first.topic) == ("account", "orders")
    assert [(step.kind, step.name) for step in first.steps] == [
        ("filter", "bool"),
        ("map", "number"),
        ("process", "account"),
        ("to", "seen"),
    ]
    assert first.steps[0].writes == (Flow("dead", "failures"),)
    assert first.steps[1].details == {"on_error": "skip"}
    assert first.steps[2].state == ("account", "account/last")
    assert first.steps[2].details == {"timers": "remind"}
    rekeyed = second.steps[0]
    assert (rekeyed.kind, rekeyed.name, rekeyed.details["version"]) == ("key_by", "field n", "2")
    assert extras.changelog is None
    assert extras.inputs[0].writes == (Flow("dead", "failures"),)
    window, _ = minute.chains[0].steps
    assert (window.kind, window.name, window.state) == ("window", "minute", ("minute",))
    assert window.writes == (Flow("late", "late records"), Flow("dead", "failures"))
    assert window.details == {
        "windows": "tumbling (size_ms=60000)",
        "grace_ms": "5000",
        "computes": "n=count",
        "emits": "when a window closes",
        "on_error": "dead letter",
    }
    assert minute.inputs[0].internal


def test_topic_that_one_stage_writes_and_another_reads_has_both_roles() -> None:
    job = Job("chain")
    first, second, third = (job.topic(name) for name in ("first", "second", "third"))
    job.stream(first).to(second)
    job.stream(second).to(third)
    found = outline(job.build(Settings()))
    assert roles(found)["second"] == ("source", "output")


def job_with(*handlers: str, sources: tuple[str, ...] = ("orders",)) -> Topology:
    job = Job("shop")
    for source in sources:
        for name in handlers:
            job.stream(job.topic(source)).process(lambda ctx, value: None, name=f"{name}-{source}")
    return job.build(Settings())


def test_unchanged_job_keeps_its_state() -> None:
    changes = changes_to_state(job_with("a").describe(), job_with("a"))
    assert changes.kept == ("a-orders",)
    assert (changes.reasons, changes.remarks, changes.begun, changes.read_anew, changes.left) == ((),) * 5


def test_new_steps_and_topics_are_named() -> None:
    changes = changes_to_state(job_with("a").describe(), job_with("a", "b", sources=("orders", "extras")))
    assert changes.reasons == ()
    assert changes.kept == ("a-orders",)
    assert changes.begun == ("b-orders", "a-extras", "b-extras")
    assert changes.read_anew == ("extras",)


def test_each_stage_that_no_longer_fits_has_its_reason() -> None:
    old = job_with("a", "b", sources=("orders", "extras")).describe()
    changes = changes_to_state(old, job_with("b", sources=("orders",)))
    assert [("a-orders" in reason, "a-extras" in reason) for reason in changes.reasons] == [
        (True, False),
        (False, True),
    ]
    assert changes.left == ("extras",)
    assert changes.kept == ("b-orders",)


def test_tables_and_joins_are_steps() -> None:
    job = Job("shop")
    table = job.table(job.topic("customers"), name="known", on_error="skip")
    job.stream(job.topic("orders")).join(table, how="left").to(job.topic("out"))
    (stage,) = outline(job.build(Settings())).stages
    join, known = stage.chains
    assert [(step.kind, step.name, step.details, step.state) for step in (join.steps[0], known.steps[0])] == [
        ("join", "pair", {"table": "known", "how": "left"}, ()),
        ("table", "known", {"on_error": "skip"}, ("known",)),
    ]


def test_both_sides_of_a_join_of_streams_are_steps_with_one_state() -> None:
    job = Job("shop")
    late, out = job.topic("late"), job.topic("out")
    within = timedelta(seconds=1), timedelta(seconds=9)
    other = job.stream(job.topic("payments"))
    job.stream(job.topic("orders")).join(other, within=within, name="paid", how="outer", late=late).to(out)
    found = outline(job.build(Settings()))
    (stage,) = found.stages
    sides = [chain.steps[0] for chain in stage.chains]
    assert [(step.kind, step.name, step.state, step.details["side"]) for step in sides] == [
        ("join", "paid", ("paid",), "left"),
        ("join", "paid", ("paid",), "right"),
    ]
    assert sides[0].details["within"] == "1000 ms earlier, 9000 ms later"
    assert roles(found)["late"] == ("late records",)


def test_step_that_makes_calls_says_how() -> None:
    async def score(_call: object, value: object) -> object:
        return value

    job = Job("scoring")
    stream = job.stream(job.topic("in")).map_async(
        score, concurrency=7, timeout=timedelta(seconds=2), retry=Retry(attempts=3), circuit=Circuit()
    )
    stream.to(job.topic("out"))
    (stage,) = outline(job.build(Settings())).stages
    step = stage.chains[0].steps[0]
    assert (step.kind, step.name) == ("map_async", "score")
    assert step.details == {
        "concurrency": "7",
        "timeout_ms": "2000",
        "attempts": "3",
        "circuit": "opens after 20 failures, then waits",
    }
