"""What a type checker knows in a user's job: pyright, strict, on a job with models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]

JOB = """
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, assert_type

import msgspec

from fcluster import (
    CallContext, Change, Codec, Context, GlobalTable, GroupedTable, Job, Record, RecordContext, RowContext,
    Stream, Table, Topic, Tumbling, ValueState, Watermark, count, sum_, top_n,
)
from fcluster.testing import Driver


@dataclass
class Payment:
    account: str
    amount: int
    status: str = "new"


class Total(msgspec.Struct):
    amount: int


job = Job("spend")
payments = job.topic("payments", value=Payment, watermark=Watermark(max_delay_ms=5), on_error="skip")
totals = job.topic("totals", value=Total)
loose = job.topic("loose")
money = job.topic("money", key="int", value=Codec("money", Total, lambda raw: 5))  # pyright: ignore
assert_type(payments, Topic[str, Payment])
assert_type(loose, Topic[str, Any])
assert_type(job.topic("t", key=Payment, value="text"), Topic[Payment, str])
assert_type(job.topic("t", key="bytes", value="int"), Topic[Any, int])

settled = job.stream(payments).filter(lambda p: p.status == "settled")
assert_type(settled, Stream[str, Payment])
assert_type(settled.map(lambda p: p.amount), Stream[str, int])
async def score(call: CallContext[str], p: Payment) -> float:
    return p.amount / len(call.key)


assert_type(settled.map_async(score), Stream[str, float])
assert_type(settled.flat_map(lambda p: [p.account, p.status]), Stream[str, str])
assert_type(settled.peek(lambda p: print(p.amount)), Stream[str, Payment])
assert_type(settled.branch(lambda p: p.amount > 5), tuple[Stream[str, Payment], ...])
assert_type(settled.key_by("account"), Stream[str, Payment])
assert_type(settled.key_by(lambda p: p.account), Stream[str, Payment])
assert_type(settled.key_by(lambda p: p, key=Payment), Stream[Payment, Payment])


def named(ctx: RecordContext[str], p: Payment) -> tuple[str, int]:
    return ctx.key, ctx.timestamp + p.amount


def is_big(ctx: RowContext[str], p: Payment) -> bool:
    return p.amount > len(ctx.key)


assert_type(settled.map(named), Stream[str, tuple[str, int]])
assert_type(settled.map(lambda ctx, p: (ctx.key, p.amount)), Stream[str, tuple[str, int]])
assert_type(settled.filter(lambda ctx, p: ctx.key == p.account), Stream[str, Payment])
assert_type(settled.filter(is_big), Stream[str, Payment])
assert_type(settled.flat_map(lambda ctx, p: [ctx.key, p.account]), Stream[str, str])
assert_type(settled.peek(lambda ctx, p: print(ctx.timestamp, p.amount)), Stream[str, Payment])
assert_type(settled.branch(lambda ctx, p: ctx.key == p.account), tuple[Stream[str, Payment], ...])
assert_type(settled.key_by(lambda ctx, p: f"{ctx.key}/{p.status}"), Stream[str, Payment])
assert_type(settled.key_by(lambda ctx, p: ctx.timestamp, key="int"), Stream[Any, Payment])
by_payment = settled.key_by(lambda ctx, p: p, key=Payment)
assert_type(by_payment.map(lambda ctx, p: ctx.key), Stream[Payment, Payment])
settled.to(loose)

accounts = job.table(payments)
assert_type(accounts, Table[str, Payment])
assert_type(accounts.filter(lambda p: p.amount > 5), Table[str, Payment])
assert_type(accounts.filter(is_big), Table[str, Payment])
assert_type(accounts.map(lambda ctx, p: (ctx.key, p.amount)), Table[str, tuple[str, int]])
amounts = accounts.map(lambda p: p.amount)
assert_type(amounts, Table[str, int])
assert_type(amounts.to_stream(), Stream[str, int | None])
assert_type(amounts.to_stream().table(name="again"), Table[str, int])
assert_type(amounts.to_stream().flat_map(lambda n: [] if n is None else [n]), Stream[str, int])
accounts.to_stream().to(payments)
accounts.to_stream().to(loose)
assert_type(accounts.to_stream().through(payments), Stream[str, Payment | None])
assert_type(amounts.changes(), Stream[str, Change[int]])
assert_type(settled.map(lambda p: p.status).table(name="states"), Table[str, str])
assert_type(accounts.join(amounts), Table[str, dict[str, Any]])
assert_type(accounts.join(amounts, lambda p, n: p.amount + n), Table[str, int])
assert_type(accounts.join(amounts, lambda p, n: n or p.amount, how="left"), Table[str, int])
assert_type(settled.join(amounts, lambda p, n: p.amount + n), Stream[str, int])
grouped = accounts.group_by(lambda p: p.status, name="by-status")
assert_type(grouped, GroupedTable[str, Payment])
assert_type(grouped.count(), Table[str, int])
assert_type(grouped.aggregate(n=count()), Table[str, dict[str, Any]])
by_letter = accounts.group_by(lambda ctx, p: ctx.key[:1], name="by-letter", value=lambda ctx, p: ctx.key)
assert_type(by_letter, GroupedTable[str, str])
by_amount = accounts.group_by("status", name="sums", value=lambda p: p.amount)
assert_type(by_amount.reduce(lambda a, b: a + b, lambda a, b: a - b), Table[str, int])
assert_type(settled.aggregate(n=count(), name="sums-2"), Table[str, dict[str, Any]])
assert_type(settled.count(name="n"), Table[str, int])
assert_type(settled.reduce(lambda a, b: a if a.amount > b.amount else b, name="max"), Table[str, Payment])
assert_type(settled.through(payments), Stream[str, Payment])
settled.map(lambda p: Total(p.amount)).to(totals)

