"""What a job waits for in Kafka: partitions without a leader, too few replicas in sync, brokers that are
down.

Responsible for: reading the cluster's metadata while a job waits, and sentences about it for status and log.
Metadata shows it all: a group's offsets and an id's transactions are kept in partitions of internal topics,
whose leaders are their coordinators. Rules: nothing is requested while all goes well; every request is
bounded and runs in its own thread; each problem is logged when it begins and when it is over, but not in
between. Must not decide anything: the findings are for people.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from confluent_kafka import KafkaException
from confluent_kafka.admin import (
    AdminClient,
    ConfigResource,  # pyright: ignore[reportPrivateImportUsage]
)

from fcluster.common.errors import FclusterError
from fcluster.common.failures import bounded_text
from fcluster.common.settings import Settings
from fcluster.kafka.clients import make_admin

_log = logging.getLogger("fcluster.coordinator")

LOOK_INTERVAL_S: Final = 1.0
LOOK_TIMEOUT_S: Final = 3.0
NAMED_MAX: Final = 4
SENTENCE_CHARACTERS_MAX: Final = 300
SENTENCES_MAX: Final = 8
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
class Look:
    """The result of one check of the cluster.

    Attributes:
        silent: why no broker answered; empty if one did.
        brokers: node ids of those that are up.
        partitions: the partitions of all topics that concern the job.
        in_sync_min: `min.insync.replicas` by topic, where known.
    """

    silent: str = ""
    brokers: frozenset[int] = frozenset()
    partitions: Mapping[Place, PartitionSeen] = field(default_factory=dict[Place, PartitionSeen])
    in_sync_min: Mapping[str, int] = field(default_factory=dict[str, int])


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


_KINDS: Final = ("silent", "no leader", "in sync", "away")
"""Kinds of problems, in order of importance."""


class Troubles:
    """The present problems with Kafka, and their ages. Pure."""

    def __init__(self) -> None:
        self._since_s: dict[_Trouble, float] = {}

    def __bool__(self) -> bool:
        return bool(self._since_s)

    def learn(self, look: Look, concern: Concern, now_s: float) -> tuple[list[str], list[str]]:
        """Take in the result of a check.

        Returns:
            Sentences about kinds of problems that have begun, and about those that are over.
        """
        before = self._by_kind(now_s)
        if look.silent:
            # Earlier problems may still exist: nothing says otherwise.
            seen = {*self._since_s, _Trouble("silent", look.silent)}
            seen -= {one for one in self._since_s if one.kind == "silent" and one.what != look.silent}
        else:
            seen = set(_troubles(look, concern))
        silent_since_s = min(
            (since for one, since in self._since_s.items() if one.kind == "silent"), default=now_s
        )
        self._since_s = {
            one: silent_since_s if one.kind == "silent" else self._since_s.get(one, now_s)
            for one in sorted(seen)
        }
        after = self._by_kind(now_s)
        begun = [sentence for kind, sentence in after.items() if kind not in before]
        over = [sentence for kind, sentence in before.items() if kind not in after]
        return begun, over

    def sentences(self, now_s: float) -> list[str]:
        """What the job waits for: one bounded sentence for each kind of problem, with its age."""
        return [f"waiting for Kafka: {text}" for text in self._by_kind(now_s).values()][:SENTENCES_MAX]

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
        if seen.leader < 0 or seen.leader not in look.brokers:
            yield _Trouble("no leader", f"{name} has no leader")
        elif len(seen.in_sync) < needed:
            in_sync = f"{len(seen.in_sync)} of {len(seen.replicas)} replicas in sync"
            yield _Trouble("in sync", f"{name} has {in_sync} and needs {needed}")
    for node in sorted(away):
        yield _Trouble("away", f"broker {node} is down")


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
        look = self.look(admin, concern)
        now_s = time.monotonic()
        begun, over = self._troubles.learn(look, concern, now_s)
        for text in begun:
            _log.warning("waiting for Kafka: %s", text)
        for text in over:
            _log.info("Kafka has recovered: no longer %s", text)
        sentences = self._troubles.sentences(now_s)
        if sentences or over:
            self._tell(sentences)

    def look(self, admin: AdminClient, concern: Concern) -> Look:
        """Ask the brokers, within a few seconds."""
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
        return Look("", frozenset(metadata.brokers), partitions, dict(self._in_sync_min))

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
