"""Virtual time, processes, and the connections between them. Processes can be stopped, cut off and killed.

Responsible for: the order of all events (`World`), processes that can be paused and killed (`Process`),
background threads as generators (`Process.start`), requests to Kafka whose outcome may stay unknown (`Call`),
and connections (`Dealer`, `Connection`) with the properties of ours: messages keep their order in each
direction, messages in flight are lost with the connection, and each side notices its end in its own time.

All chance comes from one generator with a seed, and only things with a defined order are iterated, so a seed
always plays in the same way.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.simulation.brokers import Brokers
from tests.simulation.kafka_model import Busy, Fenced

BUSY_RETRY_MS = 4
BROKER_GONE = "its broker is gone"


class Violation(AssertionError):  # noqa: N818  it is a finding, not an error
    """Something happened that must never happen."""


class KafkaFailure(Exception):  # noqa: N818
    """What a client sees of a request that failed, or whose outcome it doesn't know.

    `abortable`: the client knows that it had no effect, and can abort its transaction and go on.
    """

    def __init__(self, reason: str, *, abortable: bool = False) -> None:
        super().__init__(reason)
        self.abortable = abortable


@dataclass(slots=True)
class Call:
    """A request to Kafka. A thread yields it, and then gets the result, or a KafkaFailure is thrown into
    it.

    Requests in the same `lane` are carried out in their order.

    Attributes:
        place: what must have a leader (or coordinator) for the request. None: any broker will do.
        unknown: what the client answers when it doesn't know. None: it waits, or fails.
        may_be_refused: a broker may refuse it, so that the transaction has to be aborted.
    """

    what: str
    operation: Callable[[], Any]
    lane: Lane | None = None
    place: Hashable = None
    unknown: Any = None
    may_be_refused: bool = False


@dataclass(slots=True)
class Sleep:
    """A wait. A thread yields it."""

    delay_ms: float


class Lane:
    """Keeps requests in order, like one connection of one producer."""

    __slots__ = ("active", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], None]] = deque()
        self.active = False


Thread = Generator[Call | Sleep, Any, None]


@dataclass(frozen=True)
class Timing:
    """How slow things are in a run, and how often requests to Kafka fail, with and without faults."""

    network_ms_max: int = 3
    kafka_ms_max: int = 4
    marker_delay_share: float = 0.15
    marker_delay_ms_max: int = 25
    request_timeout_ms: int = 1500
    request_failure_share: float = 0.0
    refusal_share: float = 0.0
    duplicate_share: float = 0.0
    duplicate_ms_max: int = 100
    slow_request_share: float = 0.0
    slow_request_ms_max: int = 800


class World:
    """Time and chance."""

    def __init__(self, seed: int, *, recording: bool = False) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now_ms = 0
        self.timing = Timing()
        # A generator of its own, so that the other choices of a seed don't depend on refusals.
        self._refusals = Random(f"{seed} refusals")
        self.faults_on = True
        self.kafka_down_until_ms = 0
        self.transcript: list[str] | None = [] if recording else None
        self.landed: Counter[str] = Counter()
        self.brokers: Brokers | None = None
        self.events = 0
        self._heap: list[tuple[int, int, Process | None, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0

    def note(self, who: object, text: str, *arguments: object) -> None:
        """A line for the transcript. It costs next to nothing if nobody reads it."""
        if self.transcript is not None:
            shown = text % arguments if arguments else text
            self.transcript.append(f"{self.now_ms:6d} ms  {who!s:<15} {shown}")

    def at(
        self, delay_ms: float, process: Process | None, action: Callable[..., None], *arguments: Any
    ) -> None:
        """Do something later. If it belongs to a process, do it only while that lives and isn't stopped."""
        self._sequence += 1
        heapq.heappush(
            self._heap, (self.now_ms + max(0, int(delay_ms)), self._sequence, process, action, arguments)
        )

    def run(self, until_ms: int, done: Callable[[], bool] | None = None) -> bool:
        """Let time pass. Returns True as soon as `done` is true, and False if the time is over first."""
        if done is not None and done():
            return True
        heap = self._heap
        while heap and heap[0][0] <= until_ms:
            self.now_ms, _, process, action, arguments = heapq.heappop(heap)
            self.events += 1
            if process is None:
                action(*arguments)
            elif process.alive:
                if process.paused:
                    process.backlog.append((action, arguments))
                else:
                    action(*arguments)
            if done is not None and done():
                return True
        self.now_ms = until_ms
        return False

    def chance(self, share: float) -> bool:
        """True with this probability."""
        return share > 0 and self.random.random() < share

    def refuses(self) -> bool:
        """Whether a broker refuses a request that it could carry out."""
        share = self.timing.refusal_share
        return share > 0 and self._refusals.random() < share

    def up_to(self, most: int) -> int:
        """A number from 0 to `most`."""
        return int(self.random.random() * (most + 1))

    def latency_ms(self, most: int) -> int:
        """Usually small, rarely much larger."""
        drawn = self.random.random()
        return int(drawn * drawn * (most + 1)) if drawn < 0.97 else most * 4

    # --- requests to Kafka ----------------------------------------------------------------------------

    def call(self, process: Process, call: Call, answer: Callable[[Any, KafkaFailure | None], None]) -> None:
        """Carry out a request of a process. `answer` is called with the result or the failure, in the
        process.
        """
        lane = call.lane
        if lane is None:
            _Request(self, process, call, answer).begin()
        elif lane.active:
            lane.waiting.append(_Request(self, process, call, answer).begin)
        else:
            lane.active = True
            _Request(self, process, call, answer).begin()


