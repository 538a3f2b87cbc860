"""Workers that are stopped in an epoch for longer than their session, and then continue."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from fcluster.common.failpoints import Arm
from tests.chaos.runner import LONG, PLAIN, REGROUPED, Chaos, variants
from tests.chaos.tally import WORKER_STOPPED
from tests.harness import process_state, wait_until

pytestmark = pytest.mark.timeout(300)

SESSION_TIMEOUTS = 3.0
STEPS = {
    "worker.commit": r"committing epoch \d+: .*_FENCED",
    "worker.layers-frozen": "joining again|replaying from the committed offsets",
    "worker.offsets-sent": "joining again|replaying from the committed offsets",
    "worker.prepared": "joining again|replaying from the committed offsets",
}
"""Where the worker stops, and what it logs when it continues and its next step is refused."""


def session_of(run: Chaos, name: str) -> int:
    """The number of the worker's session. 0 if it has none."""
    session = run.cluster.session(name)
    return session["session"] if session is not None else 0


def stop_past_session(run: Chaos, point: str, zombie: str) -> None:
    pid = run.cluster.child(zombie).pid
    session = session_of(run, zombie)
    assert session
    run.cluster.arm(zombie, point, Arm("stop"))
    mark = run.cluster.await_mark(zombie, point)
    wait_until(lambda: process_state(pid) in "Tt", f"{zombie} stops", 5, 0.002)
    # The step shows that an epoch is open. A worker with a backlog may not have sent an output of it yet.
    run.note(WORKER_STOPPED, f"SIGSTOP {zombie} at {point}", mark.time_ns, shown=f"epoch {mark.detail}")
    stopped_s = time.monotonic()
    run.await_flow()  # in its shards as well, so others have taken them over
    assert session_of(run, zombie) == 0
    time.sleep(max(0.0, stopped_s + SESSION_TIMEOUTS - time.monotonic()))  # the fault itself
    log_length = len(run.cluster.log(zombie, 10**6))
    run.cluster.resume(zombie)
    wait_until(
        lambda: re.search(STEPS[point], run.cluster.log(zombie, 10**6)[log_length:]),
        f"the log of {zombie} says {STEPS[point]!r}",
        30,
    )
    # The same process is back, with a new session.
    wait_until(lambda: session_of(run, zombie) > session, f"a new session of {zombie}", 30)
    run.await_shards(3)
    run.await_flow()


@pytest.mark.parametrize(
    ("job_file", "replicas"), variants([(PLAIN, 1), (REGROUPED, 0)], [(PLAIN, 0), (REGROUPED, 1)])
)
def test_worker_stopped_for_three_session_timeouts_is_refused_and_joins_again(
    chaos: Callable[..., AbstractContextManager[Chaos]], job_file: str, replicas: int
) -> None:
    points = list(STEPS) if LONG or job_file == PLAIN else list(STEPS)[:1]
    with chaos("worker stopped past its session", job_file=job_file, replicas=replicas) as run:
        for number, point in enumerate(points):
            stop_past_session(run, point, f"worker-{number % 3}")
