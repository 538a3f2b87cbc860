"""Nexmark q7, highest bid: the bids with the highest price in each ten seconds.

First the highest ones of each auction are found, wherever it is kept; then those of all auctions together.
"""

from auction_site import bids, results
from greatest import greatest

from fcluster import Job, Tumbling, seconds

SIZE = seconds(10)


def query(job):
    """Add the query to a job."""
    (
        bids(job)
        .key_by("auction", key="int", name="q7-auctions")
        .window(Tumbling(SIZE), name="q7-of-auction")
        .aggregate(
            highest=greatest(
                lambda bid: bid.price, of=lambda bid: [bid.auction, bid.price, bid.bidder, bid.date_time]
            )
        )
        .key_by("end", key="int", name="q7-ends")
        .flat_map(lambda window: window["highest"])
        .window(Tumbling(SIZE), name="q7-of-all")
        .aggregate(highest=greatest(lambda row: row[1], of=lambda row: row))
        .flat_map(lambda window: window["highest"])
        .map(lambda row: dict(zip(("auction", "price", "bidder", "date_time"), row, strict=True)))
        .to(results(job, "q7"))
    )


job = Job("nexmark-q7")
query(job)
