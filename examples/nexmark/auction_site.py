"""What the jobs of Nexmark have in common: the events of an auction site, its topics, and where results go.

Times are in milliseconds since 1970, prices in cents. The three topics have records without keys, in any
partition: so each query that needs the events of one auction or person together has a `key_by`. The times of
the events are those in their values; they may come 4 s late.
"""

import os

import msgspec

from fcluster import Job, Stream, Topic, Watermark, seconds

PREFIX = os.environ.get("NEXMARK_PREFIX", "nexmark-")
"""The beginning of the names of all topics."""
WATERMARK = Watermark(max_delay=seconds(4))


class Person(msgspec.Struct):
    """Somebody who has registered, to sell or to bid."""

    id: int
    name: str
    email_address: str
    credit_card: str
    city: str
    state: str
    date_time: int
    extra: str = ""


class Auction(msgspec.Struct):
    """A new auction. Bids are valid from `date_time` until `expires`, both inclusive."""

    id: int
    item_name: str
    description: str
    initial_bid: int
    reserve: int
    date_time: int
    expires: int
    seller: int
    category: int
    extra: str = ""


class Bid(msgspec.Struct):
    """A bid of a person in an auction."""

    auction: int
    bidder: int
    price: int
    channel: str
    url: str
    date_time: int
    extra: str = ""


def persons(job: Job) -> Stream[str, Person]:
    """The stream of new persons."""
    topic = job.topic(f"{PREFIX}persons", value=Person, timestamp="date_time", watermark=WATERMARK)
    return job.stream(topic)


def auctions(job: Job) -> Stream[str, Auction]:
    """The stream of new auctions."""
    topic = job.topic(f"{PREFIX}auctions", value=Auction, timestamp="date_time", watermark=WATERMARK)
    return job.stream(topic)


def bids(job: Job) -> Stream[str, Bid]:
    """The stream of bids."""
    topic = job.topic(f"{PREFIX}bids", value=Bid, timestamp="date_time", watermark=WATERMARK)
    return job.stream(topic)


def results(job: Job, query: str) -> Topic:
    """The topic of a query's results."""
    return job.topic(f"{PREFIX}{query}", key="json")
