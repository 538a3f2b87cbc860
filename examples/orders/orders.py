"""Orders of customers: one job with all kinds of state.

For each customer, it keeps the number of orders (a value); which order numbers of the last hour were seen, so
that an order that was sent twice counts once (a map sorted by time, with a TTL); and the last three orders (a
list).

    fcluster up examples/orders/orders.py
"""

import os

from fcluster import Job, ListState, MapState, ValueState, hours

job = Job(os.environ.get("FCLUSTER_TEST_JOB", "orders-by-customer"))
orders = job.topic(os.environ.get("FCLUSTER_TEST_SOURCE", "orders"))
counted = job.topic(os.environ.get("FCLUSTER_TEST_OUTPUT", "orders-counted"))

COUNT: ValueState[int] = ValueState("count", "int")
SEEN: MapState[str, int] = MapState("seen", key="text", value="int", ttl=hours(1))
PRICES: MapState[tuple[int, str], int] = MapState("prices", key=("int", "text"), value="int")
LAST: ListState[str] = ListState("last", "text")


@job.process(orders, to=counted, states=[COUNT, SEEN, PRICES, LAST])
def customer(ctx, order):
    """Counts an order, unless it was sent before."""
    seen, prices, last = ctx.map(SEEN), ctx.map(PRICES), ctx.list(LAST)
    number = order["number"]
    if number in seen:
        return None
    seen[number] = ctx.timestamp
    count = ctx.value(COUNT).get(0) + 1
    ctx.value(COUNT).set(count)
    prices[order["price"], number] = ctx.timestamp
    last.append(number)
    if len(last) > 3:
        last.popleft()
    cheapest, _ = next(prices.scan())
    dearest, _ = next(prices.scan(reverse=True))
    return {
        "customer": ctx.key,
        "number": number,
        "count": count,
        "last": list(last),
        "cheapest": list(cheapest),
        "dearest": list(dearest),
    }
