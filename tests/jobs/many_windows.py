"""A job for tests of windows: the same numbers in all other kinds of windows."""

import os
from datetime import timedelta

from fcluster import Counted, Cumulative, Job, Session, Sliding, Tumbling, collect, count, sum_

MS = timedelta(milliseconds=1)
SIZE_MS = 400
STEP_MS = 200
WITHIN_MS = 160
GAP_MS = 160
"""The records of a key are 80 ms apart, so two of them are exactly as far apart as a window allows."""

job = Job(os.environ["FCLUSTER_TEST_JOB"])
source = job.topic(os.environ["FCLUSTER_TEST_SOURCE"])
output = job.topic(os.environ["FCLUSTER_TEST_OUTPUT"])


def is_kept(number):
    """Pauses for sessions: of each key, three records in ten are left out."""
    return number // 8 % 10 < 7


def told(by):
    """Says of a result which window it is of."""
    return lambda result: {**result, "by": by}


fields = {"n": count(), "total": sum_(), "values": collect()}
stream = job.stream(source)
for name, windows in {
    "cumulative": Cumulative(SIZE_MS * MS, STEP_MS * MS),
    "sliding": Sliding(WITHIN_MS * MS),
    "counted": Counted(3, every=2),
}.items():
    stream.window(windows, name=name).aggregate(**fields).map(told(name)).to(output)
sessions = stream.filter(is_kept).window(Session(GAP_MS * MS), name="session", emit="update")
sessions.aggregate(**fields).map(told("session")).to(output)
stream.window_all(Tumbling(SIZE_MS * MS), name="all").aggregate(**fields).map(told("all")).to(output)
