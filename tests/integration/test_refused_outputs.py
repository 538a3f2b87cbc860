"""Errors that only appear at the broker or at the barrier are traced to their record, and its on_error
applies."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Message, Producer

from tests.checker.generate import PARTITIONER, create_topic
from tests.checker.reading import READ_COMMITTED, committed_offsets, read_topic
from tests.harness import Ended, Up, processes_with

pytestmark = pytest.mark.timeout(180)
UP_TIMEOUT_S = 90
RECORDS, BAD = 60, 23
SMALL_BYTES = 20_000
FILLER = base64.b64encode(random.Random(1).randbytes(3 * SMALL_BYTES)).decode()

JOB = """
from fcluster import Job

job = Job("{job}")
source = job.topic("{source}")
output = job.topic("{output}")
dead = job.topic("{output}-dead", value="bytes")
"""
COPYING = """
@job.process(source, to=output, on_error={on_error})
def copy(ctx, record):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {{"number": record["number"], "n": ctx.state["n"], "filler": record["filler"]}}
"""
MAPPING = """
job.stream(source).map(lambda value: value, on_error={on_error}).to(output)
"""
KEEPING = """
@job.process(source, to=output, on_error={on_error})
def keep(ctx, record):
    ctx.state["kept"] = record["number"]
    if record["filler"]:
        ctx.state["set"] = {{1, 2}}
    return {{"number": record["number"]}}
"""


class Place:
    """A job with its own topics."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        self.brokers = brokers
        self.job, self.source, self.output = f"{prefix}job", f"{prefix}in", f"{prefix}out"
        self.dead = f"{self.output}-dead"
        self.directory = directory
        create_topic(brokers, self.source, 2)

    def produce(self, *, bad_key: str | None = "k", bad_filler: str = FILLER, bad_age_ms: int = 0) -> None:
        """Write good records with a bad one among them, to partition 0."""
        refused: list[object] = []

        def note(error: object, _message: object) -> None:
            refused.extend([error] if error is not None else [])

        producer = Producer({"bootstrap.servers": self.brokers, "partitioner": PARTITIONER})
        now_ms = int(time.time() * 1000)
        for number in range(RECORDS):
            is_bad = number == BAD
            value = orjson.dumps({"number": number, "filler": bad_filler if is_bad else ""})
            at_ms = now_ms - bad_age_ms if is_bad else now_ms
            key = bad_key if is_bad else "k"
            producer.produce(self.source, value, key, partition=0, timestamp=at_ms, on_delivery=note)
        assert (producer.flush(30), refused) == (0, [])

    def up(self, steps: str, on_error: str, *more: str, workers: int = 1) -> Ended:
        """Run the job to the end of the source."""
        path = self.directory / "job.py"
        text = (JOB + steps).format(job=self.job, source=self.source, output=self.output, on_error=on_error)
        path.write_text(text)
        data = self.directory / "data"
        with Up(path, self.brokers, data, "--until-caught-up", *more, workers=workers) as up:
            ended = up.wait(UP_TIMEOUT_S)
        print(ended.text)
        return ended

    def rows(self, topic: str) -> list[tuple[bytes | None, dict[str, str]]]:
        """Values and headers of the committed records."""

        def row(message: Message) -> tuple[Any, dict[str, str]]:
            headers: Any = message.headers() or []
            return message.value(), {name: (value or b"").decode() for name, value in headers}

        parts = read_topic(self.brokers, topic, READ_COMMITTED, row)
        return [one for partition in sorted(parts) for one in parts[partition]]

    def numbers(self) -> list[int]:
        """The numbers of the committed outputs."""
        return [orjson.loads(value or b"")["number"] for value, _ in self.rows(self.output)]

    def committed(self) -> int:
        """The committed offset of the source's partition 0."""
        return committed_offsets(self.brokers, self.job).get((self.source, 0), 0)

    def assert_stopped_at_the_bad_record(self, ended: Ended, *parts: str) -> None:
        """Check that the message names the bad record and `parts`, and that all records before it are
        committed."""
        assert ended.code not in (0, 70), ended.text
        for part in (f"record {self.source}/0 at offset {BAD} failed", "remedy: ", *parts):
            assert part in ended.stderr, ended.text
        assert self.committed() == BAD
        assert self.numbers() == list(range(BAD))

    def assert_all_but_the_bad_one(self, ended: Ended) -> None:
        """Check that all records but the bad one were written once, in order, and are committed."""
        assert ended.code == 0, ended.text
        assert self.committed() == RECORDS
        assert self.numbers() == [number for number in range(RECORDS) if number != BAD]


@pytest.fixture
def place(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Place]:
    yield Place(kafka, topic_prefix, tmp_path)
    assert not processes_with(str(tmp_path)), "processes are left"


