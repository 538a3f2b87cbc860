"""Records that end the processes of workers, for example by a crash in a C extension, by using too much
memory, or by a handler that hangs.

Responsible for: counting how often in a row the sessions of a shard are lost with nothing committed in
between. After a few losses, the shard's next owners announce each record before they process it, so that it
is known which record it is. And counting how often a handler hung at a record. Rules:

- There may be many such records. Then they are announced in groups, and the next owner announces those of the
  group in which a session was lost one by one.
- A record is blamed only for sessions that were lost after it was announced, and before the worker said that
  it had survived it. Workers are often killed from outside. But if this happens again and again while the
  same record is being processed, it isn't chance.
- A committed offset clears everything before it. Until then a condemned record comes again with what is
  behind it, which may end processes as well: so several records of a shard can be condemned.
- Timers at one record are told apart by the names of their steps.
- The journal holds each count before the shard's next owner is told of it, so a new leader counts on. There
  is one entry of each kind for a shard, and it is bounded. The decision to end the job
  clears all of them: the job may be started again with a handler that has been mended.

Must not: decide what happens to the record; the worker decides that, by the `on_error` of its step. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from fcluster.common.failures import bounded_text
from fcluster.common.ids import ShardId
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.model import HELD_PHASES, Deaths, Session
from fcluster.coordinator.core.outbox import Outbox, deaths_key, overdue_key
from fcluster.coordinator.core.progress import Progress
from fcluster.engine.failure import timer_in
from fcluster.wire import messages

ANNOUNCED_FROM_TIMES = 2
"""After this many lost sessions in a row, records are announced."""
RECORDS_MAX = 10
"""So many records of a shard are remembered."""
TEXT_CHARACTERS_MAX = 500
"""So much is kept of a text that is only for people."""

_Noted = TypeVar("_Noted", messages.SuspectRecord, messages.OverdueRecord)


class Losses:
    """Keeps track of lost sessions, of what they were doing, and of handlers that hang."""

    def __init__(self, cluster: Cluster, outbox: Outbox, progress: Progress) -> None:
        self._cluster = cluster
        self._outbox = outbox
        self._progress = progress

    def recover(self, kind: str, shard: ShardId, document: Any) -> None:
        """What the journal holds about a shard, under a key that begins with `kind`."""
        try:
            if kind == "deaths":
                self._cluster.deaths[shard] = _deaths_of(shard, document)
            else:
                self._cluster.overdue[shard] = _records_of(messages.OverdueRecord, shard, document["records"])
        except (KeyError, TypeError, msgspec.ValidationError):
            pass  # of another version: it is counted anew

    # --- deaths ---------------------------------------------------------------------------------------

    def begun(self, session: Session, message: messages.RecordBegun) -> None:
        """The session is about to process this record, and waits until it is told that the coordinator
        knows.
        """
        shard = self._cluster.shards.get(message.shard)
        if shard is None or shard.session != session.number:
            return
        session.begun = message
        noted = messages.RecordNoted(self._cluster.term, session.number, message.shard, message.offset)
        self._outbox.send(session.peer, noted)

    def lost(self, session: Session) -> None:
        """The session is over, and its worker didn't end it."""
        begun, session.begun = session.begun, None
        for shard in self._cluster.shards_of(session.slot):
            standings = self._progress.standings.get(shard.identity)
            if shard.phase in HELD_PHASES and shard.session == session.number and standings:
                mine = begun if begun is not None and begun.shard == shard.identity else None
                committed = {number: standing.committed for number, standing in standings.items()}
                self._count(session, shard.identity, committed, mine)

    def _count(
        self,
        session: Session,
        shard: ShardId,
        committed: Mapping[int, int],
        begun: messages.RecordBegun | None,
    ) -> None:
        deaths: Deaths | None = self._cluster.deaths.get(shard)
        for number, offset in committed.items():
            deaths = None if deaths is None else _left(deaths, number, offset)
        if deaths is None:
            deaths = Deaths(committed, 0)
        self._cluster.deaths[shard] = deaths
        deaths.times += 1
        if begun is not None and begun.span > 1:
            self._narrow(session, deaths, begun, committed)
        elif begun is not None:
            record = bounded_text(begun.record, TEXT_CHARACTERS_MAX)
            found = messages.SuspectRecord(shard, begun.offset, 1, begun.step, record, begun.input)
            deaths.suspects = _counted(deaths.suspects, found, messages.SUSPECT_TIMES_MAX)
            times = deaths.suspects[-1].times
            if times == messages.SUSPECT_TIMES_MAX:
                deaths.times = 0  # what comes behind it begins with a clean slate
            what = f"{record} in {begun.step!r}" if begun.step else record
            self._outbox.log(
                "warning", f"slot {session.slot} was lost while it processed {what}, {times} times in a row"
            )
        elif deaths.times == ANNOUNCED_FROM_TIMES:
            offsets = ", ".join(str(offset) for _, offset in sorted(committed.items()))
            self._outbox.log(
                "warning",
                f"workers with {shard} were lost {deaths.times} times in a row at offset {offsets}, and "
                "nothing was committed in between; the next one announces each record before it processes it",
            )
        self._outbox.journal(deaths_key(shard), document_of_deaths(deaths))

    def _narrow(
        self, session: Session, deaths: Deaths, begun: messages.RecordBegun, committed: Mapping[int, int]
    ) -> None:
        """It is one of several records. The next owner announces each of them."""
        shard, number = begun.shard, begun.input
        end = begun.offset + begun.span
        offset = max(begun.offset, committed.get(number, 0))
        if offset >= end:
            return  # all of them were committed
        record = bounded_text(begun.record, TEXT_CHARACTERS_MAX)
        group = messages.SuspectRecord(shard, offset, 0, "", record, number, end - offset)
        deaths.suspects = (*_condemned(deaths.suspects, messages.SUSPECT_TIMES_MAX), group)[-RECORDS_MAX:]
        self._outbox.log(
            "warning",
            f"slot {session.slot} was lost while it processed one of {begun.span} records, at the earliest "
            f"{record}; the next one announces each of them before it processes it",
        )

    # --- handlers that hang -----------------------------------------------------------------------------

    def hung(self, session: Session, message: messages.RecordOverdue) -> None:
        """A handler hangs at a record, and its process ends. The next owner of the shard has to know."""
        session.begun = None  # the process ends because of its own decision
        shard = self._cluster.shards.get(message.shard)
        if shard is None or shard.session != session.number:
            return
        reason = bounded_text(message.reason, TEXT_CHARACTERS_MAX)
        found = messages.OverdueRecord(message.shard, message.offset, 1, reason, message.step, message.input)
        known = self._cluster.overdue.get(message.shard, ())
        self._note_overdue(message.shard, _counted(known, found, messages.OVERDUE_TIMES_MAX))
        self._outbox.log("warning", f"slot {session.slot}: {message.reason}")

    # --- what ends it -----------------------------------------------------------------------------------

    def committed(self, status: messages.ShardStatus) -> None:
        """A session has committed offsets of a shard."""
        if not self._cluster.deaths and not self._cluster.overdue:
            return  # the usual case: it comes with each epoch of each shard
        shard = status.shard
        deaths = self._cluster.deaths.get(shard)
        if deaths is not None:
            before = deaths.suspects
            left = _left(deaths, status.input, status.committed)
            if left is None:
                self._forget_deaths(shard)
            elif left.suspects != before:
                self._outbox.journal(deaths_key(shard), document_of_deaths(left))
        overdue = self._cluster.overdue.get(shard, ())
        behind = _behind(overdue, status.input, status.committed)
        if behind != overdue:
            self._note_overdue(shard, behind)

    def forget(self) -> None:
        """Begin to count anew, for all shards."""
        for shard in list(self._cluster.deaths):
            self._forget_deaths(shard)
        for shard in list(self._cluster.overdue):
            self._note_overdue(shard, ())

    def _forget_deaths(self, shard: ShardId) -> None:
        del self._cluster.deaths[shard]
        self._outbox.journal(deaths_key(shard), None)

    def _note_overdue(self, shard: ShardId, records: tuple[messages.OverdueRecord, ...]) -> None:
        if records:
            self._cluster.overdue[shard] = records
            self._outbox.journal(overdue_key(shard), document_of_overdue(records))
        else:
            del self._cluster.overdue[shard]
            self._outbox.journal(overdue_key(shard), None)


