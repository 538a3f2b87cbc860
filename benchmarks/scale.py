"""What a coordinator takes for a large cluster: 1,000 workers and 10,000 shards, unless told otherwise.

    python -m benchmarks.scale [--workers 1000] [--shards 10000] [--epochs 20]

The coordinator's real core, its real messages and its real sockets, without Kafka. The workers are modelled
and answer at once. What is measured is processor time in milliseconds:

- *start*: from the first Hello until all shards run. All workers join in one burst.
- *epoch*: one epoch in which all workers take part: Dirty, Barrier, Prepared, Complete, Committed of each;
  each Committed has the standing of one shard. The median of all epochs.
- *heartbeats*: one heartbeat of each worker, with the standings of all of its shards.

There are three columns. *core*: in the core's `handle` and `next_deadline_ms`. *frames*: besides, decoding
and checking what arrives (`coordinator/gate`), and encoding what leaves. *sockets*: one process with core,
frames and a ROUTER socket, which talks over TCP to the workers' DEALER sockets in another process; all the
processor time of that process, the threads of ZeroMQ included, and beside it how long it took.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import zmq

from fcluster import Job
from fcluster.common import garbage
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.coordinator.core import events
from fcluster.coordinator.core.coordinator import Coordinator
from fcluster.coordinator.core.model import ShardPhase, Terms
from fcluster.coordinator.gate import Gate
from fcluster.graph.topology import Topology
from fcluster.wire import messages
from fcluster.wire.messages import ShardStatus, WorkerStats
from fcluster.wire.transport import FrameReceived, RouterTransport

VERSION = "1"
TIME_LIMIT_S = 300.0
PATIENT = Settings(session_timeout_ms=3_600_000, checkpoint_timeout_ms=3_600_000)
"""The modelled workers send no heartbeats while an epoch is measured."""


def topology_of(shards: int) -> tuple[Topology, dict[str, int]]:
    """A job of one stage, and the number of partitions of its topic."""
    job = Job("scale")

    @job.process(job.topic("in", value="json"), to=job.topic("out", value="json"))
    def totals(ctx: Any, record: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
        return record

    return job.build(Settings()), {"in": shards}


class Workers:
    """All workers of the cluster: what each of them answers.

    Args:
        topology: of the job.
    """

    def __init__(self, count: int, topology: Topology) -> None:
        self.names = [b"worker-%d" % number for number in range(count)]
        self.running = 0
        self.committed = 0
        self._topology = topology
        self._sessions: dict[bytes, int] = {}
        self._shards: dict[bytes, list[ShardId]] = defaultdict(list)
        self._released = itertools.count(1)

    def hello(self, name: bytes) -> messages.Hello:
        """Its first message."""
        return messages.Hello(
            worker=name.decode(),
            host=f"host-{int(name.rpartition(b'-')[2]) // 10}",
            pid=1,
            slot=-1,
            session=0,
            owned=[],
            epoch=0,
            prepared_epoch=0,
            dirty=False,
            topology=self._topology.fingerprint,
            snapshot_store="store",
            version=VERSION,
        )

    def dirty(self, name: bytes) -> messages.Dirty:
        """It has records that aren't committed."""
        return messages.Dirty(self._sessions[name], False)

    def heartbeat(self, name: bytes) -> messages.Heartbeat:
        """With the standings of all of its shards."""
        standings = [ShardStatus(shard, 1000, 900, 1100, True, 1) for shard in self._shards[name]]
        return messages.Heartbeat(self._sessions[name], WorkerStats(records_in=1000, shards=standings), 10**6)

    def answer(self, name: bytes, message: messages.FromCoordinator) -> messages.FromWorker | None:
        """What it says to a message of the coordinator's."""
        match message:
            case messages.Welcome():
                self._sessions[name] = message.session
            case messages.Assign():
                self._shards[name] += message.shards
                self.running += len(message.shards)
                standings = [ShardStatus(shard, 0, 0, -1, False, 0) for shard in message.shards]
                return messages.ShardsRunning(message.session, standings)
            case messages.Revoke():
                self._shards[name] = [one for one in self._shards[name] if one not in message.shards]
                self.running -= len(message.shards)
                return messages.Released(message.session, message.shards, next(self._released))
            case messages.Barrier():
                return messages.Prepared(message.session, message.epoch, 10, 1.0, False)
            case messages.Complete():
                self.committed += 1
                standings = [ShardStatus(self._shards[name][0], 1000, 1000, 1100, False, message.epoch)]
                return messages.Committed(message.session, message.epoch, 1.0, False, standings)
            case _:
                pass
        return None


