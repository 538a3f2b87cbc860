"""A job for tests of joins of streams: numbers of two topics that are at most 100 ms apart."""

import os
from datetime import timedelta

from fcluster import Job

job = Job(os.environ["FCLUSTER_TEST_JOB"])
left = job.stream(job.topic(os.environ["FCLUSTER_TEST_SOURCE"]))
right = job.stream(job.topic(os.environ["FCLUSTER_TEST_SOURCE"] + "-rows"))

pairs = left.join(right, within=timedelta(milliseconds=100), how="outer", name="pairs")
pairs.to(job.topic(os.environ["FCLUSTER_TEST_OUTPUT"]))
