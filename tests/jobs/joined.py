"""A job for tests of joins: numbers with the row of their key; a key without a row has nothing there."""

import os

from fcluster import Job

job = Job(os.environ["FCLUSTER_TEST_JOB"])
source = job.topic(os.environ["FCLUSTER_TEST_SOURCE"])
rows = job.table(job.topic(os.environ["FCLUSTER_TEST_SOURCE"] + "-rows"), name="rows")

joined = job.stream(source).join(rows, lambda value, row: {"n": value, "row": row}, how="left")
joined.to(job.topic(os.environ["FCLUSTER_TEST_OUTPUT"]))
