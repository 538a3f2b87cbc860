"""Nexmark q0, pass through: each bid as it is. It shows what reading and writing alone cost."""

from auction_site import bids, results

from fcluster import Job


def columns(bid):
    """What the query selects."""
    return {
        "auction": bid.auction,
        "bidder": bid.bidder,
        "price": bid.price,
        "date_time": bid.date_time,
        "extra": bid.extra,
    }


def query(job):
    """Add the query to a job."""
    bids(job).map(columns).to(results(job, "q0"))


job = Job("nexmark-q0")
query(job)