class _Request:
    """One request on its way to Kafka and back."""

    __slots__ = ("answer", "answered", "call", "number", "process", "sent_ms", "world")

    def __init__(
        self, world: World, process: Process, call: Call, answer: Callable[[Any, KafkaFailure | None], None]
    ) -> None:
        self.world = world
        self.process = process
        self.call = call
        self.answer = answer
        self.answered = False
        self.sent_ms = 0
        self.number = -1
        """The number of the leadership that it was sent to. -1: that doesn't matter."""

    def begin(self) -> None:
        world, timing = self.world, self.world.timing
        self.sent_ms = world.now_ms
        delay_ms = world.latency_ms(timing.kafka_ms_max)
        if world.faults_on and world.chance(timing.slow_request_share):
            delay_ms += world.up_to(timing.slow_request_ms_max)
        open_ms = max(self.process.kafka_cut_until_ms, world.kafka_down_until_ms)
        if open_ms > world.now_ms:
            delay_ms += open_ms - world.now_ms
        if world.brokers is not None and self.call.place is not None:
            way = world.brokers.way(self.process, self.call.place)
            if way.unknown and self.call.unknown is not None:
                world.landed[f"not known: {self.call.what}"] += 1
                self._free_lane()
                world.at(delay_ms, self.process, self._give, self.call.unknown, None)
                return
            self.number = way.number
            delay_ms += way.delay_ms
        if world.faults_on and self.call.may_be_refused and world.refuses():
            world.landed[f"request refused: {self.call.what}"] += 1
            world.note(self.process, "(request refused: %s)", self.call.what)
            self._free_lane()
            refused = KafkaFailure("out of order sequence number", abortable=True)
            world.at(delay_ms, self.process, self._give, None, refused)
        elif world.faults_on and world.chance(timing.request_failure_share):
            self._fail(delay_ms)
        elif delay_ms > timing.request_timeout_ms:
            world.landed["request timed out, carried out later"] += 1
            world.at(timing.request_timeout_ms, self.process, self._give, None, KafkaFailure("timed out"))
            world.at(delay_ms, None, self._carry_out)
        else:
            world.at(delay_ms, None, self._carry_out)

    def _fail(self, delay_ms: int) -> None:
        """The client learns of a failure. It can't know whether Kafka sees the request, or has seen it."""
        world = self.world
        patience_ms = world.up_to(world.timing.request_timeout_ms)
        fate = world.up_to(2)
        if fate == 0:
            world.landed[f"request lost: {self.call.what}"] += 1
            world.note(self.process, "(request lost: %s)", self.call.what)
            self._free_lane()
        elif fate == 1:
            world.landed[f"answer lost: {self.call.what}"] += 1
            world.note(self.process, "(answer will be lost: %s)", self.call.what)
            world.at(delay_ms, None, self._carry_out)
            patience_ms += delay_ms
        else:
            late_ms = patience_ms + world.up_to(3000)
            world.landed[f"request late: {self.call.what}"] += 1
            world.note(self.process, "(request will come late, in %d ms: %s)", late_ms, self.call.what)
            world.at(late_ms, None, self._carry_out)
        self.answered = True
        world.at(patience_ms, self.process, self.answer, None, KafkaFailure("no answer"))

    def _met_by_another_leader(self) -> bool:
        """Whether its leader has moved meanwhile, so that something else becomes of it."""
        world, number = self.world, self.number
        if world.brokers is None or number < 0:
            return False
        self.number = -1
        fate = world.brokers.fate(self.call.place, number)
        patience_ms = max(0, self.sent_ms + world.timing.request_timeout_ms - world.now_ms)
        if fate == "there":
            return False
        if fate == "again":
            world.at(world.brokers.way(self.process, self.call.place).delay_ms, None, self._carry_out)
            return True
        world.note(self.process, "(its broker is gone, %s: %s)", fate, self.call.what)
        if not self.answered:
            self.answered = True
            failure = KafkaFailure(f"{BROKER_GONE}, nobody knows what became of it")
            world.at(patience_ms, self.process, self.answer, None, failure)
        if fate == "lost":
            self._free_lane()
        return fate == "lost"

    def _carry_out(self) -> None:
        world = self.world
        if self._met_by_another_leader():
            return
        try:
            result = self.call.operation()
        except Busy:
            if world.now_ms - self.sent_ms > world.timing.request_timeout_ms and not self.answered:
                self._free_lane()
                self._reply(None, KafkaFailure("the transactional id is busy"))
            else:
                world.at(BUSY_RETRY_MS, None, self._carry_out)
            return
        except Fenced as fenced:
            self._free_lane()
            self._reply(None, KafkaFailure(str(fenced)))
            return
        self._free_lane()
        self._reply(result, None)

    def _free_lane(self) -> None:
        lane = self.call.lane
        if lane is not None:
            if lane.waiting:
                lane.waiting.popleft()()
            else:
                lane.active = False

    def _reply(self, result: Any, failure: KafkaFailure | None) -> None:
        if self.answered or not self.process.alive:
            return
        world = self.world
        delay_ms = world.latency_ms(world.timing.kafka_ms_max)
        cut_ms = self.process.kafka_cut_until_ms - world.now_ms
        if cut_ms > 0:
            delay_ms += cut_ms
            patience_ms = self.sent_ms + world.timing.request_timeout_ms - world.now_ms
            if delay_ms > patience_ms:
                world.landed[f"answer cut off: {self.call.what}"] += 1
                delay_ms, result, failure = max(0, patience_ms), None, KafkaFailure("timed out")
        world.at(delay_ms, self.process, self._give, result, failure)

    def _give(self, result: Any, failure: KafkaFailure | None) -> None:
        if not self.answered:
            self.answered = True
            self.answer(result, failure)