# --- counting ---------------------------------------------------------------------------------------------


def _counted(known: tuple[_Noted, ...], found: _Noted, times_max: int) -> tuple[_Noted, ...]:
    """With the record that was found once more at the end. Besides it only condemned ones are kept."""
    times = 1 + max((one.times for one in known if _is_same(one, found)), default=0)
    condemned = [one for one in _condemned(known, times_max) if not _is_same(one, found)]
    return (*condemned, msgspec.structs.replace(found, times=times))[-RECORDS_MAX:]


def _condemned(known: Iterable[_Noted], times_max: int) -> list[_Noted]:
    return [one for one in known if one.times >= times_max]


def _is_same(one: _Noted, other: _Noted) -> bool:
    timer = timer_in(one.step)
    if timer or timer_in(other.step):
        return timer == other.step
    return (one.input, one.offset) == (other.input, other.offset)


def _left(deaths: Deaths, number: int, committed: int) -> Deaths | None:
    """What is left after this commit in an input; None: the deaths had other causes, or are over."""
    if not deaths.suspects:
        return None if committed > deaths.committed.get(number, committed) else deaths
    deaths.suspects = _behind(deaths.suspects, number, committed)
    return deaths if deaths.suspects else None


def _behind(records: tuple[_Noted, ...], number: int, committed: int) -> tuple[_Noted, ...]:
    """Those that aren't committed."""
    return tuple(one for one in records if one.input != number or committed <= _last_offset(one))


