"""Nexmark q15, bidding statistics: how many bids, bidders and auctions a day has, in all and by price.

All bids meet under one key, because bidders are different ones all over the site. A result comes when its
day is over.
"""

from auction_site import bids, results
from bid_statistics import DAY, bidders_and_auctions_by_rank, bids_by_rank

from fcluster import Job


def query(job):
    """Add the query to a job."""
    (
        bids(job)
        .key_by(lambda bid: "all", name="q15-all")
        .window(DAY, name="q15-days")
        .aggregate(**bids_by_rank(), **bidders_and_auctions_by_rank())
        .map(lambda day: {name: day[name] for name in day if name not in ("key", "end")})
        .to(results(job, "q15"))
    )


job = Job("nexmark-q15")
query(job)
