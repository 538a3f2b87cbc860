"""Nexmark q13, bounded side input: each bid with the row of a small table that belongs to its auction.

Nexmark reads the table from a file. Here it is a compacted topic, which may be changed while the job runs.
"""

from auction_site import PREFIX, bids, results

from fcluster import Job

ROWS = 500
"""How many rows the table has: their keys are 0 to 499."""


def with_side_input(bid, row):
    """What the query selects."""
    return {
        "auction": bid.auction,
        "bidder": bid.bidder,
        "price": bid.price,
        "date_time": bid.date_time,
        "value": row["value"],
    }


def query(job):
    """Add the query to a job."""
    side_inputs = job.table(job.topic(f"{PREFIX}side-inputs", key="int"))
    (
        bids(job)
        .key_by(lambda bid: bid.auction % ROWS, key="int", name="q13-rows")
        .join(side_inputs, with_side_input)
        .to(results(job, "q13"))
    )


job = Job("nexmark-q13")
query(job)
