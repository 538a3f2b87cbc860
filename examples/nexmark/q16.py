"""Nexmark q16, channel statistics: the same as q15 for each channel, and the minute of its last bid.

A result comes when its day is over.
"""

from auction_site import bids, results
from bid_statistics import DAY, bidders_and_auctions_by_rank, bids_by_rank

from fcluster import Job, max_

MINUTE_MS = 60_000


def minute_of_day(bid):
    """The time of the day as HH:MM."""
    hour, minute = divmod(bid.date_time // MINUTE_MS % 1_440, 60)
    return f"{hour:02}:{minute:02}"


def query(job):
    """Add the query to a job."""
    (
        bids(job)
        .key_by("channel", name="q16-channels")
        .window(DAY, name="q16-days")
        .aggregate(minute=max_(minute_of_day), **bids_by_rank(), **bidders_and_auctions_by_rank())
        .map(lambda day: {"channel": day["key"], **{k: day[k] for k in day if k not in ("key", "end")}})
        .to(results(job, "q16"))
    )


job = Job("nexmark-q16")
query(job)
