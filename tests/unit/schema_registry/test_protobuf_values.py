"""Values of Protobuf that are rare: presence, maps, enums, well-known types, several messages of one name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest

from fcluster import CodecUse, Job
from fcluster.graph.codecs import ModelError, bound_codec
from fcluster.schema_registry import Protobuf
from fcluster.testing import Driver
from tests.unit.schema_registry.messages import classes

COMMON = 'name: "common.proto" package: "t" syntax: "proto3" message_type { name: "Money" FIELD }'
MIDDLE = """
name: "middle.proto" package: "t" syntax: "proto3" dependency: "common.proto"
message_type { name: "Price" field { name: "net" number: 1 type: TYPE_MESSAGE type_name: ".t.Money" } }
"""
ALL = """
name: "all.proto" package: "t" syntax: "proto3"
dependency: "common.proto" dependency: "middle.proto"
dependency: "google/protobuf/timestamp.proto" dependency: "google/protobuf/duration.proto"
dependency: "google/protobuf/wrappers.proto" dependency: "google/protobuf/any.proto"
message_type {
  name: "All"
  field { name: "long" number: 1 type: TYPE_INT64 }
  field { name: "unsigned" number: 2 type: TYPE_UINT64 }
  field { name: "raw" number: 3 type: TYPE_BYTES }
  field { name: "text" number: 4 type: TYPE_STRING oneof_index: 0 }
  field { name: "number" number: 5 type: TYPE_INT32 oneof_index: 0 }
  field { name: "maybe" number: 6 type: TYPE_INT32 proto3_optional: true oneof_index: 1 }
  field { name: "many" number: 7 type: TYPE_SINT32 label: LABEL_REPEATED }
  field { name: "by_name" number: 8 type: TYPE_MESSAGE label: LABEL_REPEATED type_name: ".t.All.ByNameEntry" }
  field { name: "color" number: 9 type: TYPE_ENUM type_name: ".t.Color" }
  field { name: "at" number: 10 type: TYPE_MESSAGE type_name: ".google.protobuf.Timestamp" }
  field { name: "takes" number: 11 type: TYPE_MESSAGE type_name: ".google.protobuf.Duration" }
  field { name: "boxed" number: 12 type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value" }
  field { name: "any" number: 13 type: TYPE_MESSAGE type_name: ".google.protobuf.Any" }
  field { name: "price" number: 14 type: TYPE_MESSAGE type_name: ".t.Price" }
  field { name: "money" number: 15 type: TYPE_MESSAGE type_name: ".t.Money" }
  field { name: "next" number: 16 type: TYPE_MESSAGE type_name: ".t.All" }
  nested_type {
    name: "ByNameEntry"
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".t.Money" }
    options { map_entry: true }
  }
  oneof_decl { name: "either" } oneof_decl { name: "_maybe" }
}
enum_type { name: "Color" value { name: "RED" number: 0 } value { name: "BLUE" number: 1 } }
"""
CENTS = 'field { name: "cents" number: 1 type: TYPE_INT64 }'
CURRENCY = 'field { name: "currency" number: 2 type: TYPE_STRING }'
FORMER = classes(COMMON.replace("FIELD", CENTS), MIDDLE, ALL, names=["t.All", "t.Money"])
PRESENT = classes(COMMON.replace("FIELD", CENTS + CURRENCY), MIDDLE, ALL, names=["t.All", "t.Money"])
(Required,) = classes(
    """
    name: "required.proto" package: "t" syntax: "proto2"
    message_type {
      name: "Required"
      field { name: "id" number: 1 type: TYPE_STRING label: LABEL_REQUIRED }
      field { name: "color" number: 2 type: TYPE_ENUM type_name: ".t.Old" default_value: "BLUE" }
    }
    enum_type { name: "Old" value { name: "RED" number: 1 } value { name: "BLUE" number: 2 } }
    """,
    names=["t.Required"],
)


def opened(kind: Any, part: Any = "value", url: str = "mock://test") -> Any:
    return bound_codec(kind, CodecUse("t", part, MappingProxyType({"schema.registry.url": url})))


def everything(message: Any) -> Any:
    found = message(
        long=2**62 + 1, unsigned=2**64 - 1, raw=b"\0\xff", number=0, maybe=0, many=[-1, 2], color=7
    )
    found.by_name["a"].cents = 5
    found.at.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC))
    found.takes.FromTimedelta(timedelta(seconds=-3))
    found.boxed.value = 0
    found.any.type_url, found.any.value = "type.googleapis.com/unknown.Type", b"raw"
    found.price.net.cents = 2**53 + 1
    found.next.text = ""
    return found


def test_message_comes_back_with_all_that_is_set() -> None:
    message = FORMER[0]
    value = everything(message)
    found = opened(Protobuf(message)).decode(opened(Protobuf(message)).encode(value))
    assert found == value
    assert (found.long, found.unsigned, found.price.net.cents) == (2**62 + 1, 2**64 - 1, 2**53 + 1)
    assert (found.WhichOneof("either"), found.HasField("maybe"), found.HasField("boxed")) == (
        "number",
        True,
        True,
    )
    assert (found.next.WhichOneof("either"), found.next.HasField("maybe")) == ("text", False)
    assert (found.color, found.at.ToDatetime(UTC)) == (7, datetime(2026, 1, 1, tzinfo=UTC))


def test_messages_of_one_name_live_side_by_side_and_keep_what_they_do_not_know() -> None:
    """As when two teams' generated modules, of different ages, are imported into one job."""
    (former, former_money), (present, money) = FORMER, PRESENT
    job = Job("j")
    source = job.topic("in", value=Protobuf(former))
    out, again = job.topic("out", value=Protobuf(former)), job.topic("again", value=Protobuf(present))
    job.stream(source).map(lambda value: value).to(out)
    new = present(money=money(cents=5, currency="CHF"))
    job.process(source, name="p", to=again)(lambda ctx, value: new)
    with Driver(job) as driver:
        driver.send_raw(source, opened(Protobuf(present), url="mock://driver").encode(new))
        (record,) = driver.records(out)
        assert record.value == former.FromString(new.SerializeToString())
        assert present.FromString(record.value.SerializeToString()) == new
        assert driver.read_values(again)[-1] == new
    with pytest.raises(TypeError, match="is of type All, but All, another class of that name is declared"):
        opened(Protobuf(former)).encode(new)
    assert former_money is not money


