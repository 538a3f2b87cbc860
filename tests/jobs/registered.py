"""Payments in Avro, whose schema changes, added up for each account. Totals are JSON with a schema."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from fcluster import Context, Job
from fcluster.schema_registry import Avro, JsonSchema

NAMES = [os.environ[f"FCLUSTER_TEST_{name}"] for name in ("JOB", "SOURCE", "OUTPUT")]
ACCOUNT = {"type": "record", "name": "Account", "fields": [{"name": "account", "type": "string"}]}
FIELDS: list[dict[str, Any]] = [{"name": "account", "type": "string"}, {"name": "cents", "type": "long"}]
CURRENCY = {"name": "currency", "type": "string", "default": "EUR"}
PAYMENT = {"type": "record", "name": "Payment", "fields": [*FIELDS, CURRENCY]}
TOTAL = {
    "type": "object",
    "properties": {"cents": {"type": "integer"}, "currencies": {"type": "array"}},
    "required": ["cents", "currencies"],
}


@dataclass
class Payment:
    account: str
    cents: int
    currency: str


job = Job(NAMES[0])
dead = job.topic(f"{NAMES[2]}-dead", key="bytes", value="bytes")
payments = job.topic(NAMES[1], value=Avro(PAYMENT, model=Payment), on_error=dead)
totals = job.topic(NAMES[2], key=Avro(ACCOUNT), value=JsonSchema(TOTAL))


def add(ctx: Context[Any], payment: Payment) -> dict[str, Any]:
    """Count the payment for its account."""
    assert ctx.key == {"account": payment.account}
    state = ctx.state
    state["cents"] = state.get("cents", 0) + payment.cents
    state["currencies"] = sorted({*state.get("currencies", ()), payment.currency})
    return dict(state)


(
    job.stream(payments)
    .key_by(lambda payment: {"account": payment.account}, key=Avro(ACCOUNT), name="account")
    .process(add, to=totals)
)
