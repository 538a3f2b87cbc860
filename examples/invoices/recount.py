"""What the job of `invoices.py` writes, counted in a slow and obvious way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

TAX_PERCENT = {"DE": 19, "FR": 20, "IT": 22}

Sent = tuple[str, str, dict[str, Any] | None]
"""Topic, key and value."""


def recount(sent: Iterable[Sent]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The invoices of these records in the order of their timestamps, and the orders without a customer."""
    customers: dict[str, dict[str, Any]] = {}
    invoices: list[dict[str, Any]] = []
    unknown: list[dict[str, Any]] = []
    for topic, key, value in sent:
        if topic == "customers":
            customers.pop(key, None)
            if value is not None:
                customers[key] = value
            continue
        assert value is not None
        customer = customers.get(value["customer"])
        if customer is None:
            unknown.append(value)
            continue
        tax = value["cents"] * TAX_PERCENT[customer["country"]] // 100
        invoices.append(
            {
                "order": value["id"],
                "customer": value["customer"],
                "name": customer["name"],
                "cents": value["cents"] + tax,
            }
        )
    return invoices, unknown
