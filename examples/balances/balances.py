"""Balances of accounts, from two topics: `job.merge` reads both in one stage, with one state for each key.

`orders` is keyed by account. `payments` isn't, so its records first go through a `key_by`. The cluster
creates the topic for it, with as many partitions as `orders` has.

    fcluster produce orders --partitions 4 --key-field account < orders.jsonl
    fcluster produce payments --partitions 4 < payments.jsonl
    fcluster up balances.py
    fcluster consume balances --from-beginning
"""

from fcluster import Job

job = Job("account-balances")
orders = job.topic("orders")
payments = job.topic("payments")
balances = job.topic("balances")


def balance(ctx, record):
    sign = -1 if ctx.topic == orders.name else 1
    ctx.state["cents"] = ctx.state.get("cents", 0) + sign * record["cents"]
    return {"account": ctx.key, "cents": ctx.state["cents"]}


job.merge(orders, job.stream(payments).key_by("account")).process(balance, to=balances)
