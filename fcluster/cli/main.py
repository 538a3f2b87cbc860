"""The command `fcluster`: its options, its messages, its exit codes.

Responsible for: parsing, and how every command ends. It keeps these rules: an error that a user can fix is
two lines on stderr (what happened, and the remedy); a traceback is shown only with `--debug`; and `--help`
imports nothing heavy, so the modules that do the work are imported inside the commands. Must not do the work
itself.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from fcluster.common.errors import FclusterError, KafkaUnavailable
from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Failure, FailureKind
from fcluster.host.failure_file import take_from_environment

if TYPE_CHECKING:
    from fcluster.cli.connection import Connection
    from fcluster.common.isolation import Isolation

HANDLERS_END_S = 3.0
"""How long a worker that is done waits for threads and processes of its handlers."""
LOG_LEVELS = ("debug", "info", "warning", "error")
ISOLATIONS = ("read-committed", "read-uncommitted")

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass
class Session:
    """One run of the command: what error reporting needs to know about it."""

    debug: bool = False
    data_dir: Path | None = None
    is_server: bool = False
    """A coordinator or worker: its stderr is its log."""
    failure_file: Path | None = field(default_factory=take_from_environment)
    """Where the process that keeps this one running wants to be told why it failed."""


@dataclass(frozen=True)
class CommonOptions:
    """Options that all commands share; `flags` maps setting names to values as given."""

    flags: dict[str, str] = field(default_factory=dict[str, str])
    config: Path | None = None
    log_level: str = "info"


class Commands(click.Group):
    """A group that turns every error into a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        session = ctx.ensure_object(Session)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except FclusterError as error:
            if session.debug:
                traceback.print_exc()
            report(session, Failure(error.kind, error.message, error.remedy, error.where))
            retriable = session.is_server and isinstance(error, KafkaUnavailable)
            ctx.exit(ExitCode.TEMPORARY if retriable else error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(ExitCode.INTERRUPTED)
        except BrokenPipeError:
            _forget_stdout()
            ctx.exit(0)
        except Exception as error:  # noqa: BLE001
            _report_bug(session, error)
            ctx.exit(ExitCode.CRASHED)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command with `arguments` (default: the process's own), then exit."""
    commands.main(args=None if arguments is None else list(arguments), prog_name="fcluster", obj=Session())
    raise AssertionError("click exits by itself")


def report(session: Session, failure: Failure) -> None:
    """Print an error the way all commands do, and tell it to the process that keeps this one running."""
    click.echo(f"error: {failure.message}", err=True)
    if failure.remedy:
        click.echo(f"remedy: {failure.remedy}", err=True)
    tell_keeper(session, failure)


def tell_keeper(session: Session, failure: Failure) -> None:
    """Hand the failure to the process that keeps this one running, if there is one."""
    if session.failure_file is not None:
        from fcluster.host.failure_file import write_failure

        write_failure(session.failure_file, failure)


def _report_bug(session: Session, error: Exception) -> None:
    details = traceback.format_exc()
    if session.debug or session.is_server:
        click.echo(details, err=True, nl=False)
        where = "the traceback above"
    else:
        where = f"the traceback in {_keep_traceback(session, details)}"
    summary = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    message = f"this is a bug in fcluster: {summary}"
    report(session, Failure(FailureKind.BUG, message, f"Please report it with {where}."))


def _keep_traceback(session: Session, details: str) -> Path:
    import tempfile

    logs = session.data_dir / "logs" if session.data_dir is not None else None
    directory = logs if logs is not None and logs.is_dir() else Path(tempfile.gettempdir())
    path = directory / f"fcluster-crash-{os.getpid()}.log"
    try:
        path.write_text(details, encoding="utf-8")
    except OSError:
        click.echo(details, err=True, nl=False)
        return Path("stderr")
    return path


def _forget_stdout() -> None:
    """Redirect a closed stdout, so that the interpreter doesn't complain about it at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    finally:
        os.close(devnull)


# --- options ---------------------------------------------------------------------------------------


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


_debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_note_debug,
    help="Show tracebacks with errors.",
)


def _common(command: _Command) -> _Command:
    """Add the options that every command has; the command gets them as `common`."""
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
        _debug_option,
    )
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


_job_argument = click.argument("target", metavar="JOB")
_snapshots_option = click.option(
    "--snapshots", metavar="DIR|URL", help="Snapshot store.  [default: snapshots in the data directory]"
)
_caught_up_option = click.option(
    "--until-caught-up",
    is_flag=True,
    help="Finish once all records that were in the sources at start are processed and committed.",
)


def _options(
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
    """The given options as settings; an option of its own overrides `--set` for the same setting."""
    from fcluster.common.settings import default_toml, handed_flags, is_secret

    for name, value in settings.items():
        if is_secret(name, value):
            variable = "FCLUSTER_" + re.sub(r"[^A-Za-z0-9]", "_", name).upper()
            _progress(
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


def _connection(context: click.Context, options: CommonOptions) -> Connection:
    from fcluster.cli.connection import Connection
    from fcluster.cli.startup import start_logging

    start_logging(options.log_level)
    connection = Connection.find(options.flags, options.config, os.environ)
    context.ensure_object(Session).data_dir = connection.data_dir
    return connection


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


# --- up --------------------------------------------------------------------------------------------


@commands.command()
@_job_argument
@click.option("--workers", metavar="N", type=click.IntRange(1), help="Worker processes.  [default: 4]")
@_snapshots_option
@_caught_up_option
@click.option("--plain", is_flag=True, help="Print plain log lines instead of the live view.")
@_common
@click.pass_context
def up(
    context: click.Context,
    target: str,
    workers: int | None,
    snapshots: str | None,
    until_caught_up: bool,
    plain: bool,
    **common: Any,
) -> None:
    """Run JOB on this machine.

    This starts a coordinator, workers, and an embedded Kafka if no brokers are given.

    JOB is a file (flights.py), or a job in a file (flights.py:job) or module (package.module:job). Ctrl-C
    commits the last epoch and exits; a second Ctrl-C kills all processes. Nothing is lost either way.

    \b
    Examples:
      fcluster up flights.py
      fcluster up flights.py --brokers host:9092 --workers 4 --data-dir ./state --snapshots ./snapshots
      fcluster up flights.py --until-caught-up --set commit.interval.ms=100
    """
    from fcluster.cli.up import UpOptions, run_up

    options = _options(**common, workers=workers, snapshots=snapshots)
    session = context.ensure_object(Session)

    def on_data_dir(data_dir: Path) -> None:
        session.data_dir = data_dir

    up_options = UpOptions(
        target=target,
        flags=options.flags,
        config=options.config,
        log_level=options.log_level,
        until_caught_up=until_caught_up,
        live=not plain and sys.stdout.isatty(),
        on_data_dir=on_data_dir,
    )
    context.exit(run_up(up_options))


# --- status ----------------------------------------------------------------------------------------


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="Print the coordinator's status document as JSON.")
@click.option("--job", metavar="NAME", help="The job's name, if it wasn't started from the data directory.")
@_common
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
    document = _connection(context, _options(**common)).status(job)
    if as_json:
        import orjson

        click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    else:
        from fcluster.cli.live_view import print_status

        print_status(document)


# --- changing a running cluster ----------------------------------------------------------------------


_job_option = click.option(
    "--job", metavar="NAME", help="The job's name, if it wasn't started from the data directory."
)
_no_wait_option = click.option("--no-wait", is_flag=True, help="Return once the change has begun.")


def _timeout_option(default_s: float) -> Callable[[_Command], _Command]:
    return click.option(
        "--timeout",
        "timeout_s",
        metavar="SECONDS",
        type=click.FloatRange(0, min_open=True),
        default=default_s,
        show_default=True,
        help="How long to wait for the change; after that, exit with an error.",
    )


@commands.command()
@click.argument("worker")
@_job_option
@_no_wait_option
@_timeout_option(120)
@_common
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

    with AdminLine(_connection(context, _options(**common)), job) as line:
        run_drain(line, worker, wait=not no_wait, timeout_s=timeout_s, say=click.echo)


def _read_wanted(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> tuple[int, dict[str, int]]:
    """The total (-1 if none was given), and a number for each place."""
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


@commands.command()
@click.argument("wanted", metavar="N | HOST=N...", nargs=-1, required=True, callback=_read_wanted)
@_job_option
@_no_wait_option
@_timeout_option(120)
@_common
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
    with AdminLine(_connection(context, _options(**common)), job) as line:
        run_scale(line, total, places, wait=not no_wait, timeout_s=timeout_s, say=click.echo)


@commands.command()
@_job_argument
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
@_snapshots_option
@_common
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
    from fcluster.cli.reset_target import parse_target
    from fcluster.cli.startup import load, start_logging

    options = _options(**common, snapshots=snapshots)
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
    carry_out(plan, settings, topology, _progress)
    click.echo("done")


# --- consume, produce ------------------------------------------------------------------------------


@commands.command()
@click.argument("topic")
@click.option(
    "--isolation",
    type=click.Choice(ISOLATIONS),
    default="read-committed",
    show_default=True,
    help="read-uncommitted also shows records of epochs that aren't committed yet, and of aborted epochs.",
)
@click.option("--from-beginning", is_flag=True, help="Start with the oldest record instead of the next one.")
@click.option("--max", "count_max", metavar="N", type=click.IntRange(0), help="Stop after N records.")
@click.option("--headers", is_flag=True, help="Show the headers of each record too.")
@_common
@click.pass_context
def consume(
    context: click.Context,
    topic: str,
    isolation: Isolation,
    from_beginning: bool,
    count_max: int | None,
    headers: bool,
    **common: Any,
) -> None:
    """Print the records of TOPIC as JSON.

    It prints one JSON object per line, until Ctrl-C. Each line has topic, partition, offset, timestamp
    (ms), key and value. A value that isn't JSON is printed as text. A value that isn't text is printed as
    base64, and marked with "value_encoding". A record without a value has "tombstone"; a dead letter has
    its origin and reason in "dead_letter". The command joins no consumer group and commits nothing.

    \b
    Examples:
      fcluster consume carrier-totals --from-beginning --max 10
      fcluster consume carrier-totals --isolation read-uncommitted | jq .value
      fcluster consume refused --from-beginning --headers
    """
    options = _options(**common)
    connection = _connection(context, options)
    try:
        connection.consume(
            topic,
            sys.stdout.buffer,
            isolation=isolation,
            from_beginning=from_beginning,
            count_max=count_max,
            headers=headers,
        )
    except KeyboardInterrupt:
        context.exit(0)


@commands.command()
@click.argument("topic")
@click.option("--key-field", metavar="FIELD", help="The field of the value that becomes the record's key.")
@click.option(
    "--partitions",
    metavar="N",
    type=click.IntRange(1),
    help="Create the topic with N partitions if it doesn't exist.",
)
@click.option("--skip-errors", is_flag=True, help="Skip lines that can't be sent, and list them.")
@_common
@click.pass_context
def produce(
    context: click.Context,
    topic: str,
    key_field: str | None,
    partitions: int | None,
    skip_errors: bool,
    **common: Any,
) -> None:
    """Send lines of JSON from stdin to TOPIC.

    Each line, a JSON value, becomes one record. The command stops at a line that isn't JSON or lacks the
    key field; all lines before it are sent, and none after it. It also stops at a line that Kafka
    refuses; some lines after that one may be sent too. Records go to the partitions that Java clients
    would choose (murmur2).

    \b
    Examples:
      fcluster produce flights --key-field carrier < flights.jsonl
      echo '{"carrier": "UA"}' | fcluster produce flights --partitions 4
    """
    connection = _connection(context, _options(**common))
    if sys.stdin.isatty():
        click.echo("Enter one JSON value per line; Ctrl-D ends the input.", err=True)
    sent, partition_count = connection.produce(
        topic, sys.stdin.buffer, key_field=key_field, partitions=partitions, skip_errors=skip_errors
    )
    from fcluster.cli.console_clients import records

    skipped = f", skipped {sent.skipped} lines" if sent.skipped else ""
    click.echo(f"sent {records(sent.count)} to {topic!r}, {partition_count} partitions{skipped}", err=True)


# --- kafka -----------------------------------------------------------------------------------------


@commands.group()
def kafka() -> None:
    """Run an embedded Kafka for development.

    It belongs to a data directory, and has one broker, or several to try out broker failures.

    \b
    Examples:
      fcluster kafka start
      fcluster kafka start --nodes 3
      fcluster kafka kill --node 2
      fcluster kafka start --node 2
      fcluster kafka status --data-dir ./state
      fcluster kafka stop
    """


_node = click.option("--node", type=int, default=0, metavar="N", help="Only this one of several brokers.")


@kafka.command("start")
@click.option(
    "--nodes",
    type=int,
    default=0,
    metavar="N",
    help="Brokers, an odd number.  [default: as many as there are, 1 in a new data directory]",
)
@_node
@click.option(
    "--broker-config",
    multiple=True,
    metavar="NAME=VALUE",
    help="Kafka setting for all brokers (with --nodes), kept for later starts; may be repeated.",
)
@click.option("--foreground", is_flag=True, help="Run until Ctrl-C, then stop the brokers.")
@_common
@click.pass_context
def kafka_start(
    context: click.Context,
    nodes: int,
    node: int,
    broker_config: tuple[str, ...],
    foreground: bool,
    **common: Any,
) -> None:
    """Start the broker or brokers in the background.

    Other commands with the same data directory find them automatically. Three brokers keep three replicas of
    each topic, so any one of them may die. Each uses up to 256 MB of heap.

    \b
    Examples:
      fcluster kafka start --data-dir ./state
      fcluster kafka start --nodes 3
      fcluster kafka start --node 2
    """
    from fcluster.cli.local_kafka import Brokers, start_kafka

    settings = dict[str, str]()
    for item in broker_config:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{item!r} is not NAME=VALUE", param_hint="--broker-config")
        settings[name.strip()] = value.strip()
    data_dir = _data_dir(context, _options(**common))
    servers, wait = start_kafka(data_dir, foreground, _progress, Brokers(nodes, node, settings))
    click.echo(servers)
    wait()


@kafka.command("stop")
@_node
@_common
@click.pass_context
def kafka_stop(context: click.Context, node: int, **common: Any) -> None:
    """Stop the brokers that `fcluster kafka start` has started. Their data is kept.

    \b
    Examples:
      fcluster kafka stop
      fcluster kafka stop --node 2
    """
    _end_kafka(context, node, hard=False, **common)


@kafka.command("kill")
@_node
@_common
@click.pass_context
def kafka_kill(context: click.Context, node: int, **common: Any) -> None:
    """Kill the broker (kill -9), to try out a crash. Its data is kept.

    Don't kill two of three brokers at the same time: docs/kafka.md says what Kafka itself may lose then.

    \b
    Example:
      fcluster kafka kill --node 2
    """
    _end_kafka(context, node, hard=True, **common)


def _end_kafka(context: click.Context, node: int, *, hard: bool, **common: Any) -> None:
    from fcluster.cli.local_kafka import Brokers, stop_kafka

    data_dir = _data_dir(context, _options(**common))
    ended = stop_kafka(data_dir, Brokers(only=node), hard=hard)
    click.echo(("killed" if hard else "stopped") if ended else "not running")


@kafka.command("status")
@_common
@click.pass_context
def kafka_status(context: click.Context, **common: Any) -> None:
    """Show whether the brokers run, and their addresses. The exit code is 1 unless all of them run.

    \b
    Example:
      fcluster kafka status
    """
    from fcluster.cli.local_kafka import describe_kafka

    running, text = describe_kafka(_data_dir(context, _options(**common)))
    click.echo(text)
    context.exit(0 if running else 1)


def _data_dir(context: click.Context, options: CommonOptions) -> Path:
    from fcluster.cli.startup import data_directory

    path = data_directory(options.flags, options.config, os.environ)
    context.ensure_object(Session).data_dir = path
    return path


def _progress(text: str) -> None:
    click.echo(text, err=True)


# --- keys ------------------------------------------------------------------------------------------


@commands.group()
def keys() -> None:
    """Create and list keys of control connections.

    A cluster over several hosts needs them.

    \b
    Examples:
      fcluster keys new ./keys
      fcluster coordinator flights.py --brokers host:9092 --bind tcp://0.0.0.0:7070 --keys ./keys
      fcluster keys add ./keys worker host2
    """


_keys_argument = click.argument("directory", type=click.Path(file_okay=False, path_type=Path))


@keys.command("new")
@_keys_argument
@_debug_option
def keys_new(directory: Path) -> None:
    """Create key pairs for coordinator, worker and admin in DIRECTORY. Nothing is overwritten.

    Coordinators need all of the files. Workers need worker.key and coordinator.pub. Anyone who runs `fcluster
    status` and similar commands needs admin.key and coordinator.pub.
    """
    from fcluster.wire.keys import create_keys

    for role, public_key in create_keys(directory).items():
        click.echo(f"{role:12} {public_key.decode()}")


@keys.command("add")
@_keys_argument
@click.argument("role", type=click.Choice(["worker", "admin"]))
@click.argument("name")
@_debug_option
def keys_add(directory: Path, role: str, name: str) -> None:
    """Create another key pair in DIRECTORY, which can be revoked on its own.

    The coordinator accepts it within a second. Copy ROLE-NAME.key to the other host's keys directory as
    ROLE.key. To revoke it, remove ROLE-NAME.pub and restart the coordinator.
    """
    from fcluster.wire.keys import Role, add_key

    click.echo(f"{role}-{name} {add_key(directory, Role(role), name).decode()}")


@keys.command("show")
@_keys_argument
@_debug_option
def keys_show(directory: Path) -> None:
    """List the keys in DIRECTORY by their public keys, and check them."""
    from fcluster.wire.keys import describe_keys

    for row in describe_keys(directory):
        click.echo(f"{row['name']:20} {row['public']}  {row['here']}")


# --- the parts by hand -----------------------------------------------------------------------------


@commands.command()
@_job_argument
@click.option("--workers", metavar="N", type=click.IntRange(1), help="Expected workers.  [default: 4]")
@_snapshots_option
@_caught_up_option
@click.option("--bind", metavar="tcp://HOST:PORT", help="Where to listen (setting coordinator.bind).")
@click.option("--no-standby", is_flag=True, help="Exit with an error if another coordinator leads JOB.")
@click.option("--ready-file", type=click.Path(dir_okay=False, path_type=Path), hidden=True)
@_common
@click.pass_context
def coordinator(
    context: click.Context,
    target: str,
    workers: int | None,
    snapshots: str | None,
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
    options = _options(**common, workers=workers, snapshots=snapshots, bind=bind)
    from fcluster.cli.startup import load, start_logging

    start_logging(options.log_level)
    job, settings = load(target, options.flags, options.config, os.environ)
    from fcluster.coordinator.server import run_coordinator

    ended = run_coordinator(
        job,
        settings,
        expected_workers=settings.workers,
        until_caught_up=until_caught_up,
        stand_by=not no_standby,
        ready_file=ready_file,
    )
    if ended.exit_code == ExitCode.JOB_FAILED:
        from fcluster.cli.startup import job_failure

        report(context.ensure_object(Session), job_failure(ended.failure))
    context.exit(ended.exit_code)


@commands.command()
@_job_argument
@_snapshots_option
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
@_common
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
    options = _options(**common, snapshots=snapshots)
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
        # A failure of the job is the coordinator's to report.
        tell = tell_keeper if code == ExitCode.JOB_FAILED else report
        tell(context.ensure_object(Session), ended.failure)
    if code == ExitCode.JOB_ENDED and not kept:
        code = 0  # a supervisor has to tell this from a request to leave; for others it is success
    handler_processes.leave_within(HANDLERS_END_S, code)
    context.exit(code)
