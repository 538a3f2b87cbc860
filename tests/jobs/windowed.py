"""A job for tests of windows: counts by key, and behind a repartition by the last digit of the value."""

import os
from datetime import timedelta

from fcluster import Hopping, Job, Tumbling, approx_distinct, collect, count, sum_

MS = timedelta(milliseconds=1)
SIZE_MS = 1_000

job = Job(os.environ["FCLUSTER_TEST_JOB"])
source = job.topic(os.environ["FCLUSTER_TEST_SOURCE"])
output = job.topic(os.environ["FCLUSTER_TEST_OUTPUT"])

(
    job.stream(source)
    .window(Tumbling(SIZE_MS * MS, grace=100 * MS), name="by-key")
    .aggregate(values=collect())
    .map(lambda result: {**result, "by": "key"})
    .to(output)
)
(
    job.stream(source)
    .key_by(lambda value: str(value % 10), name="digit")
    .window(Hopping(2 * SIZE_MS * MS, every=SIZE_MS * MS), name="by-digit")
    .aggregate(n=count(), total=sum_(), about=approx_distinct())
    .map(lambda result: {**result, "by": "digit"})
    .to(output)
)
