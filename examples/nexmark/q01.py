"""Nexmark q1, currency conversion: each bid with its price in euros, at 0.908 euros for a dollar.

The price is in thousandths of a cent, so that it stays a whole number and exact.
"""

from auction_site import bids, results

from fcluster import Job


def in_euros(bid):
    """The bid with another price."""
    return {
        "auction": bid.auction,
        "bidder": bid.bidder,
        "price_thousandths": bid.price * 908,
        "date_time": bid.date_time,
    }


def query(job):
    """Add the query to a job."""
    bids(job).map(in_euros).to(results(job, "q1"))


job = Job("nexmark-q1")
query(job)
