"""Nexmark q11, user sessions: how many bids does a person make until there is none for ten seconds?"""

from auction_site import bids, results

from fcluster import Job, Session, count, seconds

GAP = seconds(10)


def query(job):
    """Add the query to a job."""
    (
        bids(job)
        .key_by("bidder", key="int", name="q11-bidders")
        .window(Session(GAP), name="q11-sessions")
        .aggregate(bids=count())
        .map(lambda window: {"bidder": window.pop("key"), **window})
        .to(results(job, "q11"))
    )


job = Job("nexmark-q11")
query(job)
