"""Several queries of Nexmark in one job, which reads the events once.

NEXMARK_QUERIES=q3,q5,q9 fcluster up examples/nexmark/together.py
"""

import os
from importlib import import_module

from fcluster import Job

job = Job(os.environ.get("NEXMARK_JOB", "nexmark-together"))
for name in os.environ.get("NEXMARK_QUERIES", "q3,q5,q9").split(","):
    import_module(f"q{int(name[1:]):02}").query(job)
