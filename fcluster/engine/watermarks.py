"""Watermark records: how a stage reports its event time to the stages after its repartition topics.

Responsible for: the format of such a record, how it is recognised, and when one is needed. It belongs to the
transaction of the epoch whose end it reports, and comes after the data of that epoch. One record for each
partition of the topic reports all shards that its writer has in the epoch. Pure.

Unlike data records in a repartition topic, it has no key. A header identifies it. It has no timestamp, so it
doesn't wait for other inputs where several are merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.engine.clock import END_MS, EventClock, Said, decode_watermark, encode_watermark
from fcluster.engine.records import Headers, SourceRecord
from fcluster.graph.stages import Input, Stage
from fcluster.graph.topology import Topology

SELDOM_MS: Final = 1_000
"""The shortest time between two reports to a topic if nothing downstream depends on event time. The end of
event time is reported at once everywhere: a bounded run waits for it.
"""
WATERMARK_HEADER: Final = "fcluster.watermark"
WATERMARK_HEADERS: Final[Headers] = [(WATERMARK_HEADER, b"")]


def is_watermark(record: SourceRecord) -> bool:
    """Whether a record of a repartition topic is a watermark record."""
    if record.key() is not None:
        return False
    headers = record.headers()
    return bool(headers) and headers[0][0] == WATERMARK_HEADER


def watermarks_in(record: SourceRecord) -> tuple[int, list[Said]]:
    """How many shards there are upstream, and what some of them report.

    Raises:
        UnreadableClockError: the record is damaged.
    """
    return decode_watermark(record.value() or b"")


def make_clock(stage: Stage, position: CommittedPosition) -> EventClock | None:
    """The event time of a shard at its committed position. None: the job doesn't use event time.

    Raises:
        UnreadableClockError: what was committed for it isn't a clock.
    """
    if not stage.keeps_time:
        return None
    clock = EventClock([_delay_ms(source) for source in stage.inputs], stage.timeless_inputs)
    for number, at in enumerate(position.inputs):
        clock.restore(number, at.clock)
    return clock


def _delay_ms(source: Input) -> int | None:
    assert source.watermark is not None
    return None if source.internal else source.watermark.max_delay_ms


class OwnRecord(NamedTuple):
    """A record for the job's own use that has to be written to a partition of a repartition topic, without
    key and timestamp.
    """

    topic: str
    partition: int
    value: bytes | None
    headers: Headers = WATERMARK_HEADERS


class Telling:
    """What this process has reported to the stages downstream.

    Args:
        topology: the job's topology.
        seldom_ms: see `SELDOM_MS`.
    """

    def __init__(self, topology: Topology, seldom_ms: float = SELDOM_MS) -> None:
        self._targets = {
            stage.name: [
                (topic, reader.name, 0.0 if topology.time_is_needed(reader) else seldom_ms)
                for topic, reader in topology.told_topics(stage).items()
            ]
            for stage in topology.stages
        }
        self._told: dict[tuple[ShardId, str], tuple[int | None, bool]] = {}
        self._told_at_ms: dict[tuple[str, str], float] = {}
        self._put_off: dict[tuple[ShardId, str], float] = {}  # the time until which it is postponed

    def forget(self, shards: Iterable[ShardId]) -> None:
        """From now on, other processes may report for these shards, or what was reported isn't committed."""
        leaving = set(shards)
        self._told = {key: said for key, said in self._told.items() if key[0] not in leaving}
        self._put_off = {key: at for key, at in self._put_off.items() if key[0] not in leaving}

    def overdue(self, now_ms: float) -> frozenset[ShardId]:
        """The shards with a postponed report that is due now. Each is returned once: they need an epoch,
        although they may have no more records.

        Args:
            now_ms: as in `due`.
        """
        ready = [key for key, at in self._put_off.items() if at <= now_ms]
        for key in ready:
            del self._put_off[key]
        return frozenset(shard for shard, _topic in ready)

    def due(
        self, clocks: Mapping[ShardId, EventClock], sizes: Mapping[str, int], now_ms: float
    ) -> list[OwnRecord]:
        """The records that have to be written now. They count as written.

        Args:
            clocks: the clocks of the shards in the epoch.
            sizes: how many shards each stage has. A stage that isn't in it neither reports nor receives
                reports.
            now_ms: the time on a clock that never goes back.
        """
        records: list[OwnRecord] = []
        by_stage: dict[str, list[ShardId]] = {}
        for shard in clocks:
            by_stage.setdefault(shard.stage, []).append(shard)
        for stage, shards in by_stage.items():
            for topic, reader, interval_ms in self._targets[stage]:
                if stage not in sizes or reader not in sizes:
                    continue
                due_ms = self._told_at_ms.get((stage, topic), float("-inf")) + interval_ms
                news = {shard: (clocks[shard].told_ms, clocks[shard].is_idle) for shard in shards}
                said = self._unsaid(topic, news, None if now_ms >= due_ms else due_ms)
                if said:
                    self._told_at_ms[stage, topic] = now_ms
                    value = encode_watermark(sizes[stage], said)
                    records += [OwnRecord(topic, number, value) for number in range(sizes[reader])]
        return records

    def _unsaid(
        self, topic: str, news: Mapping[ShardId, tuple[int | None, bool]], until_ms: float | None
    ) -> list[Said]:
        """What has to be reported. It is postponed until `until_ms`, unless a shard has become idle or active
        again, or has ended. A shard that has ended may have no further epoch. Another worker that takes it
        over has nothing to do there, so it would never report what was postponed.
        """
        before = {shard: self._told.get((shard, topic), (None, False)) for shard in news}
        unsaid = [shard for shard in news if news[shard] != before[shard]]
        if until_ms is not None and all(
            news[shard][1] == before[shard][1] and news[shard][0] != END_MS for shard in unsaid
        ):
            self._put_off |= {(shard, topic): until_ms for shard in unsaid}
            return []
        for shard in news:
            self._told[shard, topic] = news[shard]
            self._put_off.pop((shard, topic), None)
        return [Said(shard.partition, *news[shard]) for shard in unsaid]
