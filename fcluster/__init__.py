"""fcluster: sharded, stateful jobs over Kafka, exactly once.

This is the public API; everything else in the package may change between versions.
"""

from __future__ import annotations

from fcluster.api.job import UNSET, Context, Job, Record, Stream
from fcluster.common.errors import FclusterError
from fcluster.graph.codecs import Codec, CodecUse
from fcluster.graph.states import ListState, MapState, ValueState
from fcluster.graph.topology import TopicSpec as Topic
from fcluster.graph.watermark import Watermark

__version__ = "0.1.0"

__all__ = [
    "UNSET",
    "Codec",
    "CodecUse",
    "Context",
    "FclusterError",
    "Job",
    "ListState",
    "MapState",
    "Record",
    "Stream",
    "Topic",
    "ValueState",
    "Watermark",
    "__version__",
]
