"""Calls to a service on loopback that is slow, hangs up, and is down for a while: a worker is killed, and
each answer counts exactly once, in order."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from tests.feeding import all_the_time
from tests.harness import REPOSITORY, wait_until
from tests.in_driver import rows_on_kafka
from tests.job_run import TimedRun

pytestmark = pytest.mark.timeout(400)

JOB = REPOSITORY / "tests" / "jobs" / "called.py"
PARTITIONS, KEYS, ANSWERS = 2, 40, 300
ANSWER_S = 0.01
HANGS_UP_AT = 7
"""It hangs up at each request of that number."""


class Service:
    """Doubles numbers, in a thread of its own.

    Attributes:
        port: where it listens.
        is_down: it hangs up at once.
        requests: how many it got.
        called: for each key, the idempotency keys in the order in which they came first, and their numbers.
    """

    def __init__(self) -> None:
        self.port = 0
        self.is_down = False
        self.requests = 0
        self.called: dict[str, dict[str, int]] = defaultdict(dict)
        self._started, self._stop = threading.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Service:
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        async with server:
            await self._stop.wait()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readline()).decode().split()
        if request:
            self.requests += 1
            key, idempotency_key, number = request
            if not self.is_down and self.requests % HANGS_UP_AT:
                self.called[key].setdefault(idempotency_key, int(number))
                await asyncio.sleep(ANSWER_S * (self.requests % 3))
                writer.write(b"%d\n" % (2 * int(number)))
        writer.close()


class Run(TimedRun):
    """A cluster with the job."""

    def key(self, number: int) -> str:
        return f"k{number % KEYS}"

    def answers(self) -> dict[str, list[int]]:
        """The counted answers of each key, in order."""
        self.cluster.assert_alive()
        found: dict[str, list[int]] = defaultdict(list)
        for rows in rows_on_kafka(self.brokers, self.output).values():
            for row in rows:
                value = orjson.loads(row[1] or b"")
                found[value["key"]].append(value["doubled"])
                assert value["n"] == len(found[value["key"]]), "each record counts once"
        return found

    def flush(self) -> None:
        """Wait until all records are in the source."""
        assert self._producer.flush(60) == 0

    def count(self) -> int:
        return sum(map(len, self.answers().values()))


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as service:
        yield service


@pytest.fixture
def run(service: Service, kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    run = Run(kafka, topic_prefix, tmp_path, JOB, PARTITIONS, {"FCLUSTER_TEST_PORT": str(service.port)})
    with run.cluster:
        yield run


def test_answers_count_exactly_once_and_in_order_with_a_killed_worker_and_a_service_that_fails(
    run: Run, service: Service
) -> None:
    run.cluster.start()
    with all_the_time(run.send):
        run.kill_amid(run.count, ANSWERS, ANSWERS, "answers are counted")
        service.is_down = True
        wait_until(lambda: "the circuit opens after" in run.cluster.logs(), "a circuit opens", 60, 0.2)
        service.is_down = False
        wait_until(lambda: "the circuit closes" in run.cluster.logs(), "the circuit closes", 60, 0.2)
    run.flush()
    wait_until(lambda: run.count() >= run.sent, "all are counted", 120, 0.5)
    wanted = {f"k{key}": [2 * number for number in range(key, run.sent, KEYS)] for key in range(KEYS)}
    assert run.answers() == wanted
    # The service got the numbers of each key in order, and knows a record that is called for again.
    assert {
        key: [2 * number for number in called.values()] for key, called in service.called.items()
    } == wanted
