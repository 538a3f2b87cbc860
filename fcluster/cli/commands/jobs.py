"""Commands for a job that needn't run: `new`, `check`. Parsing only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fcluster.cli.commands.options import common_options, debug_option, job_argument, options_of

if TYPE_CHECKING:
    from fcluster.cli.check import Form


@click.command()
@click.argument("directory", metavar="NAME", type=click.Path(path_type=Path))
@debug_option
def new(directory: Path) -> None:
    """Create a directory NAME with a job, its tests and a compose file for Kafka.

    The job, too, is called NAME. (With a path, the last part is its name.) Nothing is overwritten. The tests
    run as they are, and need pytest, but no Kafka.

    \b
    Example:
      fcluster new spending
      cd spending && python -m pytest
    """
    from fcluster.cli.scaffold import create_scaffold

    for line in create_scaffold(directory).describe():
        click.echo(line)


@click.command()
@job_argument
@click.option("--offline", is_flag=True, help="Check only the job, and ask no brokers.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "mermaid", "svg", "json"]),
    default="text",
    show_default=True,
    help="mermaid, svg: only a diagram of the job, in Mermaid's language or as an image; neither asks "
    "brokers.",
)
@common_options
@click.pass_context
def check(context: click.Context, target: str, offline: bool, form: Form, **common: Any) -> None:
    """Show what JOB does, and check whether it could start. Nothing is changed.

    It imports JOB and shows its topics, stages and steps, with the names that identify state. On the brokers
    it then checks what `fcluster up` would: topics and their partitions, rights, limits, what can lose data,
    and whether existing state and offsets still fit. JOB may be running.

    The exit code is 1 if something is wrong, and 0 if there are only warnings.

    \b
    Examples:
      fcluster check flights.py --brokers host:9092
      fcluster check flights.py --offline
      fcluster check flights.py --format mermaid > flights.mmd
      fcluster check flights.py --format svg > flights.svg
    """
    from fcluster.cli.check import CheckOptions, run_check

    options = options_of(**common)
    checked = CheckOptions(target, options.flags, options.config, options.log_level, offline, form)
    context.exit(run_check(checked, click.echo))
