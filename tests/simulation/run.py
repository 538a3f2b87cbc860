"""One run: faults, their end, and what must be true then.

Responsible for: `run`, which plays a seed and returns a `Result`, and `catches`, which says whether a seed
finds a planted bug. Safety is checked all the time. Then the faults end, and everything has to be committed
within a bound of virtual time. Then the job is stopped cleanly.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fcluster.common.exit_codes import ExitCode
from fcluster.coordinator.core import events
from tests.phases import watch_phases
from tests.simulation.cluster import Cluster
from tests.simulation.coordinator_shell import SimCoordinator
from tests.simulation.faults import FaultPlan, plan_faults
from tests.simulation.jobs import SimJob, Written
from tests.simulation.worker_shell import SimWorker
from tests.simulation.world import Violation, World

if TYPE_CHECKING:
    from tests.simulation.mutations import Mutation

watch_phases()

LIVENESS_BOUND_MS = 20_000
"""Well above the sum of all timeouts, including those of transactions. If something takes longer, it
hangs.
"""
STOP_BOUND_MS = 20_000
LEAVE_BOUND_MS = 6_000
"""Above `worker.leave.timeout.ms` and `checkpoint.timeout.ms` together."""
EVENTS_MAX = 400_000


@dataclass(frozen=True)
class Result:
    """The result of a seed.

    Attributes:
        failure: empty if all was well.
        landed: which faults happened, how often.
        transcript: only if it was recorded.
        outputs: what a read_committed reader finds in each topic that the job writes, by partition. Only if a
            job was given.
    """

    seed: int
    plan: FaultPlan
    failure: str
    landed: Counter[str]
    commits: int
    events: int
    virtual_ms: int
    transcript: tuple[str, ...] = ()
    outputs: Mapping[str, list[list[Written]]] = field(default_factory=dict[str, list[list[Written]]])


def run(
    seed: int,
    *,
    mutation: Mutation | None = None,
    recording: bool = False,
    job: SimJob | None = None,
) -> Result:
    """Play a seed.

    Args:
        seed: decides everything.
        mutation: a bug to plant.
        recording: whether to keep the transcript.
        job: the job to play. None: the seed decides.
    """
    world = World(seed, recording=recording)
    cluster = Cluster(
        world,
        worker_class=mutation.worker_class if mutation else SimWorker,
        coordinator_class=mutation.coordinator_class if mutation else SimCoordinator,
        harm_only=mutation.harm_only if mutation else False,
        played=job,
    )
    plan = plan_faults(cluster)
    failure = ""
    try:
        cluster.begin()
        _play(cluster, plan)
    except Violation as violation:
        failure = f"violation: {violation}"
    except Exception as error:  # noqa: BLE001  a core that raises is a finding like any other
        failure = f"{type(error).__name__}: {error}"
        world.note("world", "%s", traceback.format_exc())
    if failure:
        world.note("world", "FAILED: %s", failure)
    return Result(
        seed,
        plan,
        failure,
        world.landed,
        cluster.checks.commits,
        world.events,
        world.now_ms,
        tuple(world.transcript or ()),
        {} if job is None else cluster.checks.outputs(),
    )


def catches(seed: int, mutation: Mutation) -> bool:
    """Whether the seed finds the planted bug, and finds nothing without it (or with only a part of it)."""
    if mutation.finding not in run(seed, mutation=mutation).failure:
        return False
    return not run(seed).failure and not any(run(seed, mutation=part).failure for part in mutation.parts)


def _play(cluster: Cluster, plan: FaultPlan) -> None:
    world, checks = cluster.world, cluster.checks
    world.run(plan.duration_ms)
    cluster.heal()
    if cluster.run_end is not None:
        _play_to_the_end(cluster)
        return
    if not world.run(world.now_ms + LIVENESS_BOUND_MS, _seldom(cluster, checks.everything_committed)):
        raise Violation(f"not everything is committed in time: {'; '.join(checks.behind())}")
    checks.final()
    if cluster.job.dead_letters_max and not world.run(
        world.now_ms + LIVENESS_BOUND_MS, _seldom(cluster, lambda: not checks.miscounted())
    ):
        raise Violation(checks.miscounted())
    if not world.run(world.now_ms + LEAVE_BOUND_MS, lambda: not _leaving(cluster)):
        raise Violation(f"asked to leave, but still there: {', '.join(map(str, _leaving(cluster)))}")
    _check_live_state(cluster)
    if world.seed % 3 == 0:
        _stop(cluster)


def _play_to_the_end(cluster: Cluster) -> None:
    """A bounded run ends by itself, and then everything that belongs to it is there."""
    world, checks = cluster.world, cluster.checks
    if not world.run(world.now_ms + LIVENESS_BOUND_MS, lambda: cluster.finished):
        raise Violation(f"the run doesn't come to its end: {'; '.join(checks.run_is_over())}")
    world.run(world.now_ms + LIVENESS_BOUND_MS, lambda: not cluster.kafka.unfinished())
    missing = checks.run_is_over()
    if missing:
        raise Violation(f"the run is said to be over, but {'; '.join(missing)}")
    checks.final()
    world.landed["run came to its end"] += 1


def _leaving(cluster: Cluster) -> list[SimWorker]:
    return [worker for worker in cluster.living_workers if worker.leaving]


def _seldom(cluster: Cluster, done: object) -> object:
    """`done`, but called only when a commit may have changed the answer, or from time to time."""
    asked = [-1, -1]

    def ask() -> bool:
        if cluster.world.events > EVENTS_MAX:
            raise Violation("too many events: something never ends")
        now = [cluster.checks.commits, cluster.world.now_ms // 50]
        if now == asked:
            return False
        asked[:] = now
        return done()  # type: ignore[operator, no-any-return]

    return ask


def _check_live_state(cluster: Cluster) -> None:
    """Check that a running shard's state in memory is the committed state, once everything is committed."""
    leader = cluster.checks.leader
    assert leader is not None
    if not cluster.job.models:
        return
    for worker in cluster.living_workers:
        for shard, runner in worker.runners.items():
            if runner.reading and leader.shards[shard].session == worker.core.state.session != 0:
                cluster.checks.live(shard, worker.live_state(shard, cluster.checks.keys(shard)))


