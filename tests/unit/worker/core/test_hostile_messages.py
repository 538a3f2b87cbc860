"""A worker gets nonsense from its coordinator: 100,000 fuzzed frames, and absurd messages with the right
types."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import Any

import msgspec
import zmq
from hypothesis import given
from hypothesis import strategies as st

from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.wire import messages
from fcluster.wire.messages import MalformedMessageError
from fcluster.wire.transport import DealerTransport
from fcluster.worker.core import events, model
from fcluster.worker.core import worker as core

FRAMES = 100_000
GROWTH_BYTES_MAX = 64 * 1024 * 1024
SHARDS = [ShardId("in", 0), ShardId("in", 1)]


def joined() -> core.WorkerCore:
    identity = model.Identity("w1", "h", 1, -1, "f", "store", "0")
    bounds = model.Bounds(epoch_records_max=1000, coordinator_loss_ms=30_000, offset_refresh_ms=60_000)
    worker = core.WorkerCore(identity, bounds, 0)
    worker.handle(events.Connected(), 0)
    worker.handle(events.MessageReceived(messages.Welcome(1, 7, 0, 0, adopted=False)), 0)
    worker.handle(events.ProducersOpened(7), 0)
    worker.handle(events.MessageReceived(messages.Assign(1, 7, SHARDS, 1)), 0)
    for shard in SHARDS:
        worker.handle(events.ShardRestored(7, shard, CommittedPosition(0, 0, 0, "f")), 0)
    return worker


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fuzzed(chance: random.Random, number: int) -> bytes:
    """A frame that hardly any coordinator would send."""
    good = messages.encode(
        chance.choice(
            [
                messages.Barrier(1, 8, number),
                messages.Assign(1, 8, [ShardId("in", number)] * 10, number),
                messages.Complete(0, 7, number),
                messages.HeartbeatAck(1, number),
            ]
        )
    )
    match number % 5:
        case 0:
            return chance.randbytes(chance.randrange(200))
        case 1:
            return good[: chance.randrange(len(good))]
        case 2:
            at = chance.randrange(len(good))
            return good[:at] + chance.randbytes(1) + good[at + 1 :]
        case 3:
            return bytes([chance.choice([0, 2, 255])]) + good[1:]
        case _:
            return good


def test_a_hundred_thousand_fuzzed_frames_are_counted_and_dropped_without_effect() -> None:
    worker, received, malformed = joined(), 0, 0
    done = threading.Event()

    def on_frame(frame: bytes) -> None:
        nonlocal received, malformed
        received += 1
        if frame == b"end":
            done.set()
            return
        try:
            message = messages.decode_from_coordinator(frame)
        except MalformedMessageError:
            malformed += 1
            return
        worker.handle(events.MessageReceived(message), 0)
        worker.invariants()

    transport = DealerTransport(b"w1", on_frame, lambda: None, lambda: None)
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        router.setsockopt(zmq.SNDHWM, 1_000)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        transport.connect(f"tcp://127.0.0.1:{port}")
        transport.send(b"hello")
        assert router.poll(10_000)
        peer = router.recv_multipart()[0]
        chance = random.Random(20_250_101)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # waits for room instead of dropping frames
        before, expected = resident_bytes(), 0
        for number in range(FRAMES):
            frame = fuzzed(chance, number)
            expected += not is_message(frame)
            router.send_multipart([peer, frame] if number % 1000 else [peer, frame, b"a second part"])
            expected -= number % 1000 == 0 and not is_message(frame)
        router.send_multipart([peer, b"end"])
        assert done.wait(60)
        assert (received, malformed) == (FRAMES - FRAMES // 1000 + 1, expected)
        assert transport.malformed_frames == FRAMES // 1000
        assert 0.5 * FRAMES < malformed < 0.9 * FRAMES
        assert resident_bytes() - before < GROWTH_BYTES_MAX
        assert worker.state.session == 7
        assert set(worker.state.shards) == set(SHARDS)
    finally:
        transport.close()
        router.close(0)
        context.term()


def is_message(frame: bytes) -> bool:
    try:
        messages.decode_from_coordinator(frame)
    except MalformedMessageError:
        return False
    return True


NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 8, 2**31, 2**53])
TERMS = st.sampled_from([0, 1, 1, 1, 2])
SESSIONS = st.sampled_from([0, 7, 7, 7, 8, 2**63 - 1])
ANY_SHARDS = st.lists(
    st.sampled_from([*SHARDS, ShardId("in", 9), ShardId("", -1), ShardId("x" * 999, 2**40)]), max_size=5
)
BOOLEANS = st.booleans()
LIES = st.one_of(
    st.builds(messages.Welcome, TERMS, SESSIONS, st.sampled_from([-1, 0, 1, 2**31 - 1]), NUMBERS, BOOLEANS),
    st.builds(messages.Refused, TERMS, st.just("reason"), st.just(True)),
    st.builds(messages.Evicted, TERMS, SESSIONS),
    st.builds(messages.Assign, TERMS, SESSIONS, ANY_SHARDS),
    st.builds(messages.Revoke, TERMS, SESSIONS, ANY_SHARDS),
    st.builds(messages.Barrier, TERMS, SESSIONS, NUMBERS),
    st.builds(messages.Complete, TERMS, SESSIONS, NUMBERS),
    st.builds(messages.Drain, TERMS, SESSIONS),
    st.builds(messages.HeartbeatAck, TERMS, SESSIONS),
    st.builds(messages.StatusReply, TERMS, st.just(msgspec.Raw(b"\x80"))),
    st.builds(messages.StopReply, TERMS),
)
EVENTS = st.one_of(
    LIES.map(events.MessageReceived),
    LIES.map(events.MessageReceived),
    st.just(events.Connected()),
    st.just(events.Tick()),
    st.just("records"),
    st.just("carry out"),
)


@given(st.lists(EVENTS, max_size=40))
def test_absurd_messages_keep_the_workers_rules(steps: list[Any]) -> None:
    worker = joined()
    waiting: list[events.Event] = []
    for step in steps:
        if step == "carry out":
            happening, waiting = waiting, []
        elif step == "records":
            running = frozenset(
                shard
                for shard, owned in worker.state.shards.items()
                if owned.phase is model.ShardPhase.RUNNING
            )
            able = running and worker.state.producers_ready
            happening = [events.RecordsProcessed(running, 10, False)] if able else []
        else:
            happening = [step]
        for event in happening:
            effects = worker.handle(event, 0)
            worker.invariants()
            for effect in effects:
                waiting += outcome_of(effect, worker)
                if isinstance(effect, events.Send):
                    messages.decode_for_coordinator(messages.encode(effect.message))


def outcome_of(effect: events.Effect, worker: core.WorkerCore) -> list[events.Event]:
    match effect:
        case events.OpenProducers(session=session):
            return [events.ProducersOpened(session)]
        case events.RestoreShards(session=session, shards=shards):
            return [events.ShardRestored(session, shard, CommittedPosition(0, 0, 0, "f")) for shard in shards]
        case events.PrepareEpoch(epoch=epoch):
            return [events.EpochFlushed(worker.state.session, epoch, 1, 1.0)]
        case events.CommitEpoch(epoch=epoch):
            return [events.EpochCommitted(worker.state.session, epoch, 1.0, {})]
        case _:
            return []
