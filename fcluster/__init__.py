"""fcluster: sharded, stateful jobs over Kafka, exactly once.

This is the public API; everything else in the package may change between versions.
"""

from __future__ import annotations

from fcluster.api.context import CallContext, RecordContext, RowContext
from fcluster.api.job import UNSET, Context, Job, Record, Stream, Table, WindowedStream
from fcluster.api.tables import GlobalTable, GroupedTable
from fcluster.common.errors import FclusterError
from fcluster.graph.aggregates import (
    Aggregate,
    collect,
    count,
    count_distinct,
    first,
    last,
    max_,
    mean,
    min_,
    reduce,
    sum_,
    top_n,
    variance,
)
from fcluster.graph.calls import Circuit, CircuitOpenError, Retry
from fcluster.graph.changes import Change
from fcluster.graph.codecs import Codec, CodecUse
from fcluster.graph.counted import Counted
from fcluster.graph.durations import days, hours, milliseconds, minutes, seconds
from fcluster.graph.headers import Header
from fcluster.graph.operators import TopicSpec as Topic
from fcluster.graph.sketches import approx_distinct
from fcluster.graph.sliding import Sliding
from fcluster.graph.states import DocumentState, ListState, MapState, ValueState
from fcluster.graph.watermark import Watermark
from fcluster.graph.windows import Cumulative, Hopping, Session, Tumbling

__version__ = "0.1.0"

__all__ = [
    "UNSET",
    "Aggregate",
    "CallContext",
    "Change",
    "Circuit",
    "CircuitOpenError",
    "Codec",
    "CodecUse",
    "Context",
    "Counted",
    "Cumulative",
    "DocumentState",
    "FclusterError",
    "GlobalTable",
    "GroupedTable",
    "Header",
    "Hopping",
    "Job",
    "ListState",
    "MapState",
    "Record",
    "RecordContext",
    "Retry",
    "RowContext",
    "Session",
    "Sliding",
    "Stream",
    "Table",
    "Topic",
    "Tumbling",
    "ValueState",
    "Watermark",
    "WindowedStream",
    "__version__",
    "approx_distinct",
    "collect",
    "count",
    "count_distinct",
    "days",
    "first",
    "hours",
    "last",
    "max_",
    "mean",
    "milliseconds",
    "min_",
    "minutes",
    "reduce",
    "seconds",
    "sum_",
    "top_n",
    "variance",
]
