"""A job for tests of tables: rows refer to others by a foreign key, and are joined with them."""

import os

from fcluster import Job

job = Job(os.environ["FCLUSTER_TEST_JOB"])
source = os.environ["FCLUSTER_TEST_SOURCE"]
numbers = job.table(job.topic(source), name="numbers")
rows = job.table(job.topic(f"{source}-rows"), name="rows")


def target_of(number):
    """The key of the row to which a number refers. Some refer to none."""
    return None if number % 11 == 0 else f"k{number * 3 % 40}"


joined = numbers.join(
    rows, lambda number, row: {"n": number, "row": row}, on=target_of, name="joined", how="left"
)
joined.to_stream().to(job.topic(os.environ["FCLUSTER_TEST_OUTPUT"]))
