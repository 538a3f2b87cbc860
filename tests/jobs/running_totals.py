"""A running count and sum for each key, one output for each input: the checker's plain job.

Names come from the environment, so that many tests can run the file side by side: FCLUSTER_TEST_JOB,
FCLUSTER_TEST_SOURCE, FCLUSTER_TEST_OUTPUT.
"""

import os

from fcluster import Job

job = Job(os.environ.get("FCLUSTER_TEST_JOB", "running-totals"))
source = job.topic(os.environ.get("FCLUSTER_TEST_SOURCE", "numbers"), value="json")
output = job.topic(os.environ.get("FCLUSTER_TEST_OUTPUT", "totals"), value="json")


@job.process(source, to=output)
def totals(ctx, record):
    state = ctx.state
    count = state.get("count", 0) + 1
    total = state.get("sum", 0) + record["value"]
    state["count"] = count
    state["sum"] = total
    return {
        "id": record["id"],
        "key": ctx.key,
        "seq": record["seq"],
        "count": count,
        "sum": total,
        "partition": ctx.partition,
        "offset": ctx.offset,
        "at": record["at"],
    }
