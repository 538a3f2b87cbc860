"""Nexmark q17, auction statistics: bids by price, and the range, mean and sum of prices, by auction and day.

A result comes when its day is over.
"""

from auction_site import bids, results
from bid_statistics import DAY, bids_by_rank

from fcluster import Job, max_, mean, min_, sum_


def price(bid):
    """In cents."""
    return bid.price


def query(job):
    """Add the query to a job."""
    (
        bids(job)
        .key_by("auction", key="int", name="q17-auctions")
        .window(DAY, name="q17-days")
        .aggregate(
            **bids_by_rank(),
            min_price=min_(price),
            max_price=max_(price),
            avg_price=mean(price),
            sum_price=sum_(price),
        )
        .map(lambda day: {"auction": day["key"], **{k: day[k] for k in day if k not in ("key", "end")}})
        .to(results(job, "q17"))
    )


job = Job("nexmark-q17")
query(job)
