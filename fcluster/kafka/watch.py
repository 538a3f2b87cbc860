"""What a job waits for in Kafka: partitions without a leader, too few replicas in sync, brokers that are
down, and ends of transactions that Kafka may have lost.

Responsible for: reading the cluster's metadata while a job waits, and sentences about it for status and log.
Metadata shows nearly all: a group's offsets and an id's transactions are kept in partitions of internal
topics, whose leaders are their coordinators. Where a partition had no leader, its offsets are read too: if a
transaction ends meanwhile, Kafka 4.3 never tells that partition (KAFKA-20734, decision 0098). Rules: nothing
is requested while all goes well; every request is bounded and runs in its own thread; each problem is logged
when it begins and when it is over, but not in between. Must not decide anything: the findings are for people.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    ConfigResource,  # pyright: ignore[reportPrivateImportUsage]
)

from fcluster.common.errors import FclusterError, KafkaUnavailable
from fcluster.common.failures import bounded_text
from fcluster.common.settings import Settings
from fcluster.kafka.clients import make_admin
from fcluster.kafka.offsets import end_offsets

_log = logging.getLogger("fcluster.coordinator")

LOOK_INTERVAL_S: Final = 1.0
LOOK_TIMEOUT_S: Final = 3.0
NAMED_MAX: Final = 4
SENTENCE_CHARACTERS_MAX: Final = 300
SENTENCES_MAX: Final = 8
HIDDEN_AFTER_S: Final = 10.0
"""How long a partition has to hide the same records before that is a problem. A marker takes milliseconds, a
transaction of a job hardly ever takes that long.
"""
ONE_ATTEMPT_S: Final = 0.0
"""Offsets are read again with the next look."""
OFFSETS_TOPIC: Final = "__consumer_offsets"
TRANSACTIONS_TOPIC: Final = "__transaction_state"

Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class PartitionSeen:
    """A partition in a broker's metadata. `leader` is -1 if it has none."""

    leader: int
    replicas: tuple[int, ...]
    in_sync: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ends:
    """Two ends of a partition.

    Attributes:
        stable: the last stable offset. Readers of committed records see nothing from there on.
        last: the high watermark, read after `stable`.
    """

    stable: int
    last: int


@dataclass(frozen=True, slots=True)
class Look:
    """The result of one check of the cluster.

    Attributes:
        silent: why no broker answered; empty if one did.
        brokers: node ids of those that are up.
        partitions: the partitions of all topics that concern the job.
        in_sync_min: `min.insync.replicas` by topic, where known.
        ends: of those partitions about which that was asked, where known.
    """

    silent: str = ""
    brokers: frozenset[int] = frozenset()
    partitions: Mapping[Place, PartitionSeen] = field(default_factory=dict[Place, PartitionSeen])
    in_sync_min: Mapping[str, int] = field(default_factory=dict[str, int])
    ends: Mapping[Place, Ends] = field(default_factory=dict[Place, Ends])


@dataclass(frozen=True, slots=True)
class Concern:
    """What a job needs from Kafka: its topics, and where its offsets and transactions are kept.

    Attributes:
        topics: sources, outputs and internal topics.
        group: the job's name.
        transactional_ids: those of its workers, as far as known.
    """

    topics: frozenset[str]
    group: str
    transactional_ids: tuple[str, ...] = ()

    def places(self, counts: Mapping[str, int]) -> dict[Place, str]:
        """Partitions of Kafka's own topics that the job needs, and what is kept there.

        Args:
            counts: how many partitions those topics have. Unknown topics aren't in it.
        """
        found: dict[Place, str] = {}
        if counts.get(OFFSETS_TOPIC):
            place = (OFFSETS_TOPIC, home_of(self.group, counts[OFFSETS_TOPIC]))
            found[place] = "the job's committed offsets"
        if counts.get(TRANSACTIONS_TOPIC):
            for name in self.transactional_ids:
                place = (TRANSACTIONS_TOPIC, home_of(name, counts[TRANSACTIONS_TOPIC]))
                found.setdefault(place, f"the transactions of {name}")
        return found


def home_of(name: str, partitions: int) -> int:
    """The partition in which Kafka keeps the data of the group or transactional id with that name."""
    code = 0
    data = name.encode("utf-16-be")
    for at in range(0, len(data), 2):
        code = (31 * code + int.from_bytes(data[at : at + 2])) & 0xFFFF_FFFF
    return (code & 0x7FFF_FFFF) % partitions


@dataclass(frozen=True, slots=True, order=True)
class _Trouble:
    """A problem that the job waits for. Problems of the same kind share a sentence."""

    kind: str
    what: str


_KINDS: Final = ("silent", "no leader", "in sync", "hidden", "away")
"""Kinds of problems, in order of importance."""
_WHY: Final = {
    "hidden": ": a transaction there is still open, or Kafka has lost its end (KAFKA-20734, docs/kafka.md)"
}
"""What follows the problems of a kind while they last."""


