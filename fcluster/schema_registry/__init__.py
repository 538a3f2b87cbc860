"""Avro, JSON Schema and Protobuf with a schema registry: kinds of keys and values for `job.topic`.

    from fcluster.schema_registry import Avro

    payments = job.topic("payments", value=Avro("schemas/payment.avsc"))

It needs the extra `schema-registry`. docs/guides/schema-registry.md shows how to use it.
"""

from __future__ import annotations

from fcluster.schema_registry.formats import Avro, JsonSchema, Protobuf
from fcluster.schema_registry.references import Reference

__all__ = ["Avro", "JsonSchema", "Protobuf", "Reference"]