def _last_offset(noted: messages.SuspectRecord | messages.OverdueRecord) -> int:
    return noted.offset + (noted.span - 1 if isinstance(noted, messages.SuspectRecord) else 0)


def suspects_of(cluster: Cluster, shards: Sequence[ShardId]) -> list[messages.SuspectRecord]:
    """What the next owners of these shards have to know."""
    found: list[messages.SuspectRecord] = []
    for shard in shards:
        deaths = cluster.deaths.get(shard)
        if deaths is None:
            continue
        found += deaths.suspects
        is_known = deaths.suspects and deaths.suspects[-1].times < messages.SUSPECT_TIMES_MAX
        if deaths.times >= ANNOUNCED_FROM_TIMES and not is_known:
            found.append(messages.SuspectRecord(shard))
    return found


# --- in the journal: by name, and without the shard, which the key says --------------------------------


def document_of_deaths(deaths: Deaths) -> dict[str, Any]:
    """As the journal holds it."""
    return {
        "committed": {str(number): offset for number, offset in deaths.committed.items()},
        "times": deaths.times,
        "suspects": [_document(suspect) for suspect in deaths.suspects],
    }


def document_of_overdue(records: Sequence[messages.OverdueRecord]) -> dict[str, Any]:
    """As the journal holds it."""
    return {"records": [_document(record) for record in records]}


def _document(noted: messages.SuspectRecord | messages.OverdueRecord) -> dict[str, Any]:
    return {name: getattr(noted, name) for name in noted.__struct_fields__ if name != "shard"}


def _deaths_of(shard: ShardId, document: Any) -> Deaths:
    committed = _decode_committed(msgspec.json.encode(document["committed"]))
    times = _decode_count(msgspec.json.encode(document["times"]))
    return Deaths(committed, times, _records_of(messages.SuspectRecord, shard, document["suspects"]))


def _records_of(kind: type[_Noted], shard: ShardId, documents: Any) -> tuple[_Noted, ...]:
    rows = [
        [shard if name == "shard" else one[name] for name in kind.__struct_fields__]
        for one in documents[-RECORDS_MAX:]
    ]
    return tuple(_DECODE_RECORD[kind](msgspec.json.encode(row)) for row in rows)


_decode_committed = msgspec.json.Decoder(dict[int, int]).decode
_decode_count = msgspec.json.Decoder(int).decode
_DECODE_RECORD: Mapping[type, Callable[[bytes], Any]] = {
    kind: msgspec.json.Decoder(kind).decode for kind in (messages.SuspectRecord, messages.OverdueRecord)
}
"""Made at import: see docs/decisions/0086."""
