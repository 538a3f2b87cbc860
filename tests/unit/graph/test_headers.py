"""Headers with kinds: what handlers read, what they write, and what can't be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fcluster import Codec, Context, Header, Job, Record
from fcluster.common.errors import JobError
from fcluster.testing import Driver, JobStopped


@dataclass
class Origin:
    host: str
    port: int


UPPER: Codec[str] = Codec("upper", lambda text: text.upper().encode(), lambda raw: raw.decode().lower())
KINDS: list[Any] = [
    ("text", "Zürich"),
    ("bytes", b"\xff\0"),
    ("int", -(2**70)),
    ("json", {"a": [1, None]}),
    ("msgpack", [b"\xff"]),
    (Origin, Origin("a", 1)),
    (UPPER, "abc"),
]


def reading(header: Any, *default: Any, **options: Any) -> Job:
    """A job that writes what it reads of a header."""
    job = Job("read")
    dead = job.topic("dead", key="bytes", value="bytes")
    stream = job.stream(job.topic("in")).key_by("key", name="by-key")
    rule = {"on_error": dead} if options.get("tolerant") else {}

    def read(ctx: Context[str], _value: Any) -> Any:
        return {"found": repr(ctx.header(header, *default))}

    stream.process(read, to=job.topic("out"), **rule)
    return job


def found(job: Job, *headers: tuple[str, bytes | None]) -> str:
    with Driver(job) as driver:
        driver.send("in", {"key": "k"}, headers=headers)
        return driver.read_values("out")[0]["found"]


@pytest.mark.parametrize(("kind", "value"), KINDS)
def test_value_comes_back_behind_a_key_by_too(kind: Any, value: Any) -> None:
    header: Header[Any] = Header("h", kind)
    name, raw = header.pair(value)
    assert name == "h"
    assert found(reading(header), ("other", b"x"), (name, raw)) == repr(value)


def test_last_header_of_the_name_counts_and_null_is_none() -> None:
    header: Header[int] = Header("h", "int")
    pairs = [header.pair(1), header.pair(2)]
    assert found(reading(header), *pairs) == "2"
    assert found(reading(header, 7), *pairs, ("h", None)) == "7"
    assert found(reading(header, 7), ("other", b"")) == "7"
    assert found(reading(header)) == "None"


def test_header_is_set_in_place_of_all_of_its_name() -> None:
    header: Header[str] = Header("h")
    headers = [("h", b"1"), ("other", b"2"), ("h", None)]
    assert header.set_in(headers, "new") == [("other", b"2"), ("h", b"new")]
    assert header.set_in([], "new") == [("h", b"new")]


def test_header_that_can_not_be_decoded_is_a_failure_of_the_handler() -> None:
    header: Header[Origin] = Header("origin", Origin)
    bad = [("origin", b'{"host": "a"}')]
    with Driver(reading(header, tolerant=True)) as driver:
        driver.send("in", {"key": "k"}, headers=bad)
        driver.send("in", {"key": "k"}, headers=[header.pair(Origin("a", 1))])
        (letter,) = driver.dead_letters()
        assert letter.error == (
            """its header 'origin', b'{"host": "a"}', can't be decoded as Origin: port: is missing, at $ """
            "(declared as Origin)"
        )
        assert len(driver.read_values("out")) == 1
    with Driver(reading(header)) as driver, pytest.raises(JobStopped, match="its header 'origin'"):
        driver.send("in", {"key": "k"}, headers=bad)


def test_value_of_another_kind_is_not_written() -> None:
    with pytest.raises(TypeError, match="is written as 'int', which takes an int"):
        Header("h", "int").pair("5")
    job = Job("write")

    @job.process(job.topic("in"), to=job.topic("out"))
    def write(ctx: Context[str], value: Any) -> Record:
        return Record(value=value, headers=[Header("h", "int").pair(value)])

    with Driver(job) as driver:
        driver.send("in", 5)
        assert driver.records("out")[0].headers == [("h", bytes(7) + b"\x05")]
        with pytest.raises(JobStopped, match="which takes an int"):
            driver.send("in", "5")


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: Header(5), "isn't text"),  # type: ignore[arg-type]
        (lambda: Header(""), "isn't text"),
        (lambda: Header("h", "float"), "kind='float' of the header 'h' is unknown"),  # type: ignore[arg-type]
        (
            lambda: Header("h", Codec("own", bytes, bytes, open=lambda _use: UPPER)),  # type: ignore[arg-type]
            "depends on a topic or on settings",
        ),
    ],
)
def test_wrong_declaration_is_refused(declare: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        declare()


def test_name_instead_of_a_header_says_what_to_write() -> None:
    with Driver(reading("trace")) as driver, pytest.raises(JobStopped, match=r"not a Header; declare it as"):
        driver.send("in", {"key": "k"})