def test_key_has_another_name_if_an_imported_file_is_another() -> None:
    use = CodecUse("t", "key", MappingProxyType({}))
    key = 'name: "key.proto" package: "t" syntax: "proto3" dependency: "common.proto" message_type { FIELD }'
    key = key.replace(
        "FIELD", 'name: "Key" field { name: "m" number: 1 type: TYPE_MESSAGE type_name: ".t.Money" }'
    )
    (one,), (other,) = (
        classes(COMMON.replace("FIELD", fields), key, names=["t.Key"]) for fields in (CENTS, CENTS + CURRENCY)
    )
    assert Protobuf(one).name_for(use) != Protobuf(other).name_for(use)
    raw = [opened(Protobuf(message), "key").encode(message()) for message in (one, other)]
    assert raw[0] != raw[1], "their schemas have different ids"


def test_required_field_that_is_missing_is_named() -> None:
    codec = opened(Protobuf(Required))
    with pytest.raises(ModelError, match="missing required fields: id"):
        codec.encode(Required())
    frame = codec.encode(Required(id="x"))[:6]
    with pytest.raises(ModelError, match="declares: it lacks id"):
        codec.decode(frame)


def test_number_of_no_known_enum_value_is_kept() -> None:
    codec = opened(Protobuf(Required))
    raw = codec.encode(Required(id="x")) + b"\x10\x63"
    found = codec.decode(raw)
    assert (found.HasField("color"), found.color) == (False, 2)
    assert codec.encode(found) == raw
