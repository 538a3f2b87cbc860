"""Nexmark q3, local item suggestion: who sells something of category 10 in Oregon, Idaho or California?

The seller and the auction may come in any order, and any time may be between them. So this is no join within
an interval, but a handler that keeps the one until the other comes. As in SQL, nothing is ever forgotten.
"""

from auction_site import Person, auctions, persons, results

from fcluster import Job

STATES = {"OR", "ID", "CA"}


def local_seller(ctx, event):
    """Keep a seller, and the auctions of a seller who isn't known yet. The key is the seller."""
    if isinstance(event, Person):
        ctx.state["person"] = {"name": event.name, "city": event.city, "state": event.state}
        for auction in ctx.state.pop("waiting", []):
            yield {**ctx.state["person"], "auction": auction}
    elif "person" in ctx.state:
        yield {**ctx.state["person"], "auction": event.id}
    else:
        ctx.state.setdefault("waiting", []).append(event.id)


def query(job):
    """Add the query to a job."""
    sellers = persons(job).filter(lambda person: person.state.upper() in STATES)
    sold = auctions(job).filter(lambda auction: auction.category == 10)
    by_seller = job.merge(
        sellers.key_by("id", key="int", name="q3-persons"),
        sold.key_by("seller", key="int", name="q3-auctions"),
    )
    by_seller.process(local_seller).to(results(job, "q3"))


job = Job("nexmark-q3")
query(job)
