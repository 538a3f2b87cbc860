"""Nexmark q12, processing-time windows: how many bids of a person are processed in each ten seconds?

This is about the wall clock, so each run gives other windows; only the sum of a person's bids is always the
same.
"""

from auction_site import bids, results

from fcluster import Job, Tumbling, count, seconds


def finish(window):
    """The result of a window."""
    return {"bidder": window["key"], "bids": window["bids"], "end": window["end"]}


def query(job):
    """Add the query to a job."""
    by_bidder = bids(job).key_by("bidder", key="int", name="q12-bidders")
    windows = by_bidder.window(Tumbling(seconds(10)), name="q12-windows", clock="processing")
    windows.aggregate(bids=count()).map(finish).to(results(job, "q12"))


job = Job("nexmark-q12")
query(job)
