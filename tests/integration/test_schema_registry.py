"""A job whose keys and values have schemas in a real registry, with a real broker. The schema changes, the
registry falls silent, and a worker is killed.
"""

from __future__ import annotations

import json
import runpy
import time
from collections import defaultdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient, topic_subject_name_strategy
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer
from confluent_kafka.schema_registry.schema_registry_client import ConfigCompatibilityLevel, ServerConfig
from confluent_kafka.serialization import SerializationContext

from fcluster import CodecUse
from fcluster.common.errors import FormatUnusable
from fcluster.common.ids import repartition_topic
from fcluster.graph.codecs import bound_codec, value_codec
from fcluster.schema_registry import Avro, JsonSchema
from fcluster.schema_registry.registry import close_registries
from tests.checker.check import wait_until_committed
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, read_topic
from tests.harness import REPOSITORY, wait_until, worker_name
from tests.in_driver import by_key, rows_on_kafka
from tests.job_run import JobRun
from tests.registry.server import RegistryServer

pytestmark = pytest.mark.timeout(480)

JOB = REPOSITORY / "tests" / "jobs" / "registered.py"
PARTITIONS = 2
STRATEGY = {"subject.name.strategy": topic_subject_name_strategy}
SILENT_S = 7.0
"""Long enough for a worker to ask in vain a few times. The test would pass without it, but show less."""


class Run(JobRun):
    """A cluster with the job, and another program's serializers."""

    def __init__(self, brokers: str, prefix: str, directory: Path, url: str) -> None:
        super().__init__(brokers, prefix, directory, JOB, PARTITIONS)
        self.dead = f"{self.output}-dead"
        create_topic(brokers, self.dead, 1)
        self.client = SchemaRegistryClient({"url": url})
        self.expected: dict[str, int] = defaultdict(int)

    def serializer(self, schema: dict[str, Any]) -> AvroSerializer:
        """Registers the schema when it is used."""
        return AvroSerializer(self.client, json.dumps(schema), conf=STRATEGY)

    def send(self, serializer: AvroSerializer, count: int, **more: Any) -> None:
        context = SerializationContext(self.source, "value")
        for number in range(self.sent, self.sent + count):
            account = f"a{number % 5}"
            payment = {"account": account, "cents": number, **more}
            self._producer.produce(self.source, serializer(payment, context), f"k{number % 7}")
            self.expected[account] += number
        self.sent += count
        assert self._producer.flush(30) == 0

    def written(self) -> int:
        self.cluster.assert_alive()
        return sum(map(len, rows_on_kafka(self.brokers, self.output).values()))


