"""Kafka as several brokers: which broker leads and coordinates what, and what clients know of it.

Responsible for: leaders of partitions, and coordinators of the group and of transactional ids, on three
brokers; and what happens to a request when they move. It waits for an election; or it goes to a broker that
is no longer the leader, because the client's metadata is outdated; or it hangs at a broker that is suspended;
or its connection is lost while it is on its way, so that nobody knows whether it was carried out; or the
client answers at once that it doesn't know (-1001 for an offset). What Kafka stores isn't changed here:
`kafka_model` defines what a request does.

The group's coordinator may also be cut off from the other brokers. Then there is a new one, but the old one
still answers its clients with earlier offsets. Only a new client looks for another coordinator, and it may
find the same broker again.

Only one broker is down at a time, because with three replicas and two in sync nothing is lost then. This
module has its own random stream, and takes part in only some seeds, so that all other seeds play as they did
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from tests.simulation.world import Process, World

BROKERS = 3
GROUP = ("group",)
METADATA_MS_MAX = 60
BACKOFF_MS_MAX = 40
UNKNOWN_SHARE = 0.7
"""The share of requests without a leader, or with outdated metadata, that a client answers at once by not
knowing.
"""

ELECTION_MS = (20, 150, 600)
AWAY_MS = (100, 700, 2000)
STILL_MS = (50, 400, 1200)
CUT_OFF_MS = (400, 1500, 3000)
CUT_OFF_SHARE = 0.7
"""The share of seeds in which Kafka has several brokers."""


def takes_part(seed: int) -> bool:
    """Whether Kafka has more than one broker in this seed: it does in three of twenty."""
    return seed % 10 == 7 or seed % 20 == 9


@dataclass(slots=True)
class _Leader:
    """The leadership of a partition, or the role of a coordinator.

    `number` increases with each change, the last of which was at `changed_ms`. At `from_ms` the broker begins
    to lead.
    """

    broker: int
    number: int = 0
    changed_ms: int = -1
    from_ms: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """What a request meets on its way.

    Attributes:
        delay_ms: the time until it arrives where it can be carried out.
        unknown: whether the client answers at once that it doesn't know, if that is allowed.
        number: the leadership that it was sent to.
    """

    delay_ms: int
    unknown: bool
    number: int


@dataclass(frozen=True, slots=True)
class CutOff:
    """A group coordinator that doesn't know that there is another one.

    Attributes:
        since_ms: clients that looked for the coordinator before this time ask this one.
        committed: the committed offsets that it answers.
    """

    since_ms: int
    committed: dict[tuple[str, int], tuple[int, str]]


class GroupReader:
    """A process's client that reads committed offsets. It looks for the group's coordinator once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._made_ms = world.now_ms
        brokers = world.brokers
        self._unlucky = brokers is not None and brokers.meets_cut_off()

    @property
    def cut_off(self) -> CutOff | None:
        """The coordinator that this client asks, if it is cut off."""
        cut_off = None if self._world.brokers is None else self._world.brokers.cut_off
        if cut_off is not None and (self._unlucky or self._made_ms < cut_off.since_ms):
            return cut_off
        return None


