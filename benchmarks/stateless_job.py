"""As `running_totals_job`, without state: each record becomes one output."""

import os

from fcluster import Job

job = Job(os.environ.get("BENCH_JOB", "bench-stateless"))
source = job.topic(os.environ.get("BENCH_SOURCE", "bench-in"), value="json")
output = job.topic(os.environ.get("BENCH_OUTPUT", "bench-out"), value="json")


def convert(record):
    return {
        "id": record["id"],
        "key": record["key"],
        "count": 1,
        "sum": 2 * record["value"],
        "at": record["at"],
    }


job.stream(source).map(convert).to(output)
