"""`fcluster worker JOB --workers N`: an agent, which runs a target number of workers on this host.

Responsible for: connecting the supervisor of the workers (`supervisor.Crew`) with the coordinator's orders
(`agent`). Rule: this module stops what it has started. Must not parse options or draw.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fcluster.cli.startup import job_failure, load
from fcluster.common.exit_codes import ExitCode
from fcluster.host.job_processes import ClusterFailed, JobProcesses, SpawnedChild, leave_timeout_s


@dataclass(frozen=True)
class AgentOptions:
    """The options of `fcluster worker JOB --workers N`; `flags` are settings by name."""

    target: str
    flags: Mapping[str, str]
    config: Path | None
    log_level: str
    workers: int
    coordinator: str


def run_agent(options: AgentOptions) -> int:
    """Run workers on this host until the job ends or fails, or a signal makes them leave. Returns the exit
    code.

    Raises:
        FclusterError: the workers can't be started, or fail again and again, or the job failed.
    """
    from fcluster.cli.live_view import PlainView
    from fcluster.host.agent import AgentLink, Staff
    from fcluster.host.supervisor import SUPERVISOR, Crew

    job, settings = load(options.target, options.flags, options.config, os.environ)
    job.build(settings)
    address = options.coordinator or settings.coordinator_address
    resolved = {"bootstrap.servers": settings.bootstrap_servers}
    processes = JobProcesses(
        options.target, options.flags, options.config, options.log_level, resolved, settings.http_bind
    )
    view = PlainView(sys.stderr)
    pids: dict[str, int] = {}

    def on_change(now: dict[str, int]) -> None:
        nonlocal pids
        pids = now
        link.tell()

    crew = Crew(
        options.workers,
        lambda number, slot: processes.worker(number, slot, address),
        spawn=lambda spec, on_line: SpawnedChild.start(
            spec.name, spec.argv, environment=processes.environment, on_line=on_line
        ),
        view=view,
        on_change=on_change,
        leave_timeout_s=leave_timeout_s(settings),
    )
    link = AgentLink(
        settings,
        job.name,
        address=address,
        staff=lambda: Staff(crew.target, list(pids.values())),
        resize=crew.resize,
        learn_slots=crew.learn_slots,
        on_end=crew.end,
        say=lambda text: view.line(SUPERVISOR, text),
    )
    view.line(SUPERVISOR, f"agent of job {job.name!r}, {options.workers} workers")
    link.start()
    try:
        outcome = crew.run()
    finally:
        link.close()
        view.close()
    if outcome.exit_code not in (0, ExitCode.INTERRUPTED):
        if outcome.exit_code == ExitCode.JOB_FAILED:
            outcome = replace(outcome, failure=job_failure(outcome.failure))
        raise ClusterFailed(outcome)
    return outcome.exit_code
