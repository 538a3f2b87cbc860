"""Nexmark q9, winning bids: each auction that has closed, with the bid that has won it."""

from auction_site import results
from winning import winning_bids

from fcluster import Job


def query(job):
    """Add the query to a job."""
    winning_bids(job, "q9").to(results(job, "q9"))


job = Job("nexmark-q9")
query(job)