def _stop(cluster: Cluster) -> None:
    """Stop the job: all processes end cleanly."""
    coordinators = [other for other in cluster.living_coordinators if other.leads and other.core is not None]
    if len(coordinators) != 1:
        return
    leader, world = coordinators[0], cluster.world
    if leader.core is not None and leader.core.resignation is not None:
        return
    for other in cluster.living_coordinators:
        if other is not leader:
            other.kill("not needed any more")
    world.note("world", "## the job is stopped")
    cluster.stop_wanted = True
    leader.feed(events.StopRequested())

    def ended() -> bool:
        return not cluster.living_coordinators and not cluster.living_workers

    if not world.run(world.now_ms + STOP_BOUND_MS, lambda: not leader.alive):
        raise Violation("the job doesn't stop: the coordinator doesn't end")
    if leader.exit_code == ExitCode.TEMPORARY:
        return  # a request that was long on its way deposed it, or an answer got lost before the faults ended
    if leader.exit_code != 0:
        raise Violation(f"{leader} ended with code {leader.exit_code}")
    # A worker that had no connection at that moment is ended by its supervisor, which repeats the request.
    for _ in range(3):
        if not ended():
            world.run(world.now_ms + 1000, ended)
        for worker in cluster.living_workers:
            worker.terminate()
    world.run(world.now_ms + 1000, ended)
    if not ended():
        raise Violation(f"the job doesn't stop: {', '.join(map(str, cluster.living_workers))} don't end")
