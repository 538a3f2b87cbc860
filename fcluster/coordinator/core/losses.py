"""Records that end the processes of workers, for example by a crash in a C extension or by using too much
memory.

Responsible for: counting how often in a row the sessions of a shard are lost with nothing committed in
between. After a few losses, the shard's next owners announce each record before they process it, so that it
is known which record it is. Rules:

- A record is blamed only for sessions that were lost after it was announced, and before the worker said that
  it had survived it. Workers are often killed from outside. But if this happens again and again while the
  same record is being processed, it isn't chance.
- A committed offset clears everything before it.

Must not: decide what happens to the record; the worker decides that, by the `on_error` of its step. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fcluster.common.ids import ShardId
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.model import HELD_PHASES, Deaths, Session
from fcluster.coordinator.core.outbox import Outbox
from fcluster.coordinator.core.progress import Progress
from fcluster.wire import messages

ANNOUNCED_FROM_TIMES = 2
"""After this many lost sessions in a row, records are announced."""


class Losses:
    """Keeps track of lost sessions and of what they were doing."""

    def __init__(self, cluster: Cluster, outbox: Outbox, progress: Progress) -> None:
        self._cluster = cluster
        self._outbox = outbox
        self._progress = progress

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
        deaths = self._cluster.deaths.get(shard)
        if deaths is None or any(_clears(deaths, number, offset) for number, offset in committed.items()):
            deaths = self._cluster.deaths[shard] = Deaths(committed, 0)
        deaths.times += 1
        if begun is not None:
            known = deaths.suspect
            at = (begun.input, begun.offset)
            times = known.times + 1 if known is not None and (known.input, known.offset) == at else 1
            deaths.suspect = messages.SuspectRecord(
                shard, begun.offset, times, begun.step, begun.record, begun.input
            )
            what = f"{begun.record} in {begun.step!r}" if begun.step else begun.record
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

    def committed(self, status: messages.ShardStatus) -> None:
        """A session has committed offsets of a shard."""
        deaths = self._cluster.deaths.get(status.shard)
        if deaths is not None and _clears(deaths, status.input, status.committed):
            del self._cluster.deaths[status.shard]


def _clears(deaths: Deaths, number: int, committed: int) -> bool:
    """Whether this committed offset of an input shows that the deaths had other causes, or have stopped."""
    if deaths.suspect is not None:
        return number == deaths.suspect.input and committed > deaths.suspect.offset
    return committed > deaths.committed.get(number, committed)


def suspects_of(cluster: Cluster, shards: Sequence[ShardId]) -> list[messages.SuspectRecord]:
    """What the next owners of these shards have to know."""
    return [
        deaths.suspect or messages.SuspectRecord(shard)
        for shard in shards
        if (deaths := cluster.deaths.get(shard)) is not None
        and (deaths.suspect is not None or deaths.times >= ANNOUNCED_FROM_TIMES)
    ]
