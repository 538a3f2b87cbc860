"""Nexmark q6, average selling price by seller: the mean winning price of a seller's last ten auctions.

The last ones are those that have expired last, whatever the order in which the handler gets them. There is a
result for each auction that closes; the last one of a seller is the current one.
"""

from auction_site import results
from winning import winning_bids

from fcluster import Job

AUCTIONS = 10


def last_auctions(ctx, won):
    """Keep the last auctions of a seller, who is the key."""
    kept = [*ctx.state.get("last", []), [won["expires"], won["auction"], won["price"]]]
    ctx.state["last"] = sorted(kept)[-AUCTIONS:]
    prices = [price for _, _, price in ctx.state["last"]]
    return {"seller": ctx.key, "average": sum(prices) / len(prices)}


def query(job):
    """Add the query to a job."""
    by_seller = winning_bids(job, "q6").key_by("seller", key="int", name="q6-sellers")
    by_seller.process(last_auctions).to(results(job, "q6"))


job = Job("nexmark-q6")
query(job)
