"""Like `running_totals_job`, by groups of keys: each record first goes through a repartition topic."""

import os

from fcluster import Job

GROUPS = 500

job = Job(os.environ.get("BENCH_JOB", "bench-regrouped"))
source = job.topic(os.environ.get("BENCH_SOURCE", "bench-in"), value="json")
output = job.topic(os.environ.get("BENCH_OUTPUT", "bench-out"), value="json")


def group(record):
    return f"g{int(record['key'][1:]) % GROUPS}"


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


job.stream(source).key_by(group).process(totals, to=output)
