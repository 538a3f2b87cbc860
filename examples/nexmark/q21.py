"""Nexmark q21, add channel id: each bid with the number of its channel, which is in the URL for most of them.

Bids without one are left out.
"""

import re

from auction_site import bids, results

from fcluster import Job

KNOWN = {"apple": "0", "google": "1", "facebook": "2", "baidu": "3"}
IN_URL = re.compile(r"(?:&|^)channel_id=([^&]*)")


def with_channel_id(bid):
    """What the query selects, or nothing."""
    found = IN_URL.search(bid.url)
    channel_id = KNOWN.get(bid.channel.lower()) or (found and found[1])
    if channel_id is None:
        return []
    return [
        {
            "auction": bid.auction,
            "bidder": bid.bidder,
            "price": bid.price,
            "channel": bid.channel,
            "channel_id": channel_id,
        }
    ]


def query(job):
    """Add the query to a job."""
    bids(job).flat_map(with_channel_id).to(results(job, "q21"))


job = Job("nexmark-q21")
query(job)
