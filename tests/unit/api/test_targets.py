"""Topics that are only written may be given by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fcluster import Codec, Job, Tumbling, Watermark, count, minutes, seconds, sum_, top_n
from fcluster.common.errors import JobError
from fcluster.testing import Driver

BEGIN_MS = 1_767_225_600_000


@dataclass
class Payment:
    account: str
    amount: int
    ts: int
    status: str = "settled"


def spend_job() -> Job:
    job = Job("spend")
    payments = job.topic("payments", value=Payment, timestamp="ts")
    (
        job.stream(payments, watermark=Watermark(max_delay=seconds(5), idle=seconds(30)))
        .filter(lambda payment: payment.status == "settled")
        .key_by(lambda payment: payment.account, name="account")
        .window(Tumbling(minutes(1), grace=seconds(10)), late="payments-late", name="per-minute")
        .aggregate(
            n=count(),
            total=sum_(lambda payment: payment.amount),
            top=top_n(2, by=lambda payment: payment.amount, of=lambda payment: payment.amount),
        )
        .to("spend-per-minute")
    )
    return job


def test_results_and_late_records_go_to_topics_that_are_declared_by_their_names_alone() -> None:
    with Driver(spend_job(), partitions=1) as driver:
        for second, amount in [(0, 3), (30, 9), (59, 5), (31, 7), (90, 1)]:
            driver.send("payments", Payment("ann", amount, BEGIN_MS + second * 1000))
        driver.advance(to_ms=BEGIN_MS + 75_000, clock="event")
        driver.send("payments", Payment("ann", 8, BEGIN_MS + 20_000))
        assert driver.read_values("spend-per-minute") == [
            {
                "key": "ann",
                "start": BEGIN_MS,
                "end": BEGIN_MS + 60_000,
                "n": 4,
                "total": 24,
                "top": [9, 7],
            }
        ]
        assert [late.amount for late in driver.read_values("payments-late")] == [8]


def test_name_of_a_declared_topic_means_that_topic() -> None:
    job = Job("shop")
    orders, totals = job.topic("orders"), job.topic("totals", value="text")

    @job.process(orders, to="totals")
    def total(ctx: Any, order: Any) -> str:  # pyright: ignore[reportUnusedFunction]
        return f"{ctx.key}: {order}"

    job.stream(orders).map(str).through("copies").to("more")
    with Driver(job, partitions=1) as driver:
        driver.send(orders, 5, key="ann")
        assert driver.read_values(totals) == ["ann: 5"]
        assert driver.read_values("copies") == driver.read_values("more") == ["5"]


def test_topic_that_is_named_has_the_kinds_of_the_stream() -> None:
    job = Job("shop")
    source = job.topic("in", key="int", value="bytes", watermark=Watermark())
    stream = job.stream(source)
    stream.window(Tumbling(minutes(1)), late="too-late", name="w").aggregate(n=count()).to("results")
    stream.to("copies")
    with Driver(job, partitions=1) as driver:
        driver.send(source, b"\xff", key=7, timestamp=BEGIN_MS + 600_000)
        driver.send(source, b"\xfe", key=7, timestamp=BEGIN_MS)
        assert [(one.key, one.value) for one in driver.read("too-late")] == [(7, b"\xfe")]
        assert driver.read_values("copies") == [b"\xff", b"\xfe"]
        driver.advance(to_ms=BEGIN_MS + 660_000, clock="event")
        assert [(one.key, one.value["n"]) for one in driver.read("results")] == [(7, 1)]


def test_named_topic_of_values_with_a_codec_has_to_be_declared() -> None:
    job = Job("shop")
    upper = Codec("upper", lambda data: data.decode().upper(), lambda text: text.encode())
    stream = job.stream(job.topic("in", value=upper))
    with pytest.raises(JobError, match="the values of this stream have a codec"):
        stream.to("copies")
    stream.map(str).to("texts")


def test_topic_declared_differently_after_its_name_was_used_is_refused() -> None:
    job = Job("shop")
    job.stream(job.topic("orders")).to("totals")
    with pytest.raises(JobError, match=r"first used by its name.*: value='json' and value='text'") as caught:
        job.topic("totals", value="text")
    assert "Declare it before it is used, topic = job.topic('totals', ...)" in caught.value.remedy
    with pytest.raises(JobError, match="declared twice"):
        job.topic("orders", value="text")


def test_name_that_kafka_refuses_is_refused() -> None:
    job = Job("shop")
    with pytest.raises(JobError, match="to tals"):
        job.stream(job.topic("orders")).to("to tals")
