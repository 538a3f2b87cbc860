"""What a job does as its file says, but perhaps not as its author meant it.

Responsible for: finding, in a topology, aggregates that count values several times, because they follow
windows whose results are passed on before they close; and topics that never take the keys of what is written
to them. `fcluster check` says so. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from fcluster.common.ids import is_internal_topic
from fcluster.graph.codecs import kind_title, may_carry
from fcluster.graph.operators import (
    GroupTable,
    JoinTable,
    KeepTable,
    KeptTable,
    Map,
    Operator,
    Peek,
    Process,
    Window,
    is_running,
)
from fcluster.graph.stages import Chain, Stage
from fcluster.graph.topology import Topology

_REPEATABLE: Final = frozenset({"min", "max", "first", "last", "count_distinct", "approx_distinct"})
"""The aggregates that mean the same if results that are replaced by later ones count, too."""
_REMEDY: Final = (
    "leave out emit=, so that each window has one result. Or keep the newest result of each window in a "
    "table, .table(name=..., ttl=...), and let table.group_by() take away what is replaced (docs/windows.md, "
    "Results that are added up). If it is meant, nothing is wrong."
)


class Remark(NamedTuple):
    """What may not be meant, and what to do then.

    Attributes:
        is_error: whether it can't be meant.
    """

    message: str
    remedy: str
    is_error: bool = False


def remarks_on(topology: Topology) -> list[Remark]:
    """What may not be meant in a job."""
    return [*_repeated_counts(topology), *_keys_that_never_fit(topology)]


def _keys_that_never_fit(topology: Topology) -> Iterator[Remark]:
    """Topics that get the keys that a stream was read with, and take none of them. It may work while records
    have no keys, so such a job isn't refused. What a handler gives may have keys of its own.
    """
    for stage in topology.stages:
        for chain in stage.chains:
            sink, last = chain.sink, chain.operators[-1] if chain.operators else None
            if sink is None or chain.rekey is not None or is_internal_topic(sink.name):
                continue
            if isinstance(last, Process) or any(
                isinstance(step, Window) and step.keyless for step in chain.operators
            ):
                continue
            read = stage.inputs[chain.input]
            if not may_carry(sink.key, read.topic.key):
                found = kind_title(read.topic.key)
                yield Remark(
                    f"The topic {sink.name!r} has {kind_title(sink.key)} keys, but what is written to it has "
                    f"the {found} keys of {read.name or read.topic.name!r}: each record with a key fails.",
                    f"Declare {sink.name!r} with {found} keys, or give the records others: "
                    f".key_by(...) in front of .to({sink.name!r}).",
                    is_error=True,
                )


def _repeated_counts(topology: Topology) -> list[Remark]:
    return [
        Remark(_message(window, step), _REMEDY)
        for stage in topology.stages
        for chain in stage.chains
        for at, window in enumerate(chain.operators)
        if isinstance(window, Window) and window.emit != "close" and not window.is_part
        for step in _aggregates_behind(topology, chain, chain.operators[at + 1 :])
        if _counts_again(step)
    ]


def _aggregates_behind(
    topology: Topology, chain: Chain, operators: Sequence[Operator]
) -> Iterator[Window | KeptTable]:
    """The windows and running aggregates that all values reach which come to these operators, the rest of the
    chain. What a filter or a function with state makes of values is its own business.
    """
    for step in operators:
        if isinstance(step, Window) or (isinstance(step, KeptTable) and is_running(step)):
            yield step
            return
        if not isinstance(step, Map | Peek | JoinTable):
            return
    if chain.rekey is None or chain.sink is None:
        return
    for reader, number in _readers(topology, chain.sink.name):
        for following in reader.chains_of(number):
            yield from _aggregates_behind(topology, following, following.operators)


def _readers(topology: Topology, topic: str) -> Iterator[tuple[Stage, int]]:
    """The input that reads a repartition topic."""
    for stage in topology.stages:
        for number, source in enumerate(stage.inputs):
            if source.internal and source.topic.name == topic:
                yield stage, number


def _counts_again(step: Window | KeptTable) -> bool:
    if isinstance(step, Window | GroupTable):
        return any(aggregate.name not in _REPEATABLE for _name, aggregate in step.fields)
    return isinstance(step, KeepTable)


def _message(window: Window, step: Window | KeptTable) -> str:
    kind = "window" if isinstance(step, Window) else "running aggregate"
    when = "after each record" if window.emit == "update" else "at intervals"
    again = ", and those that are withdrawn" if window.store.kind == "sessions" else ""
    return (
        f"The {kind} {step.name!r} adds up results of the window {window.name!r}, which are passed on "
        f"{when}: former results of a window count besides the newest one{again}."
    )
