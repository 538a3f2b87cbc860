"""Races in the client library, which `tests/native/widen.c` makes likely."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.harness import REPOSITORY
from tests.native.widening import has_compiler, widened

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not has_compiler(), reason="native races: not tested, there is no C compiler (cc)"),
]
PAUSE_US = 1000
ROUNDS_MIN = 10


def storm(brokers: str, client: str, prefix: str, seconds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.native.storm", brokers, client, prefix, str(seconds)],
        cwd=REPOSITORY,
        env={**os.environ, **widened(PAUSE_US)},
        capture_output=True,
        text=True,
        timeout=150,
    )


def test_bare_client_crashes_when_threads_ask_at_once_about_an_unknown_topic(
    kafka: str, topic_prefix: str
) -> None:
    # Once a new librdkafka passes this, `kafka.clients.Admin` has nothing left to protect against.
    ended = storm(kafka, "bare", topic_prefix, 60)
    assert ended.returncode in (-signal.SIGSEGV, -signal.SIGABRT), (ended.returncode, ended.stdout)


def test_our_admin_client_survives_the_same(kafka: str, topic_prefix: str) -> None:
    ended = storm(kafka, "ours", topic_prefix, 10)
    assert ended.returncode == 0, (ended.returncode, ended.stdout, ended.stderr[-2000:])
    said = re.search(r"rounds=(\d+) failures=(\d+) pauses=(\d+)", ended.stdout)
    assert said, ended.stdout
    rounds, failures, pauses = map(int, said.groups())
    assert failures == 0, ended.stdout
    assert rounds >= ROUNDS_MIN
    assert pauses >= rounds, "the library was not loaded"
