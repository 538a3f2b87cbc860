"""The operators of a chain, one file each. `operator_for` returns the one for a node of the job's
description.
"""

from __future__ import annotations

from fcluster.engine.operators.base import CompiledOperator
from fcluster.engine.operators.branch import BranchOperator
from fcluster.engine.operators.broadcast import BroadcastOperator
from fcluster.engine.operators.changes import TellChangesOperator
from fcluster.engine.operators.counted import CountedOperator
from fcluster.engine.operators.filter import FilterOperator
from fcluster.engine.operators.flat_map import FlatMapOperator
from fcluster.engine.operators.foreign import (
    AnswerAgainOperator,
    ForeignTableOperator,
    SubscribeOperator,
    SubscribersOperator,
)
from fcluster.engine.operators.gather import GatherOperator
from fcluster.engine.operators.group import GroupTableOperator, RegroupOperator, RunningTableOperator
from fcluster.engine.operators.map import MapOperator
from fcluster.engine.operators.map_async import MapAsyncOperator
from fcluster.engine.operators.peek import PeekOperator
from fcluster.engine.operators.process import ProcessOperator
from fcluster.engine.operators.processing_time import InProcessingTime
from fcluster.engine.operators.session import SessionOperator
from fcluster.engine.operators.sliding import SlidingOperator
from fcluster.engine.operators.stream_join import JoinStreamsOperator
from fcluster.engine.operators.table import KeepTableOperator
from fcluster.engine.operators.table_join import JoinTableOperator
from fcluster.engine.operators.window import WindowOperator
from fcluster.graph.counted import Counted
from fcluster.graph.operators import (
    AnswerAgain,
    Branch,
    Broadcast,
    Filter,
    FlatMap,
    ForeignTable,
    GroupTable,
    JoinStreams,
    JoinTable,
    KeepTable,
    Map,
    MapAsync,
    Operator,
    Peek,
    Regroup,
    Subscribe,
    Subscribers,
    TellChanges,
    Window,
)
from fcluster.graph.sliding import Sliding
from fcluster.graph.windows import Gathered, Session

__all__ = ["CompiledOperator", "operator_for"]


def operator_for(node: Operator, number: int, chain: str) -> CompiledOperator:
    """The operator for the `number`th node (from 1) of the chain of that name."""
    if isinstance(node, Filter):
        return FilterOperator(node, number, chain)
    if isinstance(node, Map):
        return MapOperator(node, number, chain)
    if isinstance(node, MapAsync):
        return MapAsyncOperator(node, number, chain)
    if isinstance(node, FlatMap):
        return FlatMapOperator(node, number, chain)
    if isinstance(node, Peek):
        return PeekOperator(node, number, chain)
    if isinstance(node, Branch):
        return BranchOperator(node, number, chain)
    if isinstance(node, Window):
        return _window_operator(node)
    if isinstance(node, Broadcast):
        return BroadcastOperator(node)
    if isinstance(node, KeepTable):
        return KeepTableOperator(node)
    if isinstance(node, Regroup):
        return RegroupOperator(node)
    if isinstance(node, GroupTable):
        return RunningTableOperator(node) if node.of == "records" else GroupTableOperator(node)
    if isinstance(node, Subscribe):
        return SubscribeOperator(node)
    if isinstance(node, Subscribers):
        return SubscribersOperator(node)
    if isinstance(node, AnswerAgain):
        return AnswerAgainOperator(node)
    if isinstance(node, ForeignTable):
        return ForeignTableOperator(node)
    if isinstance(node, TellChanges):
        return TellChangesOperator(node)
    if isinstance(node, JoinTable):
        return JoinTableOperator(node, number, chain)
    if isinstance(node, JoinStreams):
        return JoinStreamsOperator(node)
    return ProcessOperator(node)


def _window_operator(node: Window) -> CompiledOperator:
    operator = _operator_of_windows(node)
    return InProcessingTime(operator, node.name) if node.clock == "processing" else operator


def _operator_of_windows(node: Window) -> CompiledOperator:
    if isinstance(node.windows, Session):
        return SessionOperator(node)
    if isinstance(node.windows, Sliding):
        return SlidingOperator(node)
    if isinstance(node.windows, Gathered):
        return GatherOperator(node)
    return CountedOperator(node) if isinstance(node.windows, Counted) else WindowOperator(node)
