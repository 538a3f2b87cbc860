"""Abandoned carts: one job with timers in both clocks.

Half an hour (of event time) after the last product was put into a cart, its owner is reminded of it once.
After a day the cart is emptied. An owner who returns to a cart that was emptied isn't reminded again. A
customer who pays gets a receipt 2 s later by the wall clock, unless the payment is cancelled before.

    fcluster up examples/carts/carts.py
"""

import os

from fcluster import Job, Record, Watermark, seconds

job = Job(os.environ.get("FCLUSTER_TEST_JOB", "carts"))
carts = job.topic(os.environ.get("FCLUSTER_TEST_SOURCE", "carts"), watermark=Watermark(max_delay=seconds(10)))
letters = job.topic(os.environ.get("FCLUSTER_TEST_OUTPUT", "letters"))

MINUTE_MS = 60_000
DAY_MS = 24 * 60 * MINUTE_MS


@job.process(carts, to=letters)
def cart(ctx, event):
    """Keeps a customer's cart. `event["do"]` is "add", "pay" or "undo"."""
    if event["do"] == "add":
        ctx.state.setdefault("products", []).append(event["product"])
        ctx.timer("remind", at=ctx.timestamp + 30 * MINUTE_MS)
        ctx.timer("empty", at=ctx.timestamp + DAY_MS)
    elif event["do"] == "pay":
        ctx.cancel_timer("remind")
        ctx.cancel_timer("empty")
        ctx.state["paid"] = ctx.state.pop("products", [])
        ctx.timer("receipt", at=ctx.processing_time + 2_000, clock="processing")
    else:
        ctx.state.pop("paid", None)
        ctx.cancel_timer("receipt")


@cart.on_timer("remind")
def remind(key, ctx):
    """Writes to the customer."""
    return {"to": key, "letter": "reminder", "products": ctx.state["products"]}


@cart.on_timer("empty")
def empty(key, ctx):
    """Forgets the cart."""
    products = ctx.state.pop("products")
    return Record(value={"to": key, "letter": "emptied", "products": len(products)})


@cart.on_timer("receipt")
def receipt(key, ctx):
    """Confirms a payment."""
    return {"to": key, "letter": "receipt", "products": ctx.state.pop("paid")}
