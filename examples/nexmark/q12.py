"""Nexmark q12, processing-time windows: how many bids of a person are processed in each ten seconds?

This is about the wall clock, so each run gives other windows; only the sum of a person's bids is always the
same. Windows are of event time, so this is a handler with a timer in processing time.
"""

from auction_site import bids, results

from fcluster import Job

SIZE_MS = 10_000


def count_bids(ctx, _bid):
    """Count a bid in the window of the wall clock. The key is the bidder."""
    end_ms = (ctx.processing_time // SIZE_MS + 1) * SIZE_MS
    if ctx.state.get("end") not in (None, end_ms):
        yield finish("", ctx)  # the clock was faster than the timer
    ctx.state["end"] = end_ms
    ctx.state["bids"] = ctx.state.get("bids", 0) + 1
    ctx.timer("finish", at=end_ms, clock="processing")


def finish(_key, ctx):
    """The window is over."""
    result = {"bidder": ctx.key, "bids": ctx.state["bids"], "end": ctx.state["end"]}
    ctx.state.clear()
    return result


def query(job):
    """Add the query to a job."""
    by_bidder = bids(job).key_by("bidder", key="int", name="q12-bidders")
    by_bidder.process(count_bids, timers={"finish": finish}).to(results(job, "q12"))


job = Job("nexmark-q12")
query(job)
