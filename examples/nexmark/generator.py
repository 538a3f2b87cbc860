"""Events of an auction site, in the proportions that Nexmark publishes.

Of 50 events, one is a new person, three are new auctions and 46 are bids. Half of the bids are for one hot
auction, three quarters by one hot bidder, and three quarters of the auctions are of one hot seller; who is
hot changes with time. Prices are between 1 and 1,000,000 dollars, small ones as frequent as large ones. A
bid may name an auction, and an auction a seller, that comes a little later. An event depends on its number
and the seed alone, so the events from number n on are the same however many came before.

    python examples/nexmark/generator.py --brokers localhost:9092 --events 100000
"""

import random
import string
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import click
import orjson
from confluent_kafka import Producer

PERSONS, AUCTIONS, BIDS = 1, 3, 46
"""Of so many events one after another."""
OF = PERSONS + AUCTIONS + BIDS
FIRST_ID = 1_000
"""The first person and the first auction have this id."""
FIRST_CATEGORY, CATEGORIES = 10, 5
LEAD = 10
"""How many persons or auctions ahead an event may name."""
HOT_EVERY = 100
"""Every hundredth person or auction is hot until the next one of them is."""
HOT_AUCTIONS, HOT_BIDDERS, HOT_SELLERS, HOT_CHANNELS = 2, 4, 4, 2
"""All but one of so many are hot."""
CHANNELS = 10_000
SIDE_INPUTS = 500
"""The rows of the table of q13."""

CITIES = [
    "Phoenix",
    "Los Angeles",
    "San Francisco",
    "Boise",
    "Portland",
    "Bend",
    "Redmond",
    "Seattle",
    "Kent",
    "Cheyenne",
]
STATES = ("AZ", "CA", "ID", "OR", "WA", "WY")
FIRST_NAMES = ["Peter", "Paul", "Luke", "John", "Saul", "Vicky", "Kate", "Julie", "Sarah", "Deiter", "Walter"]
LAST_NAMES = ["Shultz", "Abrams", "Spencer", "White", "Bartels", "Walton", "Smith", "Jones", "Noris"]
KNOWN_CHANNELS = ("Google", "Facebook", "Baidu", "Apple")


class Event(NamedTuple):
    """An event and its place: "persons", "auctions" or "bids"."""

    kind: Literal["persons", "auctions", "bids"]
    value: dict[str, Any]


