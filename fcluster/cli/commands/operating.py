"""Commands that look at a running cluster or change it: `status`, `drain`, `scale`, `reset`. Parsing only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import click

from fcluster.cli.commands.options import (
    Command,
    common_options,
    connection_of,
    job_argument,
    options_of,
    progress,
    snapshots_option,
)
from fcluster.common.exit_codes import ExitCode


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the coordinator's status document as JSON.")
@click.option("--job", metavar="NAME", help="The job's name, if it wasn't started from the data directory.")
@common_options
@click.pass_context
def status(context: click.Context, as_json: bool, job: str | None, **common: Any) -> None:
    """Show the state of a cluster.

    It shows coordinator, workers, shards, epoch, lag, rates and commit latency. No option is needed in a
    directory where `fcluster up` runs.

    \b
    Examples:
      fcluster status
      fcluster status --json --brokers host:9092 --job carrier-delays
    """
    document = connection_of(context, options_of(**common)).status(job)
    if as_json:
        import orjson

        click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    else:
        from fcluster.cli.live_view import print_status

        print_status(document)


_job_option = click.option(
    "--job", metavar="NAME", help="The job's name, if it wasn't started from the data directory."
)
_no_wait_option = click.option("--no-wait", is_flag=True, help="Return once the change has begun.")


def _timeout_option(default_s: float) -> Callable[[Command], Command]:
    return click.option(
        "--timeout",
        "timeout_s",
        metavar="SECONDS",
        type=click.FloatRange(0, min_open=True),
        default=default_s,
        show_default=True,
        help="How long to wait for the change; after that, exit with an error.",
    )


@click.command()
@click.argument("worker")
@_job_option
@_no_wait_option
@_timeout_option(120)
@common_options
@click.pass_context
def drain(
    context: click.Context, worker: str, job: str | None, no_wait: bool, timeout_s: float, **common: Any
) -> None:
    """Remove one worker for good. Its shards move to warm copies on other workers first.

    WORKER is its slot, its id, or HOST:PID, as `fcluster status` shows them. `fcluster up` or the agent
    doesn't restart it, and has one worker less from then on.

    \b
    Examples:
      fcluster drain 3
      fcluster drain host2:4711 --brokers host:9092 --job carrier-delays
    """
    from fcluster.cli.connection import AdminLine
    from fcluster.cli.operations import drain as run_drain

    with AdminLine(connection_of(context, options_of(**common)), job) as line:
        run_drain(line, worker, wait=not no_wait, timeout_s=timeout_s, say=click.echo)


def _read_wanted(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> tuple[int, dict[str, int]]:
    """The total (-1 if none was given), and the number for each place."""
    places: dict[str, int] = {}
    for item in given:
        place, equals, number = item.rpartition("=")
        if not (number.isascii() and number.isdigit() and len(number) < 8) or (equals and not place):
            raise click.BadParameter(f"{item!r} is neither a number of workers nor HOST=N")
        if not place and len(given) > 1:
            raise click.BadParameter("give one number for all agents, or HOST=N for each, not both")
        if not place:
            return int(number), {}
        if place in places:
            raise click.BadParameter(f"{place!r} is named twice")
        places[place] = int(number)
    return -1, places


@click.command()
@click.argument("wanted", metavar="N | HOST=N...", nargs=-1, required=True, callback=_read_wanted)
@_job_option
@_no_wait_option
@_timeout_option(120)
@common_options
@click.pass_context
def scale(
    context: click.Context,
    wanted: tuple[int, dict[str, int]],
    job: str | None,
    no_wait: bool,
    timeout_s: float,
    **common: Any,
) -> None:
    """Change the number of workers.

    N workers are spread evenly over all agents; HOST=N sets the number on each named host. Agents are
    `fcluster up` and `fcluster worker JOB --workers N`; `fcluster status` lists them. Use HOST:PID if
    there are several on one host. Surplus workers leave once their shards have moved to warm copies.

    \b
    Examples:
      fcluster scale 8
      fcluster scale host1=4 host2=2 --brokers host:9092 --job carrier-delays
    """
    from fcluster.cli.connection import AdminLine
    from fcluster.cli.operations import scale as run_scale

    total, places = wanted
    with AdminLine(connection_of(context, options_of(**common)), job) as line:
        run_scale(line, total, places, wait=not no_wait, timeout_s=timeout_s, say=click.echo)


@click.command()
@job_argument
@click.option(
    "--to",
    metavar="WHERE",
    multiple=True,
    required=True,
    help="earliest, latest, time:2026-01-31T12:00:00Z, offsets:FILE, or TOPIC/PARTITION=OFFSET for each.",
)
@click.option("--keep-state", is_flag=True, help="Change only the offsets and keep the state.")
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@snapshots_option
@common_options
@click.pass_context
def reset(
    context: click.Context,
    target: str,
    to: tuple[str, ...],
    keep_state: bool,
    dry_run: bool,
    yes: bool,
    snapshots: str | None,
    **common: Any,
) -> None:
    """Reset a stopped JOB to given offsets.

    The job must not be running. Its next start begins at these offsets of its sources, with empty state. The
    reset sets the committed offsets and deletes the job's changelogs, repartition topics, snapshots and local
    state (with --keep-state it only sets the offsets); it shows first what will be deleted. Sources and
    output topics stay as they are. If a reset is interrupted, the job doesn't start until you run it again.
    FILE has a line TOPIC/PARTITION=OFFSET for each partition.

    \b
    Examples:
      fcluster reset flights.py --to earliest --dry-run
      fcluster reset flights.py --to earliest
      fcluster reset flights.py --to time:2026-01-31T12:00:00+01:00 --yes
      fcluster reset flights.py --to latest --keep-state
      fcluster reset flights.py --to flights/0=4711 --to flights/1=0
    """
    from fcluster.cli.reset import carry_out, plan_reset
    from fcluster.cli.startup import load, start_logging
    from fcluster.common.offset_targets import parse_target

    options = options_of(**common, snapshots=snapshots)
    where = parse_target(to)
    start_logging(options.log_level)
    job, settings = load(target, options.flags, options.config, os.environ)
    topology = job.build(settings)
    plan = plan_reset(settings, topology, where, keep_state=keep_state)
    for line in plan.describe():
        click.echo(line)
    if dry_run:
        click.echo("nothing was changed (--dry-run)")
        return
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("nothing was changed: confirming needs a terminal; add --yes")
    if not yes and not click.confirm("Reset the job?"):
        click.echo("nothing was changed")
        context.exit(ExitCode.MISTAKE)
    carry_out(plan, settings, topology, progress)
    click.echo("done")