def test_formats_of_a_real_registry_over_changes_silence_and_a_kill(
    kafka: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RegistryServer(tmp_path) as server:
        monkeypatch.setenv("FCLUSTER_SCHEMA_REGISTRY_URL", server.url)
        monkeypatch.setenv("FCLUSTER_SCHEMA_REGISTRY_TIMEOUT", "2")
        monkeypatch.setenv("FCLUSTER_SCHEMA_REGISTRY_MAX_RETRIES", "0")
        run = Run(kafka, topic_prefix, tmp_path, server.url)
        with run.client, run.cluster:
            check(run, server, monkeypatch)


def check(run: Run, server: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in run.environment.items():
        monkeypatch.setenv(name, value)
    names = runpy.run_path(str(JOB))
    former = run.serializer({**names["PAYMENT"], "fields": names["FIELDS"]})
    present = run.serializer(names["PAYMENT"])
    run.cluster.start()

    run.send(former, 20)
    run.send(present, 20, currency="CHF")
    broken = [b"not Avro", b"\0\0\0\xff\xff\0", b"\0"]
    for value in broken:
        run._producer.produce(run.source, value, "k")
    run._producer.flush(30)
    wait_until(lambda: run.written() == 40, "40 records are processed", 120)

    # A schema that nobody has seen, and a registry that accepts connections and says nothing.
    newer = run.serializer({**names["PAYMENT"], "doc": "another text, so another id"})
    newer({"account": "a", "cents": 0, "currency": "x"}, SerializationContext(run.source, "value"))
    server.pause()
    try:
        run.send(newer, 20, currency="USD")
        time.sleep(SILENT_S)
        run.cluster.assert_alive()
    finally:
        server.resume()
    wait_until(lambda: run.written() == 60, "the registry's answer was waited for", 120)

    run.cluster.kill(worker_name(0))
    run.cluster.start_worker(0)
    run.send(former, 20)
    topics = [run.source, repartition_topic(run.job, "account")]
    wait_until_committed(run.brokers, run.job, topics, 120)

    letters = read_topic(run.brokers, run.dead, READ_COMMITTED, lambda message: message.value())
    assert sorted(value or b"" for values in letters.values() for value in values) == sorted(broken)

    read_key = AvroDeserializer(run.client, conf=STRATEGY)
    read_value: Any = JSONDeserializer(None, schema_registry_client=run.client, conf=STRATEGY)
    key, value = (SerializationContext(run.output, part) for part in ("key", "value"))
    totals = {
        read_key(raw, key)["account"]: read_value(values[-1], value)  # type: ignore[index]
        for raw, values in by_key(rows_on_kafka(run.brokers, run.output)).items()
    }
    assert {account: total["cents"] for account, total in totals.items()} == run.expected
    assert all(total["currencies"] == ["CHF", "EUR", "USD"] for total in totals.values())

    subjects = set(run.client.get_subjects())
    assert {f"{run.source}-value", f"{run.output}-key", f"{run.output}-value"} <= subjects
    refused(run, names)


def refused(run: Run, names: dict[str, Any]) -> None:
    """The registry refuses a schema that doesn't go with the former one, with its own reason."""
    subject = f"{run.source}-value"
    run.client.set_config(subject, ServerConfig(compatibility=ConfigCompatibilityLevel.BACKWARD))
    must = {**names["PAYMENT"], "fields": [*names["FIELDS"], {"name": "must", "type": "string"}]}
    settings = MappingProxyType({"schema.registry.url": run.client.config()["url"]})
    codec = bound_codec(Avro(must), CodecUse(run.source, "value", settings))
    with pytest.raises(FormatUnusable, match="doesn't go with those that are registered"):
        value_codec(codec)[1]({"account": "a", "cents": 1, "must": "x"})
    assert run.client.get_latest_version(subject).schema != Schema(json.dumps(must), "AVRO")
    known_before_the_start(run, names, must, settings)
    close_registries()


def known_before_the_start(run: Run, names: dict[str, Any], must: Any, settings: Any) -> None:
    """What `fcluster check` says about schemas in this registry."""

    def said(declared: Any, topic: str) -> list[tuple[str, str]]:
        notes = list(declared.notes_on(CodecUse(topic, "value", settings), reads=True, writes=True))
        assert (notes[0].level, notes[0].message.endswith("answers")) == ("ok", True)
        return [(note.level, note.message) for note in notes[1:]]

    before = run.client.get_subjects()
    subject = f"{run.source}-value"
    versions = run.client.get_versions(subject)
    (written, read) = said(Avro(names["PAYMENT"]), run.source)
    assert written[0] == "ok"
    assert f"of {subject!r}" in written[1]
    assert read == ("ok", f"the job can read {len(versions)} versions of {subject!r}")
    (written, read) = said(Avro(must), run.source)
    assert written[0] == read[0] == "error"
    assert f"the registry will refuse the job's schema for {subject!r}" in written[1]
    assert f"version {max(versions)} of {subject!r} can't be read with the job's schema" in read[1]
    (written, read) = said(JsonSchema(names["TOTAL"]), run.output)
    assert written == ("ok", f"the job's schema is version 1 of '{run.output}-value'")
    assert read == ("ok", f"the job can read 1 version of '{run.output}-value'")
    ((level, message),) = said(Avro(must), run.output)
    assert (level, "has schemas of the type JSON" in message) == ("error", True)
    ((level, message),) = said(Avro(must), "nobody-has-written-this")
    assert (level, "the job registers its schema" in message) == ("note", True)
    assert run.client.get_subjects() == before, "checking registers nothing"
    assert run.client.get_versions(subject) == versions
