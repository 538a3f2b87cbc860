"""Nexmark q2, selection: the bids in five given auctions."""

from auction_site import bids, results

from fcluster import Job

AUCTIONS = {1007, 1020, 2001, 2019, 2087}


def query(job):
    """Add the query to a job."""
    (
        bids(job)
        .filter(lambda bid: bid.auction in AUCTIONS)
        .map(lambda bid: {"auction": bid.auction, "price": bid.price})
        .to(results(job, "q2"))
    )


job = Job("nexmark-q2")
query(job)