class Process:
    """Something that can be stopped (SIGSTOP), continued and killed, with threads of its own."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.began_ms = world.now_ms
        self.alive = True
        self.paused = False
        self.backlog: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.kafka_cut_until_ms = 0

    def __str__(self) -> str:
        return self.name

    def note(self, text: str, *arguments: object) -> None:
        """A line for the transcript."""
        self.world.note(self.name, text, *arguments)

    def later(self, delay_ms: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do something later, if the process still lives."""
        self.world.at(delay_ms, self, action, *arguments)

    def pause(self, duration_ms: int) -> None:
        """Stop: nothing happens in it, what comes in piles up. Requests that it sent go on."""
        if self.alive and not self.paused:
            self.note("## stopped for %d ms", duration_ms)
            self.paused = True
            self.world.at(duration_ms, None, self.resume)

    def resume(self) -> None:
        """Continue, first with everything that has piled up."""
        if self.alive and self.paused:
            self.paused = False
            self.note("## goes on")
            backlog, self.backlog = self.backlog, deque()
            for action, arguments in backlog:
                self.world.at(0, self, action, *arguments)

    def kill(self, reason: str) -> None:
        """End at once, wherever it is."""
        if self.alive:
            self.note("## killed: %s", reason)
            self.alive = False
            self.backlog.clear()
            self.died()

    def died(self) -> None:
        """What the system does for a process that has ended. Subclasses override it."""

    def start(self, thread: Thread, on_end: Callable[[], None] | None = None) -> None:
        """Run a thread. It must catch its own KafkaFailures."""
        self._step(thread, on_end, None, None)

    def _step(
        self, thread: Thread, on_end: Callable[[], None] | None, result: Any, failure: KafkaFailure | None
    ) -> None:
        try:
            wanted = thread.send(result) if failure is None else thread.throw(failure)
        except StopIteration:
            if on_end is not None and self.alive:
                on_end()
            return
        if not self.alive:
            return  # killed by its own step
        if isinstance(wanted, Sleep):
            self.later(wanted.delay_ms, self._step, thread, on_end, None, None)
        else:
            self.world.call(self, wanted, lambda result, failure: self._step(thread, on_end, result, failure))


