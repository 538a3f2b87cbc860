"""fcluster: sharded, stateful jobs over Kafka, exactly once.

This is the public API; everything else in the package may change between versions.
"""

from __future__ import annotations

from fcluster.common.errors import FclusterError
from fcluster.common.job import UNSET, Context, Job, Record, Stream
from fcluster.common.topology import TopicSpec as Topic

__version__ = "0.1.0"

__all__ = ["UNSET", "Context", "FclusterError", "Job", "Record", "Stream", "Topic", "__version__"]
