"""Nexmark q20, expand bid with auction: the bids in auctions of category 10, with these auctions.

Nexmark's query joins without a limit. A join of streams has one: here, a bid and its auction are at most a
day apart.
"""

from auction_site import auctions, bids, results

from fcluster import Job, days

WITHIN = days(1)


def expanded(bid, auction):
    """What the query selects."""
    return {
        "auction": bid.auction,
        "bidder": bid.bidder,
        "price": bid.price,
        "channel": bid.channel,
        "url": bid.url,
        "date_time": bid.date_time,
        "item_name": auction.item_name,
        "description": auction.description,
        "initial_bid": auction.initial_bid,
        "reserve": auction.reserve,
        "opened": auction.date_time,
        "expires": auction.expires,
        "seller": auction.seller,
        "category": auction.category,
    }


def query(job):
    """Add the query to a job."""
    of_category = auctions(job).filter(lambda auction: auction.category == 10)
    (
        bids(job)
        .key_by("auction", key="int", name="q20-bids")
        .join(
            of_category.key_by("id", key="int", name="q20-auctions"), expanded, within=WITHIN, name="q20-bid"
        )
        .to(results(job, "q20"))
    )


job = Job("nexmark-q20")
query(job)
