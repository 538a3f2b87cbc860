"""Commands for a job that needn't run: `new`. Parsing only."""

from __future__ import annotations

from pathlib import Path

import click

from fcluster.cli.commands.options import debug_option


@click.command()
@click.argument("directory", metavar="NAME", type=click.Path(path_type=Path))
@debug_option
def new(directory: Path) -> None:
    """Create a directory NAME with a job, its tests and a compose file for Kafka.

    The job, too, is called NAME. (With a path, the last part is its name.) Nothing is overwritten. The tests
    run as they are, and need no Kafka.

    \b
    Example:
      fcluster new spending
      cd spending && python -m pytest
    """
    from fcluster.cli.scaffold import create_scaffold

    for line in create_scaffold(directory).describe():
        click.echo(line)
