"""The command `fcluster`: which commands there are.

Responsible for: the group of all commands. `commands` parses their options, `ending` decides how each of them
ends. Must not do the work itself.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import NoReturn

import click

from fcluster.cli.commands import jobs, kafka, keys, operating, running, topics
from fcluster.cli.ending import Commands, Session


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command with `arguments` (default: the process's own), then exit."""
    session = Session()
    try:
        commands.main(args=None if arguments is None else list(arguments), prog_name="fcluster", obj=session)
    finally:
        if session.is_server:
            # It has ended cleanly, or has said why not. The interpreter takes a moment more, in which a
            # signal would make it look killed.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
    raise AssertionError("click exits by itself")


def _show_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("fcluster")
    except PackageNotFoundError:
        number = "(not installed)"
    click.echo(f"fcluster {number}")
    context.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version.",
)
def commands() -> None:
    """Run sharded, stateful Python jobs over Kafka, exactly once.

    \b
    Try it:
      fcluster kafka start
      fcluster produce flights --partitions 4 --key-field carrier < flights.jsonl
      fcluster up flights.py

    Settings come from the job, then fcluster.toml, then the environment (FCLUSTER_COMMIT_INTERVAL_MS=50),
    then options; later ones win.
    """


for _command in (
    *(jobs.new, jobs.check),
    *(running.up, running.coordinator, running.worker),
    *(operating.status, operating.drain, operating.scale, operating.reset),
    *(topics.consume, topics.produce),
    *(kafka.kafka, keys.keys),
):
    commands.add_command(_command)
