"""A running count and sum for each group of keys, after a repartition: the checker's second job.

Names come from the environment like those of running_totals.py; FCLUSTER_TEST_GROUPS is the number of groups.
"""

import os

from fcluster import Job

GROUPS = int(os.environ.get("FCLUSTER_TEST_GROUPS", "500"))

job = Job(os.environ.get("FCLUSTER_TEST_JOB", "regrouped-totals"))
source = job.topic(os.environ.get("FCLUSTER_TEST_SOURCE", "numbers"), value="json")
output = job.topic(os.environ.get("FCLUSTER_TEST_OUTPUT", "group-totals"), value="json")


def group(record):
    return f"g{int(record['key'][1:]) % GROUPS}"


def totals(ctx, record):
    state = ctx.state
    state["count"] = state.get("count", 0) + 1
    state["sum"] = state.get("sum", 0) + record["value"]
    return {
        "id": record["id"],
        "key": record["key"],
        "seq": record["seq"],
        "group": ctx.key,
        "count": state["count"],
        "sum": state["sum"],
        "at": record["at"],
    }


job.stream(source).key_by(group).process(totals, to=output)
