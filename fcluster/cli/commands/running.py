"""Commands that run a job: `up`, and its parts `coordinator` and `worker`. Parsing only."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from fcluster.cli.commands.options import (
    caught_up_option,
    common_options,
    end_option,
    job_argument,
    options_of,
    snapshots_option,
    start_option,
)
from fcluster.cli.ending import Session, report, tell_keeper
from fcluster.common.exit_codes import ExitCode

HANDLERS_END_S = 3.0
"""How long a worker that has finished waits for threads and processes of its handlers."""


@click.command()
@job_argument
@click.option("--workers", metavar="N", type=click.IntRange(1), help="Worker processes.  [default: 4]")
@snapshots_option
@start_option
@end_option
@caught_up_option
@click.option("--plain", is_flag=True, help="Print plain log lines instead of the live view.")
@common_options
@click.pass_context
def up(
    context: click.Context,
    target: str,
    workers: int | None,
    snapshots: str | None,
    start: tuple[str, ...],
    end: tuple[str, ...],
    until_caught_up: bool,
    plain: bool,
    **common: Any,
) -> None:
    """Run JOB on this machine.

    This starts a coordinator, workers, and an embedded Kafka if no brokers are given.

    JOB is a file (flights.py), or a job in a file (flights.py:job) or module (package.module:job). Ctrl-C
    commits the last epoch and exits; a second Ctrl-C kills all processes. Nothing is lost either way.

    With --end, the job reads each partition up to there and no further, closes its windows and joins, fires
    its event-time timers, commits everything, and exits with code 0. The ends are fixed once: start an
    interrupted run again, with the same --end or without it, and it goes on to the same ends.

    \b
    Examples:
      fcluster up flights.py
      fcluster up flights.py --start earliest --end end
      fcluster up flights.py --start time:2026-01-01T00:00:00Z --end time:2026-02-01T00:00:00Z
      fcluster up flights.py --brokers host:9092 --workers 4 --data-dir ./state --snapshots ./snapshots
      fcluster up flights.py --until-caught-up --set commit.interval.ms=100
    """
    from fcluster.cli.up import UpOptions, run_up
    from fcluster.common.offset_targets import parse_target

    if end and until_caught_up:
        raise click.UsageError("--end and --until-caught-up exclude each other")
    begin = parse_target(start, "--start") if start else None
    if end:
        parse_target(end, "--end")  # mistakes are found here
    options = options_of(**common, workers=workers, snapshots=snapshots)
    session = context.ensure_object(Session)

    def on_data_dir(data_dir: Path) -> None:
        session.data_dir = data_dir

    up_options = UpOptions(
        target=target,
        flags=options.flags,
        config=options.config,
        log_level=options.log_level,
        start=begin,
        end=end,
        until_caught_up=until_caught_up,
        live=not plain and sys.stdout.isatty(),
        on_data_dir=on_data_dir,
    )
    context.exit(run_up(up_options))


@click.command()
@job_argument
@click.option("--workers", metavar="N", type=click.IntRange(1), help="Expected workers.  [default: 4]")
@snapshots_option
@end_option
@caught_up_option
@click.option("--bind", metavar="tcp://HOST:PORT", help="Where to listen (setting coordinator.bind).")
@click.option("--no-standby", is_flag=True, help="Exit with an error if another coordinator leads JOB.")
@click.option("--ready-file", type=click.Path(dir_okay=False, path_type=Path), hidden=True)
@common_options
@click.pass_context
def coordinator(
    context: click.Context,
    target: str,
    workers: int | None,
    snapshots: str | None,
    end: tuple[str, ...],
    until_caught_up: bool,
    bind: str | None,
    no_standby: bool,
    ready_file: Path | None,
    **common: Any,
) -> None:
    """Run JOB's coordinator. Workers find it through Kafka.

    A second coordinator, on this host or another one, is a standby: it takes over when the leader dies or
    hangs. Ctrl-C stops the leader, drains the job and ends its standbys. On SIGTERM the leader hands over to
    a standby and the job goes on; without a standby the job is drained. A standby that gets either of them
    just exits.

    \b
    Examples:
      fcluster coordinator flights.py --brokers host:9092 --workers 2
      fcluster coordinator flights.py --brokers host:9092 --workers 2    # once more: a standby
    """
    context.ensure_object(Session).is_server = True
    options = options_of(**common, workers=workers, snapshots=snapshots, bind=bind)
    from fcluster.cli.startup import load, start_logging

    start_logging(options.log_level)
    job, settings = load(target, options.flags, options.config, os.environ)
    from fcluster.common.offset_targets import parse_target
    from fcluster.coordinator.server import run_coordinator

    ended = run_coordinator(
        job,
        settings,
        expected_workers=settings.workers,
        until_caught_up=until_caught_up,
        end=parse_target(end, "--end") if end else None,
        stand_by=not no_standby,
        ready_file=ready_file,
    )
    if ended.exit_code == ExitCode.JOB_FAILED:
        from fcluster.cli.startup import job_failure

        report(context.ensure_object(Session), job_failure(ended.failure))
    context.exit(ended.exit_code)


@click.command()
@job_argument
@snapshots_option
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(1),
    help="Run N workers on this host as an agent; `fcluster scale` can change the number later.",
)
@click.option(
    "--slot", metavar="N", type=click.IntRange(-1), default=-1, help="Slot to take.  [default: any]"
)
@click.option(
    "--coordinator",
    "address",
    metavar="tcp://HOST:PORT",
    help="Address of the coordinator.  [default: found through Kafka]",
)
@click.option("--kept", is_flag=True, hidden=True)
@common_options
@click.pass_context
def worker(
    context: click.Context,
    target: str,
    snapshots: str | None,
    workers: int | None,
    slot: int,
    address: str | None,
    kept: bool,
    **common: Any,
) -> None:
    """Run one worker of JOB, or several. They find the coordinator through Kafka.

    On SIGTERM or Ctrl-C its shards move to warm copies on other workers first, then it exits (exit code 0).
    On a second signal it commits and exits at once. After `fcluster drain` the exit code is 4: don't restart
    it.

    With --workers it runs workers as child processes, restarts those that die, and ends with the job.

    \b
    Examples:
      fcluster worker flights.py --brokers host:9092
      fcluster worker flights.py --brokers host:9092 --workers 8
    """
    if workers is not None and slot >= 0:
        raise click.UsageError("--slot is for one worker, --workers for several")
    context.ensure_object(Session).is_server = True
    options = options_of(**common, snapshots=snapshots)
    from fcluster.cli.run_agent import AgentOptions, run_agent
    from fcluster.cli.startup import load, start_logging

    start_logging(options.log_level)
    if workers is not None:
        agent = AgentOptions(target, options.flags, options.config, options.log_level, workers, address or "")
        context.exit(run_agent(agent))
    from fcluster.worker import handler_processes

    handler_processes.prepare()
    job, settings = load(target, options.flags, options.config, os.environ)
    from fcluster.worker.server import run_worker

    address = address or settings.coordinator_address
    ended = run_worker(job, settings, slot=slot, coordinator_address=address)
    code = ended.exit_code
    if ended.failure is not None:
        # If the job fails, the coordinator reports it.
        tell = tell_keeper if code == ExitCode.JOB_FAILED else report
        tell(context.ensure_object(Session), ended.failure)
    if code == ExitCode.JOB_ENDED and not kept:
        code = 0  # a supervisor must distinguish this from a request to leave; for others it is success
    handler_processes.leave_within(HANDLERS_END_S, code)
    context.exit(code)
