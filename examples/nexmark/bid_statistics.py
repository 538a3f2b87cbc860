"""Aggregates of bids by the rank of their price: the part that q15, q16 and q17 have in common."""

from fcluster import Aggregate, Tumbling, count, count_distinct, days, sum_

DAY = Tumbling(days(1))
"""Days of UTC."""

CHEAP, DEAR = 10_000, 1_000_000


def rank(bid):
    """1 to 3: from cheap to dear."""
    if bid.price < CHEAP:
        return 1
    return 2 if bid.price < DEAR else 3


def distinct_of_rank(number, of):
    """How many different `of(bid)` the bids of a rank have."""
    every = count_distinct(of)

    def add(kept, bid):
        return every.add(kept, bid) if rank(bid) == number else kept

    return Aggregate("count_distinct_of_rank", every.init, add, every.result)


def bids_by_rank():
    """Aggregates: how many bids there are, in all and of each rank."""
    fields = {"total_bids": count()}
    for number in (1, 2, 3):
        fields[f"rank{number}_bids"] = sum_(lambda bid, number=number: rank(bid) == number)
    return fields


def bidders_and_auctions_by_rank():
    """Aggregates: how many bidders and auctions there are, in all and of each rank."""
    fields = {}
    for name, of in (("bidders", lambda bid: bid.bidder), ("auctions", lambda bid: bid.auction)):
        fields[f"total_{name}"] = count_distinct(of)
        for number in (1, 2, 3):
            fields[f"rank{number}_{name}"] = distinct_of_rank(number, of)
    return fields