@dataclass(frozen=True)
class Generator:
    """Makes events. The same arguments give the same events.

    Args:
        seed: another seed, other events.
        start_ms: the time of event 0.
        gap_ms: the time between two events.
        active_persons: how many persons bid and sell, besides the hot ones: the newest ones.
        open_auctions: how many auctions are open at a time, on average.
    """

    seed: int = 1
    start_ms: int = 1_436_918_400_000  # 2015-07-15
    gap_ms: float = 0.1
    active_persons: int = 1_000
    open_auctions: int = 100

    def events(self, count: int, first: int = 0) -> Iterator[Event]:
        """The events from number `first` on."""
        for number in range(first, first + count):
            yield self.event(number)

    def event(self, number: int) -> Event:
        """The event of that number."""
        chance = random.Random(f"{self.seed}/{number}")
        time_ms = self.time_ms(number)
        place = number % OF
        if place < PERSONS:
            return Event("persons", self._person(number, time_ms, chance))
        if place < PERSONS + AUCTIONS:
            return Event("auctions", self._auction(number, time_ms, chance))
        return Event("bids", self._bid(number, time_ms, chance))

    def time_ms(self, number: int) -> int:
        """When that event happens."""
        return self.start_ms + int(number * self.gap_ms)

    def _person(self, number: int, time_ms: int, chance: random.Random) -> dict[str, Any]:
        return {
            "id": FIRST_ID + _persons_until(number),
            "name": f"{chance.choice(FIRST_NAMES)} {chance.choice(LAST_NAMES)}",
            "email_address": f"{_text(chance, 7)}@{_text(chance, 5)}.com",
            "credit_card": " ".join(f"{chance.randrange(10_000):04}" for _ in range(4)),
            "city": chance.choice(CITIES),
            "state": chance.choice(STATES),
            "date_time": time_ms,
            "extra": _text(chance, 100),
        }

    def _auction(self, number: int, time_ms: int, chance: random.Random) -> dict[str, Any]:
        initial_bid = _price(chance)
        # The time until as many auctions as are open at a time have come after this one.
        horizon_ms = self.time_ms(number + self.open_auctions * OF // AUCTIONS) - time_ms
        if chance.randrange(HOT_SELLERS):
            seller = _persons_until(number) // HOT_EVERY * HOT_EVERY
        else:
            seller = self._active_person(number, chance)
        return {
            "id": FIRST_ID + _auctions_until(number),
            "item_name": _text(chance, 20),
            "description": _text(chance, 100),
            "initial_bid": initial_bid,
            "reserve": initial_bid + _price(chance),
            "date_time": time_ms,
            "expires": time_ms + 1 + chance.randrange(max(2 * horizon_ms, 1)),
            "seller": FIRST_ID + seller,
            "category": FIRST_CATEGORY + chance.randrange(CATEGORIES),
            "extra": _text(chance, 200),
        }

    def _bid(self, number: int, time_ms: int, chance: random.Random) -> dict[str, Any]:
        newest = _auctions_until(number)
        if chance.randrange(HOT_AUCTIONS):
            auction = newest // HOT_EVERY * HOT_EVERY
        else:
            auction = chance.randint(max(newest - self.open_auctions, 0), newest + LEAD)
        if chance.randrange(HOT_BIDDERS):
            bidder = _persons_until(number) // HOT_EVERY * HOT_EVERY + 1
        else:
            bidder = self._active_person(number, chance)
        if chance.randrange(HOT_CHANNELS):
            channel = chance.choice(KNOWN_CHANNELS)
            url = _url(channel)
        else:
            channel_number = chance.randrange(CHANNELS)
            channel = f"channel-{channel_number}"
            url = _url(channel)
            if channel_number % 10:
                url += f"&channel_id={channel_number * 2_654_435_761 % 2**31}"
        return {
            "auction": FIRST_ID + auction,
            "bidder": FIRST_ID + bidder,
            "price": _price(chance),
            "channel": channel,
            "url": url,
            "date_time": time_ms,
            "extra": _text(chance, 30),
        }

    def _active_person(self, number: int, chance: random.Random) -> int:
        known = _persons_until(number) + 1
        active = min(known, self.active_persons)
        return known - active + chance.randrange(active + LEAD)


def side_inputs() -> dict[int, dict[str, Any]]:
    """The rows of the table of q13, by key."""
    return {key: {"value": f"side-{key}"} for key in range(SIDE_INPUTS)}


def _persons_until(number: int) -> int:
    """The newest person at that event, from 0."""
    return number // OF * PERSONS + min(number % OF, PERSONS - 1)


def _auctions_until(number: int) -> int:
    """The newest auction at that event, from 0; -1 before the first one."""
    return number // OF * AUCTIONS + min(max(number % OF - PERSONS, -1), AUCTIONS - 1)


def _price(chance: random.Random) -> int:
    return round(10 ** (chance.random() * 6) * 100)


def _text(chance: random.Random, length_max: int) -> str:
    return "".join(chance.choices(string.ascii_lowercase, k=chance.randint(length_max // 2, length_max)))


def _url(channel: str) -> str:
    chance = random.Random(channel)
    directories = "/".join("".join(chance.choices("abcdefghijklmnop_", k=5)) for _ in range(3))
    return f"https://www.nexmark.com/{directories}/item.htm?query=1"


@click.command()
@click.option("--brokers", required=True, help="Bootstrap servers, HOST:PORT.")
@click.option("--events", default=100_000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--prefix", default="nexmark-", show_default=True, help="The beginning of the topics' names.")
def main(brokers: str, events: int, seed: int, prefix: str) -> None:
    """Write events that happen from now on, 10,000 in each second, and the table of q13."""
    # Keys have to be in the same partitions as those of fcluster: as Java's producers choose them.
    producer = Producer({"bootstrap.servers": brokers, "linger.ms": 50, "partitioner": "murmur2_random"})
    for key, row in side_inputs().items():
        producer.produce(f"{prefix}side-inputs", orjson.dumps(row), key.to_bytes(8, "big"), timestamp=1)
    producer.flush()
    for number, (kind, value) in enumerate(Generator(seed, int(time.time() * 1_000)).events(events)):
        producer.produce(f"{prefix}{kind}", orjson.dumps(value))
        if number % 1_000 == 0:
            producer.flush()
    producer.flush()


if __name__ == "__main__":
    main()
