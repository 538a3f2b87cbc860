"""Payments as dataclasses, kept as Structs, grouped by a key of two fields. What doesn't fit is set aside."""

from __future__ import annotations

import os
from dataclasses import dataclass

import msgspec

from fcluster import Context, Job, ValueState

NAMES = [os.environ[f"FCLUSTER_TEST_{name}"] for name in ("JOB", "SOURCE", "OUTPUT")]


@dataclass
class Payment:
    account: str
    currency: str
    amount: int
    status: str = "new"


@dataclass(frozen=True)
class Purse:
    account: str
    currency: str


class Total(msgspec.Struct):
    amount: int = 0
    payments: int = 0


job = Job(NAMES[0])
dead = job.topic(f"{NAMES[2]}-dead", value="bytes")
payments = job.topic(NAMES[1], value=Payment, on_error=dead)
totals = job.topic(NAMES[2], key=Purse, value=Total)
TOTAL: ValueState[Total] = ValueState("total", Total)


def add(ctx: Context[Purse], payment: Payment) -> Total:
    """Count the payment in its purse."""
    total = ctx.value(TOTAL).get(Total())
    total.amount += payment.amount
    total.payments += 1
    ctx.value(TOTAL).set(total)
    assert ctx.key == Purse(payment.account, payment.currency)
    return total


(
    job.stream(payments)
    .filter(lambda payment: payment.status == "settled")
    .key_by(lambda payment: Purse(payment.account, payment.currency), key=Purse)
    .process(add, states=[TOTAL], to=totals)
)
