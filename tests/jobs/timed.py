"""A job for tests of timers: each record has its own key, and sets a timer in each clock."""

import os

from fcluster import Job

EVENT_MS = 5_000
PROCESSING_MS = 400

job = Job(os.environ["FCLUSTER_TEST_JOB"])
source = job.topic(os.environ["FCLUSTER_TEST_SOURCE"])
output = job.topic(os.environ["FCLUSTER_TEST_OUTPUT"])


@job.process(source, to=output)
def remember(ctx, value):
    """Writes the record, and sets timers that fire later."""
    ctx.state["value"] = value
    ctx.timer("event", at=ctx.timestamp + EVENT_MS)
    ctx.timer("processing", at=ctx.processing_time + PROCESSING_MS, clock="processing")
    return {"value": value, "by": "record"}


@remember.on_timer("event")
def by_event(_key, ctx):
    """In event time."""
    return {"value": ctx.state["value"], "by": "event"}


@remember.on_timer("processing")
def by_processing(_key, ctx):
    """In processing time."""
    return {"value": ctx.state["value"], "by": "processing"}