class Shell:
    """Carries out the core's effects; the journal writes and fences at once. Each event gets the real time.

    Args:
        send: passes on a message to a worker.
    """

    def __init__(
        self,
        topology: Topology,
        partitions: dict[str, int],
        workers: int,
        send: Callable[[bytes, messages.FromCoordinator], object],
    ) -> None:
        terms = Terms(1, topology, partitions, PATIENT, workers, VERSION)
        self.core = Coordinator.recover({}, terms, self._now_ms())
        self._send = send
        self.feed(events.Started())

    @staticmethod
    def _now_ms() -> float:
        return time.monotonic() * 1000

    def feed(self, *waiting: events.Event) -> float:
        """Pass events to the core, and carry out its effects. Returns the processor time in the core, in
        seconds.
        """
        handle, now_ms, core_s = self.core.handle, self._now_ms, 0.0
        while waiting:
            began_s = time.thread_time()
            effects = [handle(event, now_ms()) for event in waiting]
            core_s += time.thread_time() - began_s
            results = [result for one in effects for result in self._carry_out(one)]
            # Like the journal's thread: what is queued is written at once, and reported once.
            written = [one for one in results if isinstance(one, events.JournalWritten)]
            waiting = (*written[-1:], *(one for one in results if not isinstance(one, events.JournalWritten)))
        return core_s

    def _carry_out(self, effects: Sequence[events.Effect]) -> Iterator[events.Event]:
        for effect in effects:
            match effect:
                case events.SendMessage(peer, message):
                    self._send(peer, message)
                case events.WriteJournal():
                    yield events.JournalWritten(effect.sequence)
                case events.FenceSlot(slot):
                    yield events.SlotFenced(slot)
                case _:
                    pass

    @property
    def all_run(self) -> bool:
        """Whether all shards run."""
        return all(shard.phase is ShardPhase.RUNNING for shard in self.core.shards.values())


# --- in one process ------------------------------------------------------------------------------------