TOTAL: ValueState[Total] = ValueState("total", Total)


@job.process(payments, to=totals, states=[TOTAL])
def add(ctx: Context[str], payment: Payment) -> Total:
    total = ctx.value(TOTAL).get(Total(0))
    assert_type(total, Total)
    assert_type(ctx.key, str)
    total.amount += payment.amount
    return total


@add.on_timer("later")
def later(key: str, ctx: Context) -> None:
    ctx.state.clear()


@job.process(loose)
def plain(ctx: Context, value: dict[str, Any]) -> Iterator[Record]:
    yield Record(topic=totals, value=Total(value["amount"]))


def each(ctx: Context, payment: Payment) -> Iterator[Total | Record]:
    yield Total(payment.amount)
    yield Record(value=None)


def some(ctx: Context, payment: Payment) -> Total | None:
    return Total(payment.amount) if payment.amount else None


assert_type(settled.process(each), Stream[str, Total])
assert_type(settled.process(some, name="some", to=totals), Stream[str, Total])
assert_type(job.merge(payments, totals), Stream[str, Payment | Total])
(
    settled.key_by("account")
    .window(Tumbling(timedelta(minutes=1)), name="w")
    .aggregate(n=count(), total=sum_(lambda p: p.amount), top=top_n(3, by=lambda p: p.amount))
    .map(lambda result: result["n"])
    .to(loose)
)


everywhere = job.global_table(payments, name="everywhere")
assert_type(everywhere, GlobalTable[str, Payment])
assert_type(everywhere.filter(lambda p: p.amount > 5), GlobalTable[str, Payment])
all_amounts = everywhere.map(lambda p: p.amount)
assert_type(all_amounts, GlobalTable[str, int])
assert_type(settled.join(everywhere, on="status"), Stream[str, dict[str, Any]])
assert_type(settled.join(all_amounts, lambda p, n: p.amount + n, on=lambda p: p.status), Stream[str, int])
assert_type(
    settled.join(all_amounts, lambda p, n: n, on=lambda p: p.status or None, how="left"),
    Stream[str, int | None],
)

rows = job.table(job.topic("rows", value=Total))
assert_type(settled.join(rows), Stream[str, dict[str, Any]])
assert_type(settled.join(rows, lambda p, total: p.amount + total.amount), Stream[str, int])
assert_type(settled.join(rows, lambda p, total: total and p, how="left"), Stream[str, Payment | None])
assert_type(
    settled.join(job.stream(totals), lambda p, t: t.amount, within=timedelta(1), name="j"), Stream[str, int]
)


def test_it() -> None:
    with Driver(job) as driver:
        driver.send(payments, Payment("a", 1), key="a")
        assert_type(driver.read_values(totals), list[Total])
        assert driver.read(totals)[0].value.amount == 1
"""

WRONG: dict[str, str] = {
    'job.stream(payments).filter(lambda p: p.statsu == "settled")': 'attribute "statsu" for class "Payment"',
    "settled.map(lambda p: p.amount).map(lambda n: n.account)": 'attribute "account" for class "int"',
    "settled.map(lambda ctx, p: ctx.kye)": 'attribute "kye" for class "RecordContext[str]"',
    "settled.filter(lambda ctx, p: p.acount)": 'attribute "acount" for class "Payment"',
    "settled.key_by(lambda ctx, p: ctx.timestamp)": '"int" is not assignable to "str"',
    "accounts.filter(lambda ctx, p: ctx.timestamp)": 'attribute "timestamp" for class "RowContext[str]"',
    "settled.key_by(lambda p: p.acount)": 'attribute "acount" for class "Payment"',
    "settled.join(rows, lambda p, total: total.amnt)": 'attribute "amnt" for class "Total"',
    "settled.join(rows, lambda p, t: t.amount, how='left')": '"amount" is not a known attribute of "None"',
    "accounts.to_stream().map(lambda p: p.amount)": '"amount" is not a known attribute of "None"',
    "amounts.to_stream().to(totals)": '"TopicSpec[str, Total]" cannot be assigned',
    "settled.to(totals)": '"TopicSpec[str, Total]" cannot be assigned',
    "settled.process(lambda ctx, p: p.ammount, name='h')": 'attribute "ammount" for class "Payment"',
    "job.process(totals)(some)": "is not assignable to",
    "settled.window(Tumbling(timedelta(1)), name='v').aggregate(t=sum_(lambda p: p.ammount))": (
        'attribute "ammount" for class "Payment"'
    ),
    "Driver(job).send(payments, Total(1))": '"Total" is not assignable to "Payment"',
    "job.topic('x', value=3)": 'cannot be assigned to parameter "value"',
    "job.topic('x', watermrk=None)": 'No overloads for "topic"',
}


def errors_of(source: str, directory: Path) -> dict[int, str]:
    """What pyright reports, by line."""
    (directory / "job.py").write_text(source)
    settings = {
        "include": ["job.py"],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
        "extraPaths": [str(REPOSITORY)],
        "reportMissingTypeStubs": False,
    }
    (directory / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    ran = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    reports = json.loads(ran.stdout)["generalDiagnostics"]
    return {one["range"]["start"]["line"]: one["message"] for one in reports if one["severity"] == "error"}


@pytest.mark.timeout(300)
def test_pyright_accepts_a_typed_job_and_reports_what_does_not_fit(tmp_path: Path) -> None:
    wrong = "\n".join(WRONG)
    found = errors_of(f"{JOB}\n{wrong}\n", tmp_path)
    begin = len(JOB.splitlines()) + 1
    expected = dict(enumerate(WRONG.values(), begin))
    assert set(found) == set(expected), found
    for line, text in expected.items():
        assert text in found[line]