class Connection:
    """One TCP connection from a worker to a coordinator. It keeps the order, and everything in flight is lost
    with it.
    """

    def __init__(self, world: World, dealer: Dealer, router: Router) -> None:
        self.world = world
        self.dealer = dealer
        self.router = router
        self.broken = False
        self._last_ms = [0, 0]

    def to_router(self, frame: bytes) -> None:
        """Send to the coordinator."""
        self._send(0, self.router.process, self._arrive_at_router, frame)

    def to_dealer(self, frame: bytes) -> None:
        """Send to the worker."""
        self._send(1, self.dealer.process, self._arrive_at_dealer, frame)

    def _send(self, direction: int, process: Process, arrive: Callable[[bytes], None], frame: bytes) -> None:
        if self.broken:
            return
        world = self.world
        arrival_ms = world.now_ms + world.latency_ms(world.timing.network_ms_max)
        arrival_ms = max(
            arrival_ms, self.dealer.cut_until_ms(self.router, direction), self._last_ms[direction]
        )
        self._last_ms[direction] = arrival_ms
        world.at(arrival_ms - world.now_ms, None, self._deliver, process, arrive, frame)
        if world.faults_on and world.chance(world.timing.duplicate_share):
            # Again, after what was sent after it.
            world.landed["frame twice"] += 1
            later_ms = arrival_ms - world.now_ms + 1 + world.up_to(world.timing.duplicate_ms_max)
            world.at(later_ms, None, self._deliver, process, arrive, frame)

    def _deliver(self, process: Process, arrive: Callable[[bytes], None], frame: bytes) -> None:
        # What reached the other host before the connection broke is read, even if its process is stopped.
        if not self.broken:
            self.world.at(0, process, arrive, frame)

    def _arrive_at_router(self, frame: bytes) -> None:
        self.router.receive(self, frame)

    def _arrive_at_dealer(self, frame: bytes) -> None:
        if self.dealer.connection is self:
            self.dealer.on_frame(frame)

    def break_off(self, dealer_notices_ms: int | None, router_notices_ms: int | None) -> None:
        """Lose it, with everything in flight. Each side notices when it is told to. None: not by itself."""
        if self.broken:
            return
        self.broken = True
        if dealer_notices_ms is not None:
            self.world.at(dealer_notices_ms, self.dealer.process, self.dealer.lost, self)
        if router_notices_ms is not None:
            self.world.at(router_notices_ms, self.router.process, self.router.lost, self)