class InOneProcess:
    """Core and frames."""

    def __init__(self, workers: int, shards: int) -> None:
        topology, partitions = topology_of(shards)
        self._workers = Workers(workers, topology)
        self._sent: list[tuple[bytes, messages.FromCoordinator]] = []
        self._shell = Shell(topology, partitions, workers, lambda *sent: self._sent.append(sent))
        self._gate = Gate(1, secured=False)
        self._core_s = self._frames_s = 0.0

    def _exchange(self, said: Iterable[tuple[bytes, messages.FromWorker]]) -> None:
        """Pass on what workers say, and then what they answer, until nobody says anything more."""
        waiting = list(said)
        while True:
            received = [FrameReceived(name, messages.encode(one), "worker") for name, one in waiting]
            began_s = time.thread_time()
            admitted = [self._gate.admit(one) for one in received]
            self._frames_s += time.thread_time() - began_s
            handed: list[events.Event] = []
            for (name, _), message in zip(waiting, admitted, strict=True):
                assert message is not None
                assert not isinstance(message, messages.Refused), message
                handed.append(events.MessageReceived(name, message))
            self._core_s += self._shell.feed(*handed)
            if not self._sent:
                self._core_s += self._shell.feed(events.Tick())
            began_s = time.thread_time()
            self._shell.core.next_deadline_ms()  # once for each batch of messages
            self._core_s += time.thread_time() - began_s
            began_s = time.thread_time()
            for _, message in self._sent:
                messages.encode(message)
            self._frames_s += time.thread_time() - began_s
            if not self._sent:
                return
            sent, self._sent = self._sent, []
            answers = [(name, self._workers.answer(name, message)) for name, message in sent]
            waiting = [(name, answer) for name, answer in answers if answer is not None]

    def _timed(self, act: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds in the core, and in core and frames."""
        core_s, frames_s = self._core_s, self._frames_s
        act()
        core_ms = (self._core_s - core_s) * 1000
        return core_ms, core_ms + (self._frames_s - frames_s) * 1000

    def start(self) -> tuple[float, float]:
        """All workers join."""

        def join() -> None:
            workers = self._workers
            self._exchange((name, workers.hello(name)) for name in workers.names)
            deadline_s = time.monotonic() + TIME_LIMIT_S
            while not self._shell.all_run:
                assert time.monotonic() < deadline_s, "the shards don't run"
                time.sleep(0.001)
                self._exchange(())

        return self._timed(join)

    def epoch(self) -> tuple[float, float]:
        """One with all workers."""
        workers, before = self._workers, self._workers.committed

        def commit() -> None:
            self._exchange((name, workers.dirty(name)) for name in workers.names)
            while workers.committed < before + len(workers.names):
                time.sleep(0.001)
                self._exchange(())

        time.sleep(0.05)  # so that it's nobody's interval that is waited for
        return self._timed(commit)

    def heartbeats(self) -> tuple[float, float]:
        """One of each worker."""
        workers = self._workers
        return self._timed(lambda: self._exchange((name, workers.heartbeat(name)) for name in workers.names))


# --- over sockets --------------------------------------------------------------------------------------


def play_workers(count: int, shards: int, address: str, orders: Any, done: Any) -> None:
    """All workers, in their own process. Orders: "hello", "dirty", "heartbeat", "end"."""
    workers = Workers(count, topology_of(shards)[0])
    context = zmq.Context.instance()
    context.set(zmq.MAX_SOCKETS, count + 100)
    sockets: dict[Any, tuple[bytes, zmq.Socket[bytes]]] = {}
    poller = zmq.Poller()
    for name in workers.names:
        socket = context.socket(zmq.DEALER)
        socket.identity = name
        socket.linger = 0
        socket.connect(address)
        sockets[socket] = name, socket
        poller.register(socket, zmq.POLLIN)
    says: dict[str, Callable[[bytes], messages.FromWorker]] = {
        "hello": workers.hello,
        "dirty": workers.dirty,
        "heartbeat": workers.heartbeat,
    }
    while True:
        if orders.poll():
            order = orders.recv()
            if order == "end":
                return
            for name, socket in sockets.values():
                socket.send(messages.encode(says[order](name)))
        for ready, _ in poller.poll(1):
            name, socket = sockets[ready]
            while socket.poll(0):
                answer = workers.answer(name, messages.decode_from_coordinator(socket.recv()))
                if answer is not None:
                    socket.send(messages.encode(answer))
        done.value = workers.committed


class OverSockets:
    """Core, frames and sockets."""

    def __init__(self, workers: int, shards: int) -> None:
        topology, partitions = topology_of(shards)
        self._count = workers
        self._transport = RouterTransport()
        port = self._transport.bind("tcp://127.0.0.1:0")
        send = self._transport.send
        self._gate = Gate(1, secured=False)
        self._shell = Shell(
            topology, partitions, workers, lambda peer, message: send(peer, messages.encode(message))
        )
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._done = context.Value("q", 0, lock=False)
        self._heard = 0
        self._process = context.Process(
            target=play_workers, args=(workers, shards, port, theirs, self._done), daemon=True
        )
        self._process.start()

    def _run_until(self, condition: Callable[[], bool]) -> tuple[float, float]:
        """Milliseconds of processor time, and of time."""
        cpu_s, began_s = time.process_time(), time.monotonic()
        while not condition():
            assert time.monotonic() < began_s + TIME_LIMIT_S, "it takes too long"
            for event in self._transport.poll(1):
                if isinstance(event, FrameReceived):
                    admitted = self._gate.admit(event)
                    assert not isinstance(admitted, messages.Refused | None), admitted
                    self._heard += 1
                    self._shell.feed(events.MessageReceived(event.peer, admitted))
            self._shell.feed(events.Tick())
        return (time.process_time() - cpu_s) * 1000, (time.monotonic() - began_s) * 1000

    def start(self) -> tuple[float, float]:
        """All workers join."""
        self._orders.send("hello")
        return self._run_until(lambda: self._shell.all_run)

    def epoch(self) -> tuple[float, float]:
        """One with all workers, from the first Dirty to the last Committed."""
        time.sleep(0.05)
        wanted = self._heard + 3 * self._count
        self._orders.send("dirty")
        return self._run_until(lambda: self._heard >= wanted)

    def heartbeats(self) -> tuple[float, float]:
        """One of each worker."""
        wanted = self._heard + self._count
        self._orders.send("heartbeat")
        return self._run_until(lambda: self._heard >= wanted)

    def close(self) -> None:
        """End the workers."""
        self._orders.send("end")
        self._process.join(30)
        self._transport.close()


def medians(rows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of both columns."""
    return statistics.median(row[0] for row in rows), statistics.median(row[1] for row in rows)


def main() -> int:
    """Run and print."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--workers", type=int, default=1_000)
    made.add_argument("--shards", type=int, default=10_000)
    made.add_argument("--epochs", type=int, default=20)
    arguments = made.parse_args()
    print(f"{arguments.workers} workers, {arguments.shards} shards; milliseconds", flush=True)
    print(f"{'':<12} {'core':>9} {'frames':>9} {'sockets':>9} {'(took)':>9}")
    garbage.settle()  # as in a coordinator
    inside = InOneProcess(arguments.workers, arguments.shards)
    outside = OverSockets(arguments.workers, arguments.shards)
    try:
        for what, count in (("start", 1), ("epoch", arguments.epochs), ("heartbeats", 5)):
            core_ms, frames_ms = medians([getattr(inside, what)() for _ in range(count)])
            cpu_ms, took_ms = medians([getattr(outside, what)() for _ in range(count)])
            print(f"{what:<12} {core_ms:>9.1f} {frames_ms:>9.1f} {cpu_ms:>9.1f} {took_ms:>9.1f}", flush=True)
    finally:
        outside.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
