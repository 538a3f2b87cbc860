"""Nexmark q8, monitor new users: who opens an auction in the ten seconds in which they register?"""

from auction_site import Auction, Person, auctions, persons, results

from fcluster import Aggregate, Job, Tumbling, seconds, sum_

SIZE = seconds(10)


def keep_name(kept, event):
    """Remember the name, if the event is that of the registration."""
    return event.name if isinstance(event, Person) else kept


NAME = Aggregate("name", init=lambda: None, add=keep_name)


def query(job):
    """Add the query to a job."""
    events = job.merge(
        persons(job).key_by("id", key="int", name="q8-persons"),
        auctions(job).key_by("seller", key="int", name="q8-auctions"),
    )
    (
        events.window(Tumbling(SIZE), name="q8-new")
        .aggregate(name=NAME, auctions=sum_(lambda event: isinstance(event, Auction)))
        .filter(lambda window: window["name"] is not None and window["auctions"] > 0)
        .map(lambda window: {"id": window["key"], "name": window["name"], "start": window["start"]})
        .to(results(job, "q8"))
    )


job = Job("nexmark-q8")
query(job)
