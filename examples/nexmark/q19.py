"""Nexmark q19, auction top ten: the ten highest bids of each auction.

Of equal prices, the earlier bid comes first. There is a result whenever the ten change; the last one of an
auction is the current one.
"""

from auction_site import bids, results

from fcluster import Job

PLACES = 10


def top_ten(ctx, bid):
    """Keep the ten highest bids. The key is the auction."""
    before = ctx.state.get("top", [])
    top = sorted([*before, [-bid.price, bid.date_time, bid.bidder]])[:PLACES]
    if top == before:
        return None
    ctx.state["top"] = top
    return {"auction": bid.auction, "top": [[-price, time_ms, bidder] for price, time_ms, bidder in top]}


def query(job):
    """Add the query to a job."""
    by_auction = bids(job).key_by("auction", key="int", name="q19-auctions")
    by_auction.process(top_ten).to(results(job, "q19"))


job = Job("nexmark-q19")
query(job)
