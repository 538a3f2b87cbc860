"""The benchmarks' job: a running count and sum for each key, and one output for each input."""

import os

from fcluster import Job

job = Job(os.environ.get("BENCH_JOB", "bench-totals"))
source = job.topic(os.environ.get("BENCH_SOURCE", "bench-in"), value="json")
output = job.topic(os.environ.get("BENCH_OUTPUT", "bench-out"), value="json")


@job.process(source, to=output)
def totals(ctx, record):
    state = ctx.state
    state["count"] = state.get("count", 0) + 1
    state["sum"] = state.get("sum", 0) + record["value"]
    return {
        "id": record["id"],
        "key": record["key"],
        "count": state["count"],
        "sum": state["sum"],
        "at": record["at"],
    }