@dataclass(slots=True)
class _Suspect:
    """A partition that had no leader, so it may not have been told of the end of a transaction.

    Attributes:
        last: its end when it had a leader again; None before. It isn't suspected any more when everything
            before that is settled.
        stable: its last stable offset.
        since_s: when that offset was first read.
        hides: whether it has been the same for too long.
    """

    last: int | None = None
    stable: int = -1
    since_s: float = 0.0
    hides: bool = False

    def learn(self, ends: Ends, now_s: float) -> bool:
        """Take in the offsets. Returns whether the partition remains suspected."""
        if self.last is None:
            self.last = ends.last
        if ends.stable != self.stable:
            self.stable, self.since_s = ends.stable, now_s
        self.hides = now_s - self.since_s >= HIDDEN_AFTER_S
        # It may end before `last` now, after an unclean election.
        return ends.stable < min(self.last, ends.last)


class Troubles:
    """The present problems with Kafka, and their ages. Pure."""

    def __init__(self) -> None:
        self._since_s: dict[_Trouble, float] = {}
        self._suspects: dict[Place, _Suspect] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to look at again."""
        return bool(self._since_s or self._suspects)

    @property
    def suspects(self) -> frozenset[Place]:
        """Partitions whose ends should be in the next look, if they have a leader."""
        return frozenset(self._suspects)

    def learn(self, look: Look, concern: Concern, now_s: float) -> tuple[list[str], list[str]]:
        """Take in the result of a check.

        Returns:
            Sentences about kinds of problems that have begun, and about those that are over.
        """
        before = self._by_kind(now_s)
        hidden = self._hidden(look, concern, now_s)
        if look.silent:
            # Earlier problems may still exist: nothing says otherwise.
            seen = {*self._since_s, _Trouble("silent", look.silent)}
            seen -= {one for one in self._since_s if one.kind == "silent" and one.what != look.silent}
        else:
            seen = {*_troubles(look, concern), *hidden}
        silent_since_s = min(
            (since for one, since in self._since_s.items() if one.kind == "silent"), default=now_s
        )
        self._since_s = {
            one: silent_since_s if one.kind == "silent" else self._since_s.get(one, hidden.get(one, now_s))
            for one in sorted(seen)
        }
        after = self._by_kind(now_s)
        begun = [sentence + _WHY.get(kind, "") for kind, sentence in after.items() if kind not in before]
        over = [sentence for kind, sentence in before.items() if kind not in after]
        return begun, over

    def sentences(self, now_s: float) -> list[str]:
        """What the job waits for: one bounded sentence for each kind of problem, with its age."""
        return [
            f"waiting for Kafka: {text}{_WHY.get(kind, '')}" for kind, text in self._by_kind(now_s).items()
        ][:SENTENCES_MAX]

    def _hidden(self, look: Look, concern: Concern, now_s: float) -> dict[_Trouble, float]:
        """The partitions that hide records for too long, and since when."""
        for place, seen in look.partitions.items():
            if place[0] in concern.topics and not _has_leader(seen, look):
                self._suspects[place] = _Suspect()
        for place, ends in look.ends.items():
            if place in self._suspects and not self._suspects[place].learn(ends, now_s):
                del self._suspects[place]
        return {
            _Trouble(
                "hidden",
                f"partition {topic}/{number} hides offsets {suspect.stable} and later from readers of "
                "committed records",
            ): suspect.since_s
            for (topic, number), suspect in self._suspects.items()
            if suspect.hides
        }

    def _by_kind(self, now_s: float) -> dict[str, str]:
        found: dict[str, str] = {}
        for kind in _KINDS:
            ones = [one for one in self._since_s if one.kind == kind]
            if ones:
                age_s = now_s - min(self._since_s[one] for one in ones)
                named = "; ".join(one.what for one in ones[:NAMED_MAX])
                more = f"; and {len(ones) - NAMED_MAX} more" if len(ones) > NAMED_MAX else ""
                text = bounded_text(named + more, SENTENCE_CHARACTERS_MAX)
                found[kind] = f"{text} ({age_s:.0f} s)"
        return found


def _troubles(look: Look, concern: Concern) -> Iterable[_Trouble]:
    counts: dict[str, int] = {}
    for topic, number in look.partitions:
        counts[topic] = max(counts.get(topic, 0), number + 1)
    kept = concern.places(counts)
    away: set[int] = set()
    for place, seen in look.partitions.items():
        topic, number = place
        if topic not in concern.topics and place not in kept:
            continue
        name = f"partition {topic}/{number}" + (f", with {kept[place]}," if place in kept else "")
        away |= {node for node in seen.replicas if node not in look.brokers}
        # Kafka doesn't require more replicas than there are.
        needed = min(look.in_sync_min.get(topic, 0), len(seen.replicas))
        if not _has_leader(seen, look):
            yield _Trouble("no leader", f"{name} has no leader")
        elif len(seen.in_sync) < needed:
            in_sync = f"{len(seen.in_sync)} of {len(seen.replicas)} replicas in sync"
            yield _Trouble("in sync", f"{name} has {in_sync} and needs {needed}")
    for node in sorted(away):
        yield _Trouble("away", f"broker {node} is down")


def _has_leader(seen: PartitionSeen, look: Look) -> bool:
    return seen.leader >= 0 and seen.leader in look.brokers


class KafkaWatch:
    """Checks Kafka while the job waits.

    Args:
        settings: the cluster's settings.
        concern: what the job needs. Called before each check, because workers come and go.
        tell: called from the watch's thread with the sentences, when they change, and again as they age.
    """

    def __init__(
        self,
        settings: Settings,
        concern: Callable[[], Concern],
        tell: Callable[[Sequence[str]], None],
    ) -> None:
        self._settings = settings
        self._concern = concern
        self._tell = tell
        self._changed = threading.Condition()
        self._waiting = self._closed = False
        self._troubles = Troubles()
        self._in_sync_min: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="kafka-watch", daemon=True)

    def note(self, *, waiting: bool) -> None:
        """Note whether the job waits for something that may be Kafka's fault. Costs next to nothing."""
        if waiting is self._waiting:
            return
        with self._changed:
            self._waiting = waiting
            self._changed.notify_all()
        if waiting and self._thread.ident is None:
            self._thread.start()

    def close(self) -> None:
        """Stop the thread, without waiting for its current request."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        admin: AdminClient | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or bool(self._troubles))
                if self._closed:
                    return
            try:
                if admin is None:
                    # Not the shell's own client: a call that hangs there must not block this thread.
                    admin = make_admin(self._settings)
                self._look(admin)
            except FclusterError as error:
                _log.warning("checking Kafka: %s", error.message)
            except Exception:  # noqa: BLE001  the thread would end silently
                _log.exception("checking Kafka failed")
            with self._changed:
                self._changed.wait_for(lambda: self._closed, LOOK_INTERVAL_S)

    def _look(self, admin: AdminClient) -> None:
        concern = self._concern()
        look = self.look(admin, concern, self._troubles.suspects)
        now_s = time.monotonic()
        begun, over = self._troubles.learn(look, concern, now_s)
        for text in begun:
            _log.warning("waiting for Kafka: %s", text)
        for text in over:
            _log.info("Kafka has recovered: no longer %s", text)
        sentences = self._troubles.sentences(now_s)
        if sentences or over:
            self._tell(sentences)

    def look(self, admin: AdminClient, concern: Concern, suspects: frozenset[Place] = frozenset()) -> Look:
        """Ask the brokers, within a few seconds.

        Args:
            admin: a client that only this thread uses.
            concern: what the job needs.
            suspects: partitions whose ends are wanted, too.
        """
        try:
            metadata: Any = admin.list_topics(timeout=LOOK_TIMEOUT_S)
        except KafkaException:
            return Look(silent=f"no broker answers at {self._settings.bootstrap_servers}")
        wanted = concern.topics | {OFFSETS_TOPIC, TRANSACTIONS_TOPIC}
        partitions = {
            (name, number): PartitionSeen(seen.leader, tuple(seen.replicas), tuple(seen.isrs))
            for name, topic in metadata.topics.items()
            if name in wanted
            for number, seen in topic.partitions.items()
        }
        self._learn_in_sync_min(admin, {topic for topic, _ in partitions})
        look = Look("", frozenset(metadata.brokers), partitions, dict(self._in_sync_min))
        led = [place for place in suspects if place in partitions and _has_leader(partitions[place], look)]
        return replace(look, ends=_ends(admin, led)) if led else look

    def _learn_in_sync_min(self, admin: AdminClient, topics: set[str]) -> None:
        """Each topic is asked about once. Without permission to describe a topic, its value stays unknown."""
        missing = sorted(topics - self._in_sync_min.keys())
        client: Any = admin  # the client's own types don't say what the futures return
        if not missing:
            return
        resources = {ConfigResource(ConfigResource.Type.TOPIC, topic): topic for topic in missing}
        try:
            futures = client.describe_configs(list(resources), request_timeout=LOOK_TIMEOUT_S)
        except KafkaException:
            return
        for resource, future in futures.items():
            try:
                self._in_sync_min[resources[resource]] = int(future.result()["min.insync.replicas"].value)
            except KafkaException as error:
                if "AUTHORIZATION" in str(error):
                    self._in_sync_min[resources[resource]] = 0
            except (KeyError, TypeError, ValueError):
                self._in_sync_min[resources[resource]] = 0


def _ends(admin: AdminClient, places: Iterable[Place]) -> dict[Place, Ends]:
    """The ends of these partitions. Empty if they aren't known now."""
    wanted = [TopicPartition(*place) for place in sorted(places)]
    try:
        # In this order, they never agree by mistake.
        stable = end_offsets(admin, wanted, "read-committed", ONE_ATTEMPT_S)
        last = end_offsets(admin, wanted, "read-uncommitted", ONE_ATTEMPT_S)
    except KafkaUnavailable:
        return {}
    return {(at.topic, at.partition): Ends(stable[at], last[at]) for at in wanted}
