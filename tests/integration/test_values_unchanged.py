"""Values that stay as they are through a real broker, or become what is documented."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Message, Producer

from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, read_topic
from tests.in_driver import rows_in_driver, rows_on_kafka, run_in_driver
from tests.integration.test_bad_input import Place

pytestmark = pytest.mark.timeout(180)

JOB = """
from fcluster import Job, Record

job = Job("{job}")
source = job.topic("{source}")
output = job.topic("{output}")
dead = job.topic("{output}-dead", value="bytes")
job.stream(source).filter(lambda value: True).to(job.topic("{output}-copy"))
keyed = job.topic("{output}-keyed", key="json")
job.stream(source).filter(lambda value: value is not None).key_by("id").to(keyed)

@job.process(source, to=output, on_error={on_error})
def handle(ctx, value):
    if value is None:
        return Record(value=None)
    if value.get("large"):
        raise ValueError("\\ud83d" + "x" * 3_000_000)
    if value.get("exit"):
        import sys
        sys.exit("no configuration")
    result = {{"id": value["id"], "timestamp": ctx.timestamp}}
    return Record(value=result, timestamp=0) if value["id"] == 3 else result
"""


def row(message: Message) -> tuple[Any, ...]:
    return message.key(), message.value(), message.timestamp()[1], message.headers()


def rows(place: Place, topic: str) -> list[tuple[Any, ...]]:
    parts = read_topic(place.brokers, topic, READ_COMMITTED, row)
    return [row for partition in sorted(parts) for row in parts[partition]]


def test_records_come_out_unchanged(kafka: str, topic_prefix: str, tmp_path: Path) -> None:
    place = Place(kafka, topic_prefix, tmp_path)
    create_topic(kafka, place.source, 1)
    long = 12345678901234567890123
    large = b'{"id": 7, "large": true, "text": "' + b"z" * 900_000 + b'"}'
    records: list[tuple[bytes | None, int, Any]] = [
        (b'{ "id" : %d, "x": 1.50, "none": null }' % long, -1, [("h", b"1"), ("h", None)]),
        (None, 1_000, None),
        (b'{"id": 3}', 5, [("trace", b"t" * 120_000)]),
        (b'{"id": 4, "exit": 1}', 5, [("trace", b"1")]),
        (large, 5, [("trace", b"t" * 98_000)]),
    ]
    producer = Producer({"bootstrap.servers": kafka})
    for value, timestamp, headers in records:
        producer.produce(place.source, value, b"k", timestamp=timestamp, headers=headers)
    assert producer.flush(30) == 0
    ended = place.up(place.write_job(JOB, on_error="dead"), workers=1)
    assert ended.code == 0, ended.text
    wanted = [(b"k", value, timestamp, headers) for value, timestamp, headers in records]
    assert rows(place, f"{place.output}-copy") == wanted
    keyed = {key for key, *_rest in rows(place, f"{place.output}-keyed")}
    assert keyed == {b"%d" % long, b"3", b"4", b"7"}
    outputs = rows(place, place.output)
    assert [(value, timestamp) for _key, value, timestamp, _headers in outputs] == [
        (b'{"id":%d,"timestamp":-1}' % long, -1),
        (None, 1_000),
        (b'{"id":3,"timestamp":5}', -1),  # not "now", which the client makes of 0
    ]
    assert [headers for *_rest, headers in outputs] == [headers for _v, _t, headers in records[:3]]
    exited, stub = rows(place, f"{place.output}-dead")
    assert exited[1] == records[3][0]
    assert dict(exited[3])["fcluster.error"] == b"SystemExit: no configuration"
    assert dict(exited[3])["trace"] == b"1"
    headers = dict(stub[3])
    assert stub[:2] == (b"k", None)
    assert headers["fcluster.value.bytes"] == str(len(large)).encode()
    assert headers["fcluster.value.sha256"] == hashlib.sha256(large).hexdigest().encode()
    assert len(headers["fcluster.error"]) <= 2_010
    assert rb"ValueError: \ud83dxxx" in headers["fcluster.error"]
    # `fcluster.testing` gives the same bytes.
    driver = run_in_driver(runpy.run_path(str(place.directory / "job.py"))["job"], kafka, [place.source])
    for end in ("", "-copy", "-keyed", "-dead"):
        topic = f"{place.output}{end}"
        assert rows_in_driver(driver, topic) == {
            partition: rows for partition, rows in rows_on_kafka(kafka, topic).items() if rows
        }