class Brokers:
    """The three brokers of a run."""

    def __init__(self, world: World) -> None:
        self.random = Random(f"brokers {world.seed}")
        self._own = Random(f"cut off {world.seed}")
        self.cut_off: CutOff | None = None
        self._world = world
        self._leaders: dict[Hashable, _Leader] = {}
        self._refreshed_ms: dict[tuple[str, Hashable], int] = {}
        self._away: int | None = None
        self._still_until_ms = [0] * BROKERS

    # --- faults ---------------------------------------------------------------------------------------

    def schedule(
        self, duration_ms: int, committed: Callable[[], dict[tuple[str, int], tuple[int, str]]]
    ) -> None:
        """Draw what happens to the brokers while faults happen. `committed`: returns what the group has
        committed.
        """
        if self._own.random() < CUT_OFF_SHARE:
            self._world.at(self._own.randrange(duration_ms), None, self._cut_off, committed)
        faults = (self._kill, self._kill, self._stand_still, self._stand_still, self._move, self._move_all)
        for _ in range(self.random.randint(2, 8)):
            self._world.at(self.random.randrange(duration_ms), None, self.random.choice(faults))

    def heal(self) -> None:
        """All brokers are up, and everything has a leader."""
        self._away = None
        self.cut_off = None
        self._still_until_ms = [0] * BROKERS
        for leader in self._leaders.values():
            leader.from_ms = min(leader.from_ms, self._world.now_ms)

    def _cut_off(self, committed: Callable[[], dict[tuple[str, int], tuple[int, str]]]) -> None:
        if not self._world.faults_on:
            return
        self._world.landed["group coordinator cut off"] += 1
        self._world.note("world", "## the group's coordinator is cut off")
        self.cut_off = CutOff(self._world.now_ms, committed())
        self._world.at(self._own.choice(CUT_OFF_MS), None, setattr, self, "cut_off", None)

    def meets_cut_off(self) -> bool:
        """Whether a client that is created now finds the coordinator that is cut off."""
        return self.cut_off is not None and self._own.randrange(BROKERS) == 0

    def _kill(self) -> None:
        if not self._world.faults_on or self._away is not None:
            return
        broker = self._away = self.random.randrange(BROKERS)
        self._world.landed["broker killed"] += 1
        self._world.note("world", "## broker %d is killed", broker)
        # The session has to end before another broker leads.
        self._vacate(broker, self.random.choice(ELECTION_MS))
        self._world.at(self.random.choice(AWAY_MS), None, self._come_back, broker)

    def _come_back(self, broker: int) -> None:
        if self._away == broker:
            self._away = None
            self._world.note("world", "## broker %d is back", broker)
            if self.random.random() < 0.5:  # preferred leaders are elected again
                self._move_all()

    def _stand_still(self) -> None:
        if not self._world.faults_on:
            return
        broker, duration_ms = self.random.randrange(BROKERS), self.random.choice(STILL_MS)
        if broker == self._away:
            return
        self._world.landed["broker stands still"] += 1
        self._world.note("world", "## broker %d stands still for %d ms", broker, duration_ms)
        self._still_until_ms[broker] = self._world.now_ms + duration_ms
        session_ms = self.random.choice((200, 2000))
        if duration_ms > session_ms:
            self._world.at(session_ms, None, self._vacate, broker, self.random.choice(ELECTION_MS))

    def _move(self) -> None:
        """Some leadership moves, without any death."""
        if self._world.faults_on and self._leaders:
            leader = self.random.choice(list(self._leaders.values()))
            self._hand(leader, self.random.choice((0, 30)))
            self._world.landed["leadership moved"] += 1

    def _move_all(self) -> None:
        if self._world.faults_on:
            for leader in self._leaders.values():
                if self.random.random() < 0.7:
                    self._hand(leader, self.random.choice((0, 0, 30, 100)))
            self._world.landed["all leaderships moved"] += 1

    def _vacate(self, broker: int, election_ms: int) -> None:
        for leader in self._leaders.values():
            if leader.broker == broker:
                self._hand(leader, election_ms)

    def _hand(self, leader: _Leader, delay_ms: int) -> None:
        others = [broker for broker in range(BROKERS) if broker not in (leader.broker, self._away)]
        leader.broker = self.random.choice(others)
        leader.number, leader.changed_ms = leader.number + 1, self._world.now_ms
        # A coordinator first loads the data that it will coordinate.
        leader.from_ms = self._world.now_ms + delay_ms + self.random.choice((0, 0, 40))

    # --- requests -------------------------------------------------------------------------------------

    def way(self, process: Process, place: Hashable) -> Way:
        """What a request of this process meets on its way to the leader of `place`."""
        world, leader = self._world, self._leader(place)
        # A client learns of all leaders when it starts. It relies on that until it hears otherwise.
        refreshed_ms = self._refreshed_ms.get((process.name, place), process.began_ms)
        delay_ms, unknown = 0, False
        if refreshed_ms < leader.changed_ms:
            self._refreshed_ms[process.name, place] = world.now_ms
            world.landed["stale metadata"] += 1
            delay_ms += 1 + self.random.randrange(METADATA_MS_MAX)
            unknown = self.random.random() < UNKNOWN_SHARE
        if leader.from_ms > world.now_ms:
            world.landed["request without a leader"] += 1
            delay_ms = max(delay_ms, leader.from_ms - world.now_ms) + self.random.randrange(BACKOFF_MS_MAX)
            unknown = unknown or self.random.random() < UNKNOWN_SHARE
        still_ms = self._still_until_ms[leader.broker] - world.now_ms
        if still_ms > delay_ms:
            world.landed["request hangs at a broker"] += 1
            delay_ms = still_ms
        return Way(delay_ms, unknown, leader.number)

    def fate(self, place: Hashable, number: int) -> str:
        """What happened to a request on its way: "there"; or, if the leader has moved since, possibly "again"
        (sent to the next one), "lost", or "unanswered" (carried out).
        """
        if self._leader(place).number == number:
            return "there"
        self._world.landed["leader moved while a request was on its way"] += 1
        return self.random.choice(("again", "again", "lost", "unanswered"))

    def _leader(self, place: Hashable) -> _Leader:
        leader = self._leaders.get(place)
        if leader is None:
            broker = crc32(repr(place).encode()) % BROKERS
            if broker == self._away:
                broker = (broker + 1) % BROKERS
            leader = self._leaders[place] = _Leader(broker)
        return leader
