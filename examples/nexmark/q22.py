"""Nexmark q22, get URL directories: each bid with the three directories of its URL."""

from auction_site import bids, results

from fcluster import Job


def with_directories(bid):
    """What the query selects."""
    _scheme, _, _host, dir1, dir2, dir3, *_ = bid.url.split("/")
    return {
        "auction": bid.auction,
        "bidder": bid.bidder,
        "price": bid.price,
        "channel": bid.channel,
        "dir1": dir1,
        "dir2": dir2,
        "dir3": dir3,
    }


def query(job):
    """Add the query to a job."""
    bids(job).map(with_directories).to(results(job, "q22"))


job = Job("nexmark-q22")
query(job)
