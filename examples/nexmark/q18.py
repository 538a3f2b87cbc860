"""Nexmark q18, last bid: the newest bid of each person in each auction.

The newest one has the latest time, whatever the order in which bids come; of several at the same time, the
lowest one. There is a result for each bid that is newer than those before; the last one is the current one.
"""

from auction_site import bids, results

from fcluster import Job


def newest(ctx, bid):
    """Keep the time and price of the newest bid. The key is bidder and auction."""
    score = [bid.date_time, -bid.price]
    if score <= ctx.state.get("newest", []):
        return None
    ctx.state["newest"] = score
    return {
        "auction": bid.auction,
        "bidder": bid.bidder,
        "price": bid.price,
        "channel": bid.channel,
        "url": bid.url,
        "date_time": bid.date_time,
    }


def query(job):
    """Add the query to a job."""
    by_both = bids(job).key_by(lambda bid: [bid.bidder, bid.auction], key="json", name="q18-pairs")
    by_both.process(newest).to(results(job, "q18"))


job = Job("nexmark-q18")
query(job)
