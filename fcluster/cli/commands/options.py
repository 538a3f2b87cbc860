"""The options that commands share, and what they mean as settings.

Responsible for: parsing them the same way for all commands. It imports nothing heavy, because `--help` must
be fast.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fcluster.cli.ending import Session

if TYPE_CHECKING:
    from fcluster.cli.connection import Connection

LOG_LEVELS = ("debug", "info", "warning", "error")

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class CommonOptions:
    """Options that all commands share; `flags` maps setting names to values as given."""

    flags: dict[str, str] = field(default_factory=dict[str, str])
    config: Path | None = None
    log_level: str = "info"


def _read_settings(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, str]:
    flags: dict[str, str] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"{item!r} is not of the form name=value")
        flags[name.strip()] = value
    return flags


def _note_debug(context: click.Context, _parameter: click.Parameter, debug: bool) -> None:
    context.ensure_object(Session).debug = debug


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_note_debug,
    help="Show tracebacks with errors.",
)


def common_options(command: Command) -> Command:
    """Add the options that every command has; the command receives them as `common`."""
    decorators = (
        click.option("--brokers", metavar="HOST:PORT,...", help="Kafka brokers (setting bootstrap.servers)."),
        click.option(
            "--data-dir",
            metavar="DIR",
            type=click.Path(file_okay=False),
            help="Local state, logs and embedded Kafka (setting state.dir).  [default: .fcluster]",
        ),
        click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Settings file.  [default: fcluster.toml, if it exists]",
        ),
        click.option(
            "--set",
            "settings",
            metavar="NAME=VALUE",
            multiple=True,
            callback=_read_settings,
            help="Set any setting by name; may be repeated.",
        ),
        click.option(
            "--keys",
            metavar="DIR",
            type=click.Path(file_okay=False),
            help="Keys for control connections (setting security.keys.dir); see `fcluster keys`.",
        ),
        click.option(
            "--insecure",
            is_flag=True,
            help="Allow control connections beyond this host without keys, on a trusted network.",
        ),
        click.option("--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True),
        debug_option,
    )
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


job_argument = click.argument("target", metavar="JOB")
snapshots_option = click.option(
    "--snapshots", metavar="DIR|URL", help="Snapshot store.  [default: snapshots in the data directory]"
)
caught_up_option = click.option(
    "--until-caught-up",
    is_flag=True,
    help="Finish once all records that were in the sources at the start are processed and committed.",
)


start_option = click.option(
    "--start",
    metavar="WHERE",
    multiple=True,
    help="Where a job begins that hasn't run yet: earliest, latest, time:2026-01-31T12:00:00Z, offsets:FILE, "
    "or TOPIC/PARTITION=OFFSET for each.  [default: earliest]",
)
end_option = click.option(
    "--end",
    metavar="WHERE",
    multiple=True,
    help="Read up to there, close all windows, commit, and finish: end (where the topics end now), "
    "time:2026-01-31T12:00:00Z, offsets:FILE, or TOPIC/PARTITION=OFFSET for each.",
)


def options_of(
    brokers: str | None,
    data_dir: str | None,
    config: Path | None,
    settings: dict[str, str],
    log_level: str,
    workers: int | None = None,
    snapshots: str | None = None,
    bind: str | None = None,
    keys: str | None = None,
    insecure: bool = False,
) -> CommonOptions:
    """The given options as settings; a command-line option overrides `--set` for the same setting."""
    from fcluster.common.settings import default_toml, handed_flags, is_secret

    for name, value in settings.items():
        if is_secret(name, value):
            variable = "FCLUSTER_" + re.sub(r"[^A-Za-z0-9]", "_", name).upper()
            progress(
                f"warning: other users of this host can see {name} on the command line; put it into "
                f"fcluster.toml or the environment variable {variable}"
            )

    own = {
        "bootstrap.servers": brokers,
        "state.dir": data_dir,
        "workers": workers,
        "snapshots": snapshots,
        "coordinator.bind": bind,
        "security.keys.dir": keys,
        "insecure": "true" if insecure else None,
    }
    flags = (
        handed_flags(os.environ)
        | settings
        | {name: str(value) for name, value in own.items() if value is not None}
    )
    return CommonOptions(flags, config if config is not None else default_toml(Path.cwd()), log_level)


def connection_of(context: click.Context, options: CommonOptions) -> Connection:
    """The connection to the running cluster that the options name. Sets up the log."""
    from fcluster.cli.connection import Connection
    from fcluster.cli.startup import start_logging

    start_logging(options.log_level)
    connection = Connection.find(options.flags, options.config, os.environ)
    context.ensure_object(Session).data_dir = connection.data_dir
    return connection


def data_dir_of(context: click.Context, options: CommonOptions) -> Path:
    """The data directory that the options name."""
    from fcluster.cli.startup import data_directory

    path = data_directory(options.flags, options.config, os.environ)
    context.ensure_object(Session).data_dir = path
    return path


def progress(text: str) -> None:
    """Report the progress of a command. This isn't part of the command's output."""
    click.echo(text, err=True)
