"""A record that ends worker processes is found and named, and the on_error of its step applies."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from confluent_kafka import Producer

from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, committed_offsets, read_topic
from tests.harness import Ended, Up, processes_with

pytestmark = pytest.mark.timeout(180)
RECORDS, LETHAL = 400, 300

JOB = """
import faulthandler, os, signal
from fcluster import Job

job = Job("{prefix}job")
source, output = job.topic("{prefix}in"), job.topic("{prefix}out")
dead = job.topic("{prefix}dead")


@job.process(source, to=output, on_error={on_error})
def count(ctx, record):
    if record["number"] == {lethal}:
        {death}
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {{"number": record["number"], "n": ctx.state["n"]}}


@job.process(source)
def another(ctx, record):
    ctx.state["seen"] = True
"""

Run = Callable[[str, str], Ended]


@pytest.fixture
def run(kafka: str, topic_prefix: str, tmp_path: Path) -> Run:
    """Runs the job until it ends. All its records are in one partition."""
    create_topic(kafka, f"{topic_prefix}in", 1)
    producer = Producer({"bootstrap.servers": kafka})
    for number in range(RECORDS):
        producer.produce(f"{topic_prefix}in", orjson.dumps({"number": number}), "k")
    assert producer.flush(30) == 0

    def run_job(on_error: str, death: str) -> Ended:
        path = tmp_path / "job.py"
        text = JOB.format(prefix=topic_prefix, on_error=on_error, lethal=LETHAL, death=death)
        path.write_text(text)
        settings = ["--set", "initial.rebalance.delay.ms=0"]
        with Up(path, kafka, tmp_path / "data", "--until-caught-up", *settings) as up:
            ended = up.wait(150)
        assert not processes_with(str(tmp_path)), "processes are left"
        return ended

    return run_job


def outputs(kafka: str, topic: str) -> list[dict[str, int]]:
    (rows,) = read_topic(kafka, topic, READ_COMMITTED, lambda message: message.value()).values()
    return [orjson.loads(row or b"") for row in rows]


def test_record_that_crashes_the_interpreter_becomes_a_dead_letter(
    run: Run, kafka: str, topic_prefix: str
) -> None:
    ended = run("dead", "faulthandler._sigsegv()")
    assert ended.code == 0, ended.text
    record = f"record {topic_prefix}in/0 at offset {LETHAL}"
    assert f"was lost while it processed {record} in 'count', 3 times in a row" in ended.text, ended.text
    assert "was killed by SIGSEGV" in ended.text, ended.text

    numbers = [number for number in range(RECORDS) if number != LETHAL]
    rows = outputs(kafka, f"{topic_prefix}out")
    assert [(row["number"], row["n"]) for row in rows] == list(zip(numbers, itertools.count(1), strict=False))
    ((letter,),) = read_topic(
        kafka, f"{topic_prefix}dead", READ_COMMITTED, lambda message: dict(message.headers() or [])
    ).values()
    assert (letter["fcluster.handler"], letter["fcluster.offset"]) == (b"count", b"%d" % LETHAL)
    assert b"3 worker processes in a row ended or fell silent" in (letter["fcluster.error"] or b"")


def test_record_whose_memory_gets_workers_killed_stops_the_job_with_everything_before_it_committed(
    run: Run, kafka: str, topic_prefix: str
) -> None:
    ended = run('"stop"', "os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does")
    assert ended.code == 1, ended.text
    named = (
        f"record {topic_prefix}in/0 at offset {LETHAL} failed in 'count': 3 worker processes in a row ended"
    )
    assert named in ended.stderr, ended.text
    assert [row["number"] for row in outputs(kafka, f"{topic_prefix}out")] == list(range(LETHAL))
    assert committed_offsets(kafka, f"{topic_prefix}job") == {(f"{topic_prefix}in", 0): LETHAL}
