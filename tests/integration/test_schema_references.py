"""Schemas that refer to those of other subjects, in a real registry."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient, topic_subject_name_strategy
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer
from confluent_kafka.serialization import SerializationContext

from fcluster import CodecUse
from fcluster.common.errors import FormatUnusable
from fcluster.graph.codecs import bound_codec, value_codec
from fcluster.schema_registry import Avro, JsonSchema, Protobuf, Reference
from fcluster.schema_registry.registry import close_registries
from tests.registry.server import RegistryServer
from tests.unit.schema_registry.messages import importing_class
from tests.unit.schema_registry.test_references import (
    ADDRESS,
    ADDRESS_JSON_REF,
    ADDRESS_REF,
    COUNTRY_JSON_REF,
    COUNTRY_REF,
    ORDER,
    ORDER_JSON,
    VALUE,
)

pytestmark = pytest.mark.timeout(480)

CONF = {"subject.name.strategy": topic_subject_name_strategy}


def test_references_are_registered_read_and_compared_in_a_real_registry(tmp_path: Path) -> None:
    with RegistryServer(tmp_path) as server, SchemaRegistryClient({"url": server.url}) as client:
        settings = MappingProxyType({"schema.registry.url": server.url})
        order = Protobuf(importing_class("Order", "Address"))
        message = order._message()
        message.inner.text = "Bern"
        by_topic: dict[str, tuple[Any, Any]] = {
            "avro": (Avro(ORDER, references=[ADDRESS_REF, COUNTRY_REF]), VALUE),
            "json": (JsonSchema(ORDER_JSON, references=[ADDRESS_JSON_REF, COUNTRY_JSON_REF]), VALUE),
            "protobuf": (order, message),
        }
        raw: dict[str, bytes] = {}
        for topic, (kind, value) in by_topic.items():
            use = CodecUse(topic, "value", settings)
            decode, encode = value_codec(bound_codec(kind, use))
            raw[topic] = encode(value)
            assert decode(raw[topic]) == value
            notes = list(kind.notes_on(use, reads=True, writes=True))
            assert [note.level for note in notes] == ["ok"] * 3, notes
            assert notes[1].message == f"the job's schema is version 1 of '{topic}-value'"

        close_registries()  # a worker that has asked for nothing yet
        for topic, (kind, value) in by_topic.items():
            decode = value_codec(bound_codec(kind, CodecUse(topic, "value", settings)))[0]
            assert decode(raw[topic]) == value

        # Another program, which knows nothing of what the job declares.
        context = SerializationContext("avro", "value")  # type: ignore[arg-type]
        assert AvroDeserializer(client, conf=CONF)(raw["avro"], context) == VALUE
        context = SerializationContext("json", "value")  # type: ignore[arg-type]
        read: Any = JSONDeserializer(None, schema_registry_client=client, conf=CONF)
        assert read(raw["json"], context) == VALUE
        names = [one.name for one in client.get_latest_version("avro-value").schema.references or ()]
        assert names == ["shop.Address", "shop.Country"]

        # A job that declares none of them reads the records all the same.
        city = {"type": "record", "name": "Address", "fields": [ADDRESS["fields"][0]]}
        alone = Avro({"type": "record", "name": "Order", "fields": [{"name": "to", "type": city}]})
        decode = value_codec(bound_codec(alone, CodecUse("avro", "value", settings)))[0]
        assert decode(raw["avro"]) == {"to": {"city": "Bern"}}

        elsewhere = Reference("shop.Address", ADDRESS, subject="nowhere", references=[COUNTRY_REF])
        strict = Avro(ORDER, references=[elsewhere], auto_register=False)
        encode = value_codec(bound_codec(strict, CodecUse("avro", "value", settings)))[1]
        with pytest.raises(FormatUnusable, match=r"'shop\.Address' isn't registered under 'nowhere'"):
            encode(VALUE)
        close_registries()
