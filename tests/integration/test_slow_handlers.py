"""Slow handlers make progress. A record at which a handler hangs is named, and the step's on_error
applies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Producer

from fcluster.cli.connection import Connection
from fcluster.common.errors import FclusterError
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, committed_offsets, read_topic
from tests.harness import Up, processes_with

pytestmark = pytest.mark.timeout(240)
RECORDS, HANGS, RECORD_TIMEOUT_MS = 40, 25, 3_000
"""Together, the slow records take far longer than the longest interval between commits."""

JOB = """
import re
import time
from fcluster import Job

job = Job("{prefix}job")
source, output = job.topic("{prefix}in"), job.topic("{prefix}out")
dead = job.topic("{prefix}dead")


@job.process(source, to=output, on_error=dead)
def ask_a_service(ctx, record):
    if record["number"] == {hangs}:
        re.match("(a+)+$", "a" * 80 + "b")  # holds the interpreter, for years
    time.sleep(0.12 if record["number"] < {hangs} else 0)
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {{"number": record["number"], "n": ctx.state["n"]}}
"""
BETWEEN = """
import re
from fcluster import Job

job = Job("{prefix}job")
source, output = job.topic("{prefix}in"), job.topic("{prefix}out")
dead = job.topic("{prefix}dead")


async def ask(call, record):
    return record


def between_calls(record):
    if record["number"] == {hangs}:
        re.match("(a+)+$", "a" * 80 + "b")  # holds the interpreter, for years
    return record


job.stream(source).map_async(ask).map(between_calls, on_error=dead).map_async(ask).to(output)
"""
HANGING_LINE = next(number for number, line in enumerate(JOB.splitlines(), 1) if "re.match" in line)


@pytest.fixture
def text() -> str:
    """The job file."""
    return JOB


@pytest.fixture
def up(text: str, kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Up]:
    """Starts the job. Its records are already there, all in one partition."""
    create_topic(kafka, f"{topic_prefix}in", 1)
    producer = Producer({"bootstrap.servers": kafka})
    for number in range(RECORDS):
        producer.produce(f"{topic_prefix}in", orjson.dumps({"number": number}), "k")
    assert producer.flush(30) == 0
    path = tmp_path / "job.py"
    path.write_text(text.format(prefix=topic_prefix, hangs=HANGS))
    settings = ["--set", f"record.timeout.ms={RECORD_TIMEOUT_MS}", "--set", "initial.rebalance.delay.ms=0"]
    settings += ["--set", "session.timeout.ms=30s"]  # on a busy machine, it takes long to use some CPU time
    with Up(path, kafka, tmp_path / "data", "--until-caught-up", *settings) as running:
        yield running
    assert not processes_with(str(tmp_path)), "processes are left"


def longest_record(data_dir: Path) -> dict[str, Any] | None:
    """The record that has been in process for longest, according to the status."""
    try:
        return Connection.find({"state_dir": str(data_dir)}, None, {}).status(None)["longest_record"]
    except FclusterError:
        return None  # the coordinator is starting


def test_slow_records_are_committed_one_by_one_and_one_that_hangs_becomes_a_dead_letter(
    up: Up, kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    where = f"{topic_prefix}in", 0
    seen = up.wait_until(
        lambda: (record := longest_record(tmp_path / "data")) and record["offset"] == HANGS and record,
        "the record that hangs is shown",
    )
    assert (seen["topic"], seen["partition"]) == where
    committed = committed_offsets(kafka, f"{topic_prefix}job").get(where, 0)
    assert 0 < committed <= HANGS, "barriers came between records, not only after all that were read"

    ended = up.wait(120)
    assert ended.code == 0, ended.text
    named = f"record {topic_prefix}in/0 at offset {HANGS} has been processed for"
    bound = f"longer than record.timeout.ms = {RECORD_TIMEOUT_MS}, in ask_a_service ("
    line = f'job.py", line {HANGING_LINE} in ask_a_service'
    assert named in ended.text, ended.text
    assert bound in ended.text, ended.text
    assert ended.text.count(line) == 2, f"two stacks, from two processes:\n{ended.text}"

    (rows,) = read_topic(
        kafka, f"{topic_prefix}out", READ_COMMITTED, lambda message: message.value()
    ).values()
    outputs = [orjson.loads(row or b"") for row in rows]
    assert [row["number"] for row in outputs] == [number for number in range(RECORDS) if number != HANGS]
    assert [row["n"] for row in outputs] == list(range(1, RECORDS))
    ((letter,),) = read_topic(
        kafka, f"{topic_prefix}dead", READ_COMMITTED, lambda message: dict(message.headers() or [])
    ).values()
    assert (letter["fcluster.handler"], letter["fcluster.offset"]) == (b"ask_a_service", b"%d" % HANGS)
    assert b"longer than record.timeout.ms" in letter["fcluster.error"]


@pytest.mark.parametrize("text", [BETWEEN])
def test_record_at_which_a_step_between_two_calls_hangs_becomes_a_dead_letter(
    up: Up, kafka: str, topic_prefix: str
) -> None:
    ended = up.wait(200)
    assert ended.code == 0, ended.text
    assert f"longer than record.timeout.ms = {RECORD_TIMEOUT_MS}, in between_calls (" in ended.text
    (rows,) = read_topic(
        kafka, f"{topic_prefix}out", READ_COMMITTED, lambda message: message.value()
    ).values()
    numbers = [orjson.loads(row or b"")["number"] for row in rows]
    assert numbers == [number for number in range(RECORDS) if number != HANGS]
    ((letter,),) = read_topic(
        kafka, f"{topic_prefix}dead", READ_COMMITTED, lambda message: dict(message.headers() or [])
    ).values()
    assert letter["fcluster.offset"] == b"%d" % HANGS
    assert b"longer than record.timeout.ms" in letter["fcluster.error"]