class Router:
    """The coordinator's socket."""

    def __init__(
        self,
        process: Process,
        on_frame: Callable[[bytes, bytes], None],
        on_disconnected: Callable[[bytes], None],
    ) -> None:
        self.process = process
        self.listening = False
        self._on_frame = on_frame
        self._on_disconnected = on_disconnected
        self._routes: dict[bytes, Connection] = {}
        self._spoke: dict[bytes, Connection] = {}

    def accept(self, connection: Connection) -> None:
        """A new connection is open. It replaces an older one of the same peer."""
        peer = connection.dealer.peer
        former = self._routes.get(peer)
        self._routes[peer] = connection
        if former is not None:
            former.broken = True

    def send(self, peer: bytes, frame: bytes) -> None:
        """Send over the peer's newest connection. The message is lost if there is none."""
        connection = self._routes.get(peer)
        if connection is not None:
            connection.to_dealer(frame)

    def receive(self, connection: Connection, frame: bytes) -> None:
        """A frame arrived."""
        peer = connection.dealer.peer
        former = self._spoke.get(peer)
        if former is not connection:
            self._spoke[peer] = connection
            if former is not None:
                self._on_disconnected(peer)  # it is back before the end of the old connection was noticed
        self._on_frame(peer, frame)

    def lost(self, connection: Connection) -> None:
        """The end of a connection was noticed."""
        peer = connection.dealer.peer
        if self._routes.get(peer) is connection:
            del self._routes[peer]
        if self._spoke.get(peer) is connection:
            del self._spoke[peer]
            self._on_disconnected(peer)

    def close(self, notices_ms: int | None) -> None:
        """The process has ended. Its peers notice that after this time, or not by themselves."""
        self.listening = False
        for connection in self._routes.values():
            connection.break_off(notices_ms, None)


class Dealer:
    """A worker's socket. Frames that are sent while it is down wait for the next connection."""

    def __init__(
        self,
        process: Process,
        peer: bytes,
        on_frame: Callable[[bytes], None],
        on_connected: Callable[[], None],
    ) -> None:
        self.process = process
        self.peer = peer
        self.on_frame = on_frame
        self.target: Router | None = None
        self.connection: Connection | None = None
        self._on_connected = on_connected
        self._waiting: list[bytes] = []
        self._cuts: dict[Router, tuple[int, int]] = {}

    @property
    def connected(self) -> bool:
        """Whether the worker believes that it is connected."""
        return self.connection is not None

    def cut_until_ms(self, router: Router, direction: int) -> int:
        """Until when nothing gets through (0: to the coordinator, 1: to the worker)."""
        return self._cuts.get(router, (0, 0))[direction]

    def cut(self, router: Router, until_ms: int, directions: tuple[bool, bool]) -> None:
        """Let nothing through for a while. What is sent in that time arrives later, if the connection
        lasts.
        """
        former = self._cuts.get(router, (0, 0))
        self._cuts[router] = tuple(
            max(old, until_ms) if cut else old for old, cut in zip(former, directions, strict=True)
        )  # pyright: ignore[reportArgumentType]

    def heal(self) -> None:
        """End all cuts."""
        self._cuts.clear()

    def connect(self, router: Router) -> None:
        """Connect to this coordinator, and leave the former one."""
        if self.connection is not None:
            self.connection.break_off(None, self.process.world.up_to(4))
            self.connection = None
        self._waiting.clear()
        self.target = router
        self._try(router)

    def close(self, notices_ms: int | None, *, flush_ms: int | None = None) -> None:
        """The process has ended. `flush_ms`: what was sent before still arrives, then the end is noticed."""
        self.target = None
        connection, self.connection = self.connection, None
        if connection is None:
            return
        if flush_ms is None:
            connection.break_off(None, notices_ms)
        else:
            self.process.world.at(flush_ms, None, connection.break_off, None, notices_ms)

    def send(self, frame: bytes) -> None:
        """Send now, or when the connection is back."""
        if self.connection is not None:
            self.connection.to_router(frame)
        elif self.target is not None:
            self._waiting.append(frame)

    def lost(self, connection: Connection) -> None:
        """The end of the connection was noticed. It is retried."""
        if self.connection is connection:
            self.connection = None
            self.process.note("(connection lost)")
            if self.target is not None:
                self.process.later(20 + self.process.world.up_to(60), self._try, self.target)

    def _try(self, router: Router) -> None:
        world = self.process.world
        if self.connection is not None or self.target is not router:
            return
        reachable = router.listening and router.process.alive and not router.process.paused
        if not reachable or max(self._cuts.get(router, (0, 0))) > world.now_ms:
            self.process.later(60 + world.up_to(120), self._try, router)
            return
        connection = self.connection = Connection(world, self, router)
        router.accept(connection)
        # What was sent in the meantime goes out first: the process learns of the connection a little later.
        waiting, self._waiting = self._waiting, []
        for frame in waiting:
            connection.to_router(frame)
        self.process.later(world.up_to(2), self._connected, connection)

    def _connected(self, connection: Connection) -> None:
        if self.connection is connection:
            self._on_connected()
