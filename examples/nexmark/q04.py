"""Nexmark q4, average price for a category: the mean winning price of the auctions that have closed.

There is a result for each auction that closes; the last one of a category is the current one.
"""

from auction_site import results
from winning import winning_bids

from fcluster import Job


def average(ctx, won):
    """Add the price of an auction that has closed. The key is the category."""
    ctx.state["sum"] = ctx.state.get("sum", 0) + won["price"]
    ctx.state["auctions"] = ctx.state.get("auctions", 0) + 1
    return {"category": ctx.key, "average": ctx.state["sum"] / ctx.state["auctions"]}


def query(job):
    """Add the query to a job."""
    by_category = winning_bids(job, "q4").key_by("category", key="int", name="q4-categories")
    by_category.process(average).to(results(job, "q4"))


job = Job("nexmark-q4")
query(job)
