"""Orders and their shipments: a join of two streams, in which what has no partner matters as well.

Both topics are keyed by order. An order that is shipped within three days is on time, even if the shipment's
record comes first, up to an hour. An order that isn't is overdue, once: as soon as event time has passed the
three days. A shipment without an order is a mistake somewhere.

    fcluster up examples/shipments/shipments.py
"""

from fcluster import Job, days, hours

job = Job("shipments")
orders = job.topic("orders")
shipments = job.topic("shipments")
told = job.topic("orders-told")


def tell(order, shipment):
    """What has become of an order."""
    if order is None:
        return {"what": "nobody ordered that", "shipment": shipment["id"]}
    if shipment is None:
        return {"what": "overdue", "order": order["id"]}
    return {"what": "on time", "order": order["id"], "shipment": shipment["id"]}


(
    job.stream(orders)
    .join(
        job.stream(shipments),
        tell,
        within=(hours(1), days(3)),
        how="outer",
        name="shipped",
    )
    .to(told)
)
