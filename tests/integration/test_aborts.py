"""Transactions that a broker has refused, on real processes: they are replayed in the same session."""

from __future__ import annotations

from pathlib import Path

import orjson
from confluent_kafka import Producer

from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, read_topic
from tests.harness import Up

# A broker refuses a batch that it gets before an earlier one, when a partition's leader moves. That can't be
# made to happen on purpose, so the error is planted. The aborts are real.
JOB = """
from confluent_kafka import KafkaError
from fcluster import Job
from fcluster.worker import transactions

job = Job({name!r}, epoch_records_max=100)
orders, counts = job.topic({source!r}), job.topic({output!r})

def count(ctx, value):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {{"n": ctx.state["n"], "by": "key"}}

def total(ctx, value):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {{"n": ctx.state["n"], "by": "group"}}

job.stream(orders).process(count, to=counts)
job.stream(orders).key_by(lambda value: value["group"]).process(total, to=counts)

def refuse(method, passings):
    plain = getattr(transactions.ProducerTransactions, method)
    passed = 0
    def refused(self, *arguments):
        nonlocal passed
        passed += 1
        plain(self, *arguments)
        if passed in passings:
            code = KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER
            raise transactions.TransactionLostError("planted in " + method, code, abortable=True)
    setattr(transactions.ProducerTransactions, method, refused)

refuse("flush_outputs", (2, 9))
refuse("prepare", (3, 4, 7))
"""
RECORDS, KEYS = 2_000, 7


def test_refused_transactions_are_replayed_without_a_new_session(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    name, source, output = f"{topic_prefix}job", f"{topic_prefix}in", f"{topic_prefix}out"
    create_topic(kafka, source, 2)
    create_topic(kafka, output, 2)
    producer = Producer({"bootstrap.servers": kafka})
    for number in range(RECORDS):
        producer.produce(source, orjson.dumps({"group": "g"}), f"k{number % KEYS}")
    assert producer.flush(30) == 0
    path = tmp_path / "job.py"
    path.write_text(JOB.format(name=name, source=source, output=output))
    with Up(path, kafka, tmp_path / "data", "--until-caught-up") as up:
        ended = up.wait(120)
    assert ended.code == 0, ended.text
    for method in ("flush_outputs", "prepare"):
        assert f"planted in {method}" in ended.text, "nothing was refused"
    assert ended.text.count("joined as slot") == 1, "a session has ended"
    results = [
        (key, value["by"], value["n"])
        for rows in read_topic(
            kafka,
            output,
            READ_COMMITTED,
            lambda message: (message.key(), orjson.loads(message.value() or b"")),
        ).values()
        for key, value in rows
    ]
    by_key = [(key, n) for key, by, n in results if by == "key"]
    assert sorted(by_key) == sorted(
        (f"k{number % KEYS}".encode(), number // KEYS + 1) for number in range(RECORDS)
    )
    assert [n for _, by, n in results if by == "group"] == list(range(1, RECORDS + 1))
