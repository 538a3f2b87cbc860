"""The last events of processes in a running cluster, replayed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import orjson
from confluent_kafka import Producer

from fcluster.common.event_ring import read_ring
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, end_offsets
from tests.harness import Up
from tests.simulation.replay import main

JOB = """
from fcluster import Job
job = Job("PREFIX-job")

@job.process(job.topic("PREFIX-in"), to=job.topic("PREFIX-out"))
def count(ctx, visit):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return ctx.state["n"]
"""


HANGING_JOB = """
import threading
from fcluster import Job
job = Job("PREFIX-job")

@job.process(job.topic("PREFIX-in"), to=job.topic("PREFIX-out"), on_error="skip")
def ask_a_service(ctx, visit):
    if visit["hangs"]:
        threading.Event().wait()
    return visit
"""


def test_events_of_a_worker_whose_handler_hangs_replay_to_the_same_decisions(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    path, source = tmp_path / "job.py", f"{topic_prefix}-in"
    path.write_text(HANGING_JOB.replace("PREFIX", topic_prefix))
    create_topic(kafka, source, 1)
    producer = Producer({"bootstrap.servers": kafka})
    for hangs in (False, True, False):
        producer.produce(source, orjson.dumps({"hangs": hangs}), "k")
    assert producer.flush(30) == 0
    settings = ["--set", "record.timeout.ms=2000", "--set", "initial.rebalance.delay.ms=0"]
    with Up(path, kafka, tmp_path / "data", "--until-caught-up", *settings) as up:
        ended = up.wait(60)
    assert ended.code == 0, ended.text
    files = list((tmp_path / "data" / "logs").glob("events-worker-*"))
    assert len(files) == 2, "a file for each process that hung"
    for file in files:
        assert read_ring(file).complete
        assert main([str(file)]) == 0


def test_events_written_on_a_signal_replay_to_the_same_decisions(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    path, output = tmp_path / "job.py", f"{topic_prefix}-out"
    path.write_text(JOB.replace("PREFIX", topic_prefix))
    for topic in (f"{topic_prefix}-in", output):
        create_topic(kafka, topic, 1)
    producer = Producer({"bootstrap.servers": kafka})

    def come_out() -> int:
        """Write more records. Returns how many outputs are expected."""
        producer.produce(f"{topic_prefix}-in", orjson.dumps({}), "k")
        producer.flush(10)
        return end_offsets(kafka, [output], READ_COMMITTED)[output, 0]

    logs = tmp_path / "data" / "logs"
    with Up(path, kafka, tmp_path / "data") as up:
        up.wait_until(lambda: come_out() > 0, "output")
        for name, role in (("coordinator", "coordinator"), ("worker-0", "worker")):
            os.kill(up.pid(name), signal.SIGUSR1)
            up.wait_until(lambda role=role: list(logs.glob(f"events-{role}-*")), f"the file of the {role}")
        before = end_offsets(kafka, [output], READ_COMMITTED)[output, 0]
        up.wait_until(lambda: come_out() > before, "the job continues")
        up.interrupt()
        ended = up.wait(60)
    assert "Thread 0x" in ended.text, "the stacks are shown as well"
    for role in ("worker", "coordinator"):
        (file,) = logs.glob(f"events-{role}-*")
        assert read_ring(file).complete
        assert main([str(file), "--job", str(path)]) == 0
