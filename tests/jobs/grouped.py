"""A job for tests of tables: numbers, joined with the rows of their keys, are counted and summed by row."""

import os

from fcluster import Job, count, sum_

job = Job(os.environ["FCLUSTER_TEST_JOB"])
numbers = job.table(job.topic(os.environ["FCLUSTER_TEST_SOURCE"]), name="numbers")
rows = job.table(job.topic(os.environ["FCLUSTER_TEST_SOURCE"] + "-rows"), name="rows")

joined = numbers.join(rows, lambda number, row: {"n": number, "row": row}, how="left")
groups = joined.group_by(
    lambda value: "none" if value["row"] is None else f"g{value['row'] % 7}",
    name="groups",
    value=lambda value: value["n"],
)
groups.aggregate(n=count(), total=sum_()).to_stream().to(job.topic(os.environ["FCLUSTER_TEST_OUTPUT"]))
