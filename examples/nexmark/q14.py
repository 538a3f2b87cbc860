"""Nexmark q14, calculation: bids of a middling price in euros, with the part of the day, and a count of c.

As in q1, the price is in thousandths of a cent. Hours are those of UTC.
"""

from auction_site import bids, results

from fcluster import Job

HOUR_MS = 3_600_000


def part_of_day(time_ms):
    """Day, night, or neither."""
    hour = time_ms // HOUR_MS % 24
    if 8 <= hour <= 18:
        return "dayTime"
    return "nightTime" if hour <= 6 or hour >= 20 else "otherTime"


def calculate(bid):
    """What the query selects."""
    return {
        "auction": bid.auction,
        "bidder": bid.bidder,
        "price_thousandths": bid.price * 908,
        "bid_time_type": part_of_day(bid.date_time),
        "date_time": bid.date_time,
        "c_counts": bid.extra.count("c"),
    }


def query(job):
    """Add the query to a job."""
    (
        bids(job)
        .filter(lambda bid: 1_000_000_000 < bid.price * 908 < 50_000_000_000)
        .map(calculate)
        .to(results(job, "q14"))
    )


job = Job("nexmark-q14")
query(job)
