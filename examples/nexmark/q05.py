"""Nexmark q5, hot items: every two seconds, which auctions had the most bids in the last ten seconds?

The bids of each auction are counted where that auction is kept. Then all auctions of a window meet under one
key, its end. Those results have the timestamp of the window's last millisecond, and each window of two
seconds contains just one of them.
"""

from auction_site import bids, results
from greatest import greatest

from fcluster import Hopping, Job, Tumbling, count, seconds

EVERY = seconds(2)
SIZE = seconds(10)


def items(window):
    """A result for each of the hottest auctions."""
    return [{"auction": auction, "num": num, "end": window["key"]} for auction, num in window["hottest"]]


def query(job):
    """Add the query to a job."""
    (
        bids(job)
        .key_by("auction", key="int", name="q5-auctions")
        .window(Hopping(SIZE, every=EVERY), name="q5-counts")
        .aggregate(num=count())
        .key_by("end", key="int", name="q5-ends")
        .window(Tumbling(EVERY), name="q5-hottest")
        .aggregate(hottest=greatest(lambda one: one["num"], of=lambda one: [one["key"], one["num"]]))
        .flat_map(items)
        .to(results(job, "q5"))
    )


job = Job("nexmark-q5")
query(job)