def small_output(place: Place) -> None:
    create_topic(place.brokers, place.output, 2, {"max.message.bytes": str(SMALL_BYTES)})


def test_output_too_large_for_its_topic_stops_the_job_at_its_record_or_is_skipped(place: Place) -> None:
    small_output(place)
    place.produce()
    ended = place.up(COPYING, '"stop"')
    place.assert_stopped_at_the_bad_record(
        ended,
        f"Kafka refuses the output to '{place.output}'",
        "Message size too large",
        f"Raise max.message.bytes of {place.output}",
    )
    # Nothing is lost: with a new on_error, the job continues as if that record didn't exist.
    place.assert_all_but_the_bad_one(place.up(COPYING, '"skip"', workers=2))
    counts = [orjson.loads(value or b"")["n"] for value, _ in place.rows(place.output)]
    assert counts == list(range(1, RECORDS))


@pytest.mark.parametrize("dead_takes_it", [True, False])
def test_refused_output_becomes_a_dead_letter_or_a_stub(place: Place, dead_takes_it: bool) -> None:
    small_output(place)
    if not dead_takes_it:
        create_topic(place.brokers, place.dead, 1, {"max.message.bytes": str(SMALL_BYTES)})
    place.produce()
    place.assert_all_but_the_bad_one(place.up(COPYING, "dead"))
    ((value, headers),) = place.rows(place.dead)
    assert (headers["fcluster.topic"], headers["fcluster.offset"]) == (place.source, str(BAD))
    assert f"the output to '{place.output}'" in headers["fcluster.error"]
    assert (value is None, "fcluster.stub" in headers) == (not dead_takes_it, not dead_takes_it)


SPREADING = """
import random

@job.process(source, to=output)
def spread(ctx, record):
    for part in range({parts}):
        yield {{"number": record["number"], "part": part, "filler": random.randbytes(150).hex()}}
"""


def test_records_that_are_too_large_only_together_are_written_after_one_replay(place: Place) -> None:
    small_output(place)
    place.produce(bad_filler="")
    parts = 3 * SMALL_BYTES // 300  # the outputs of one record are already too many for one batch
    ended = place.up(SPREADING.replace("{parts}", str(parts)), '"stop"')
    assert ended.code == 0, ended.text
    assert place.committed() == RECORDS
    outputs = [orjson.loads(value or b"") for value, _ in place.rows(place.output)]
    assert [(row["number"], row["part"]) for row in outputs] == [
        (number, part) for number in range(RECORDS) for part in range(parts)
    ]
    assert ended.text.count("replaying at most") == 1, ended.text


def test_refused_output_is_skipped_at_least_once_and_repeats_are_bounded(place: Place) -> None:
    small_output(place)
    place.produce()
    ended = place.up(COPYING, '"skip"', "--set", "processing.guarantee=at-least-once")
    assert ended.code == 0, ended.text
    assert place.committed() == RECORDS
    numbers = place.numbers()
    assert set(numbers) == set(range(RECORDS)) - {BAD}
    assert max(map(numbers.count, numbers)) <= 6  # one replay for each size of a piece


@pytest.mark.parametrize("on_error", ['"stop"', '"skip"'])
@pytest.mark.parametrize("refused_for", ["key", "timestamp"])
def test_missing_key_or_timestamp_out_of_range_is_handled_as_an_error_of_the_record(
    place: Place, refused_for: str, on_error: str
) -> None:
    if refused_for == "key":
        config, remedy = {"cleanup.policy": "compact"}, "compacted"
        place.produce(bad_key=None)
    else:
        config, remedy = {"message.timestamp.before.max.ms": "3600000"}, "message.timestamp.before.max.ms"
        place.produce(bad_age_ms=2 * 3_600_000)
    create_topic(place.brokers, place.output, 2, config)
    ended = place.up(MAPPING, on_error)
    if on_error == '"skip"':
        place.assert_all_but_the_bad_one(ended)
    else:
        place.assert_stopped_at_the_bad_record(ended, f"the output to '{place.output}'", remedy)


@pytest.mark.parametrize("on_error", ['"stop"', '"skip"', "dead"])
def test_state_that_cannot_be_stored_is_handled_as_an_error_of_the_record(
    place: Place, on_error: str
) -> None:
    place.produce(bad_filler="x")
    ended = place.up(KEEPING, on_error)
    if on_error == '"stop"':
        place.assert_stopped_at_the_bad_record(
            ended, "'keep'", "is a set, which would not come back from the store as it is"
        )
        return
    place.assert_all_but_the_bad_one(ended)
    if on_error == "dead":
        ((_, headers),) = place.rows(place.dead)
        assert (headers["fcluster.handler"], headers["fcluster.offset"]) == ("keep", str(BAD))
