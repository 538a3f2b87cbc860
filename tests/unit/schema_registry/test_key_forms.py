"""One form of each key in a topic: every kind of keys that is read, every kind that is written, and all that
writes them. Either all of it works in the same way, or nothing does, and `fcluster check` says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from fcluster import Codec, Context, Job, Record, Sliding, Tumbling, Watermark, count, seconds
from fcluster.cli.check import check_job
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.graph.codecs import key_codec, kind_title, may_carry
from fcluster.schema_registry import Avro
from fcluster.testing import Driver
from tests.unit.schema_registry.test_writing_header_ids import in_headers

TEXT: dict[str, Any] = {"type": "string"}


@dataclasses.dataclass(frozen=True)
class Place:
    city: str


class Shop(msgspec.Struct, frozen=True):
    city: str


def _own_text(raw: bytes) -> str:
    return raw.decode()[::-1]


OWN: Codec[Any] = Codec("own", encode=lambda key: key[::-1].encode(), decode=_own_text)
KINDS: dict[str, Any] = {
    "text": "text",
    "bytes": "bytes",
    "int": "int",
    "json": "json",
    "msgpack": "msgpack",
    "model": Place,
    "struct": Shop,
    "own": OWN,
    "avro": Avro(TEXT),
    "avro in headers": in_headers(TEXT),
}
KEYS: dict[str, tuple[Any, ...]] = {
    "text": ("ann",),
    "bytes": (b"\x00\xffann",),
    "int": (5,),
    "json": ("ann", 5, {"city": "b"}),
    "msgpack": ("ann", 5),
    "model": (Place("b"),),
    "struct": (Shop("b"),),
    "own": ("ann",),
    "avro": ("ann",),
    "avro in headers": ("ann",),
}
"""By kind: some keys of it."""
AVRO = ("avro", "avro in headers")


def keys_of(read: str, written: str) -> tuple[Any, ...]:
    """Some keys of the kind `read`. Bytes are such that they can be read again."""
    if read == "bytes" and written not in ("bytes", *AVRO):
        return tuple(key_codec(job_kind(written))[1](key) for key in KEYS[written])
    return () if read == "bytes" and written in AVRO else KEYS[read]


def job_kind(kind: str) -> Any:
    """The kind as it is declared for a key."""
    return Job("j").topic("in", key=KINDS[kind]).key


PAIRS = [(read, written, key) for read in KINDS for written in KINDS for key in keys_of(read, written)]


def writing(read: str, written: str) -> tuple[Job, list[str]]:
    """A job that writes the key of each record in all ways, and the topics that get it."""
    job = Job("j")
    source = job.topic("in", key=KINDS[read], watermark=Watermark())
    outs: list[str] = []
    dead = job.topic("dead", key="bytes", value="bytes")

    def out(name: str) -> Any:
        outs.append(name)
        return job.topic(name, key=KINDS[written])

    stream = job.stream(source)
    stream.to(out("unchanged"), on_error=dead)
    stream.map(_one).to(out("mapped"), on_error=dead)
    stream.table(name="rows").to_stream().to(out("rows"), on_error=dead)
    stream.count(name="counted").to_stream().to(out("groups"), on_error=dead)
    late = out("late") if may_carry(job_kind(written), job_kind(read)) else None
    windowed = stream.window(Tumbling(seconds(1)), name="w", late=late, on_error=dead).aggregate(n=count())
    windowed.map(_one).to(out("windows"), on_error=dead)

    def handle(name: str, answer: Any, topic: Any = None) -> None:
        stream.process(answer, name=name, to=out(name) if topic is None else None, on_error=dead)

    handle("plain", lambda _ctx, value: value)
    handle("record", lambda _ctx, value: Record(value=value))
    handle("without-value", lambda _ctx, _value: Record())
    named = out("named")
    handle("naming", lambda _ctx, value: Record(value=value, topic=named), named)
    passed = stream.process(lambda _ctx, value: Record(value=value), name="passing", on_error=dead)
    passed.map(_one).to(out("passed"), on_error=dead)

    def set_timer(ctx: Context[Any], _value: Any) -> None:
        ctx.timer("ring", at=ctx.timestamp + 1)

    def ring(_key: Any, _ctx: Any) -> Iterator[Any]:
        yield 1
        yield Record(value=1)

    timers: Any = {"ring": ring}
    stream.process(set_timer, name="timers", timers=timers, to=out("timed"), on_error=dead)
    return job, outs


def _one(_result: Any) -> int:
    return 1  # the key in a result may be none that JSON can hold


Form = tuple["bytes | None", tuple[Any, ...]]
"""A key as bytes, and the id of its schema that is in a header."""


def form_of(record: Any) -> Form:
    return record.raw_key, tuple(found for name, found in record.headers if name == "__key_schema_id")


def framed(record: Any) -> bytes:
    raw, ids = form_of(record)
    return b"".join(ids) + (raw or b"")


def run(job: Job, key: Any, outs: list[str]) -> dict[str, list[Any]]:
    """What is written for two records with that key, by topic. The later one is older, so it may be late."""
    with Driver(job, partitions=1) as driver:
        sent = [driver.send("in", 1, key=key, timestamp=at) for at in (10_000, 5_000)]
        driver.finish()
        dead = driver.records("dead")
        # They are as they were read. Those of timers have ids in front, as the job keeps them.
        assert {framed(one) for one in dead} <= {framed(one) for one in sent}
        return {name: driver.records(name) for name in outs}


@pytest.mark.parametrize(("read", "written", "key"), PAIRS, ids=str)
def test_key_carries_over_to_all_that_is_written_or_to_nothing(read: str, written: str, key: Any) -> None:
    job, outs = writing(read, written)
    found = run(job, key, outs)
    records = [one for written_there in found.values() for one in written_there]
    if not records:
        return  # all of it has failed
    assert all(found.values()), found
    assert len(set(map(form_of, records))) == 1
    assert may_carry(job_kind(written), job_kind(read))
    if "bytes" not in (read, written):
        assert plain(records[0].key) == plain(key)
    given = records[0].key
    job = Job("j")
    source, out, dead = (
        job.topic("in", key=KINDS[read]),
        job.topic("out", key=KINDS[written]),
        job.topic("dead"),
    )
    job.stream(source).process(
        lambda _ctx, value: Record(key=given, value=value), name="h", to=out, on_error=dead
    )
    assert set(map(form_of, run(job, key, ["out"])["out"])) == {form_of(records[0])}


def plain(key: Any) -> Any:
    """A key that may be of a model, as JSON has it."""
    return {"city": key.city} if isinstance(key, Place | Shop) else key


@pytest.mark.parametrize("read", KINDS)
@pytest.mark.parametrize("written", KINDS)
def test_what_never_works_is_refused_by_the_check_and_for_late_records_when_it_is_declared(
    read: str, written: str
) -> None:
    job, outs = writing(read, written)
    findings = check_job(job.build(Settings()))
    late = Job("j")
    stream = late.stream(late.topic("in", key=KINDS[read]))
    lates = late.topic("late", key=KINDS[written])
    if may_carry(job_kind(written), job_kind(read)):
        assert not findings
        stream.window(Sliding(seconds(1)), name="w", late=lates)
        return
    assert not any(found for key in KEYS[read] for found in run(job, key, outs).values())
    assert len(findings) == 6  # what handlers write may have keys of its own
    for finding in findings:
        assert finding.level == "error"
        assert f"has {kind_title(job_kind(written))} keys" in finding.message
        assert "each record with a key fails" in finding.message
        assert ".key_by(...) in front of" in finding.remedy
    with pytest.raises(JobError, match="each late one would fail"):
        stream.window(Sliding(seconds(1)), name="w", late=lates)
