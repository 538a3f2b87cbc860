"""The winning bid of each auction: the part that q4, q6 and q9 have in common.

An auction is won by the highest valid bid, by the earliest one of equal ones. It is decided when event time
has passed the auction's end: then no bid for it can come any more, unless it is later than the topic's delay.
"""

from auction_site import Auction, auctions, bids


def bid_or_auction(ctx, event):
    """Keep an auction and its best bid. The key is the auction."""
    if isinstance(event, Auction):
        ctx.state["auction"] = {
            "auction": event.id,
            "item_name": event.item_name,
            "description": event.description,
            "initial_bid": event.initial_bid,
            "reserve": event.reserve,
            "seller": event.seller,
            "category": event.category,
            "opened": event.date_time,
            "expires": event.expires,
        }
        ctx.cancel_timer("forget")
        ctx.timer("close", at=event.expires + 1)
        for price, date_time, bidder in ctx.state.pop("early", []):
            consider(ctx.state, price, date_time, bidder)
    elif "auction" in ctx.state:
        consider(ctx.state, event.price, event.date_time, event.bidder)
    else:
        # It may be faster than its auction. When event time has passed it, there is no such auction: it came
        # before that was opened, or after it was closed.
        ctx.state.setdefault("early", []).append([event.price, event.date_time, event.bidder])
        ctx.timer("forget", at=event.date_time + 1)


def consider(state, price, date_time, bidder):
    """Keep a bid if it is valid and better than the best one so far."""
    auction, best = state["auction"], state.get("best")
    if auction["opened"] <= date_time <= auction["expires"] and (
        best is None or (price, -date_time, -bidder) > (best[0], -best[1], -best[2])
    ):
        state["best"] = [price, date_time, bidder]


def close(_key, ctx):
    """Tell the winner. An auction without a valid bid has none."""
    auction, best = ctx.state["auction"], ctx.state.get("best")
    ctx.state.clear()
    if best is None:
        return None
    price, date_time, bidder = best
    return {**auction, "price": price, "bidder": bidder, "bid_time": date_time}


def forget(_key, ctx):
    """Drop bids without an auction."""
    ctx.state.clear()


def winning_bids(job, query):
    """The stream of winning bids with their auctions, which are its keys, for the query of this name."""
    by_auction = job.merge(
        auctions(job).key_by("id", key="int", name=f"{query}-auctions"),
        bids(job).key_by("auction", key="int", name=f"{query}-bids"),
    )
    return by_auction.process(
        bid_or_auction, name=f"{query}-winning", timers={"close": close, "forget": forget}
    )
