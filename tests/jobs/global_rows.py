"""A job for tests of global tables: numbers with the row that a function of each names."""

import os

from fcluster import Job

job = Job(os.environ["FCLUSTER_TEST_JOB"])
source = os.environ["FCLUSTER_TEST_SOURCE"]
rows = job.global_table(job.topic(f"{source}-rows"), name="rows")


def row_of(number):
    """The key of the row that belongs to a number."""
    return f"k{number * 3 % 40}"


joined = job.stream(job.topic(source)).join(
    rows, lambda number, row: {"n": number, "row": row}, on=row_of, how="left"
)
joined.to(job.topic(os.environ["FCLUSTER_TEST_OUTPUT"]))
