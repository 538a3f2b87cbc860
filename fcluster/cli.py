"""The command `fcluster`: its options, its messages, its exit codes.

Responsible for: parsing, and for how every command ends. Keeps the rules that an error a user can repair is
two lines on stderr (what, and the remedy), that a traceback appears only with `--debug`, and that `--help`
imports nothing heavy: what does the work is imported inside the commands. Must not do the work itself.
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

if TYPE_CHECKING:
    from fcluster.common.topology import Isolation
    from fcluster.connection import Connection

EXIT_MISTAKE = 1
EXIT_JOB_FAILED = 3
EXIT_JOB_ENDED = 5
HANDLERS_END_S = 3.0
"""A worker whose work is done waits no longer for threads and processes of its handlers."""
EXIT_BUG = 70
EXIT_TEMPORARY = 75
EXIT_INTERRUPTED = 130
LOG_LEVELS = ("debug", "info", "warning", "error")
ISOLATIONS = ("read-committed", "read-uncommitted")

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass
class Session:
    """One run of the command: what the reporting of errors needs to know of it."""

    debug: bool = False
    data_dir: Path | None = None
    is_server: bool = False
    """A coordinator or worker: its stderr is its log."""


@dataclass(frozen=True)
class CommonOptions:
    """Options that all commands share; `flags` are settings by name, as given."""

    flags: dict[str, str] = field(default_factory=dict[str, str])
    config: Path | None = None
    log_level: str = "info"


class Commands(click.Group):
    """A group that ends every error in a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        session = ctx.ensure_object(Session)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except FclusterError as error:
            if session.debug:
                traceback.print_exc()
            report(error.message, error.remedy)
            retriable = session.is_server and isinstance(error, KafkaUnavailable)
            ctx.exit(EXIT_TEMPORARY if retriable else error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            _forget_stdout()
            ctx.exit(0)
        except Exception as error:  # noqa: BLE001
            _report_bug(session, error)
            ctx.exit(EXIT_BUG)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command with `arguments` (default: those of the process), then exit."""
    commands.main(args=None if arguments is None else list(arguments), prog_name="fcluster", obj=Session())
    raise AssertionError("click exits by itself")


def report(message: str, remedy: str = "") -> None:
    """Print an error as every command does, and as `supervisor.reported_error` reads it."""
    click.echo(f"error: {message}", err=True)
    if remedy:
        click.echo(f"remedy: {remedy}", err=True)


def _report_bug(session: Session, error: Exception) -> None:
    details = traceback.format_exc()
    if session.debug or session.is_server:
        click.echo(details, err=True, nl=False)
        where = "the traceback above"
    else:
        where = f"the traceback in {_keep_traceback(session, details)}"
    summary = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    report(f"this is a bug in fcluster: {summary}", f"Please report it with {where}.")


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
    """Nobody reads stdout any more: keep the interpreter from complaining about it at exit."""
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
    """Options of every command; it gets them as `common`."""
    decorators = (
        click.option("--brokers", metavar="HOST:PORT,...", help="Kafka brokers (setting bootstrap.servers)."),
        click.option(
            "--data-dir",
            metavar="DIR",
            type=click.Path(file_okay=False),
            help="Local state, logs, embedded Kafka (setting state.dir).  [default: .fcluster]",
        ),
        click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Settings file.  [default: fcluster.toml, if there is one]",
        ),
        click.option(
            "--set",
            "settings",
            metavar="NAME=VALUE",
            multiple=True,
            callback=_read_settings,
            help="Any setting, by its name; may be given often.",
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
            help="Allow control connections beyond this host without keys, in a trusted network.",
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
    help="Finish when everything that was in the sources at start is committed.",
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
    """The given options as settings; `--set` loses against an option of its own for the same setting."""
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
    from fcluster.connection import Connection
    from fcluster.groundwork import start_logging

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
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show it."
)
def commands() -> None:
    """Run sharded, stateful Python jobs over Kafka, exactly once.

    \b
    Try it:
      fcluster kafka start
      fcluster produce flights --partitions 4 --key-field carrier < flights.jsonl
      fcluster up flights.py

    Settings come from the job, then fcluster.toml, then the environment (FCLUSTER_COMMIT_INTERVAL_MS=50),
    then options.
    """


# --- up --------------------------------------------------------------------------------------------


@commands.command()
@_job_argument
@click.option("--workers", metavar="N", type=click.IntRange(1), help="Worker processes.  [default: 4]")
@_snapshots_option
@_caught_up_option
@click.option("--plain", is_flag=True, help="Plain log lines, on a terminal too.")
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
    """Run JOB on this machine: Kafka if no brokers are given, a coordinator, and workers.

    JOB is a file (flights.py), a job in it (flights.py:job) or in a module (package.module:job). Ctrl-C
    commits the last epoch and ends; a second one kills. Either way nothing is lost.

    \b
    Examples:
      fcluster up flights.py
      fcluster up flights.py --brokers host:9092 --workers 4 --data-dir ./state --snapshots ./snapshots
      fcluster up flights.py --until-caught-up --set commit.interval.ms=100
    """
    from fcluster.up import UpOptions, run_up

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
@click.option("--json", "as_json", is_flag=True, help="Print the coordinator's document as it is.")
@click.option("--job", metavar="NAME", help="The job's name, if it doesn't run in the data directory.")
@_common
@click.pass_context
def status(context: click.Context, as_json: bool, job: str | None, **common: Any) -> None:
    """Show coordinator, workers, shards, epoch, lag, rates and commit latency.

    In a directory where `fcluster up` runs, no option is needed.

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
        from fcluster.live_view import print_status

        print_status(document)


# --- changing a running cluster ----------------------------------------------------------------------


_job_option = click.option(
    "--job", metavar="NAME", help="The job's name, if it doesn't run in the data directory."
)
_no_wait_option = click.option("--no-wait", is_flag=True, help="Return once it is under way.")


def _timeout_option(default_s: float) -> Callable[[_Command], _Command]:
    return click.option(
        "--timeout",
        "timeout_s",
        metavar="SECONDS",
        type=click.FloatRange(0, min_open=True),
        default=default_s,
        show_default=True,
        help="Wait no longer; then it is an error.",
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
    """Let one worker leave for good; its shards move to the others first, warm.

    WORKER is its slot, its id, or HOST:PID, as `fcluster status` shows them. It isn't started again by
    `fcluster up` or an agent, which has one worker less from then on.

    \b
    Examples:
      fcluster drain 3
      fcluster drain host2:4711 --brokers host:9092 --job carrier-delays
    """
    from fcluster.connection import AdminLine
    from fcluster.operations import drain as run_drain

    with AdminLine(_connection(context, _options(**common)), job) as line:
        run_drain(line, worker, wait=not no_wait, timeout_s=timeout_s, say=click.echo)


def _read_wanted(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> tuple[int, dict[str, int]]:
    """A total, -1 if there is none, and a number for each place."""
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
    """Have N workers, spread evenly over all agents, or N on each HOST that is named.

    Agents are `fcluster up` and `fcluster worker JOB --workers N`; `fcluster status` lists them. Several on
    one host are told apart as HOST:PID. A worker too many leaves after its shards have moved, warm.

    \b
    Examples:
      fcluster scale 8
      fcluster scale host1=4 host2=2 --brokers host:9092 --job carrier-delays
    """
    from fcluster.connection import AdminLine
    from fcluster.operations import scale as run_scale

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
@click.option("--keep-state", is_flag=True, help="Move only the offsets; the state stays as it is.")
@click.option("--dry-run", is_flag=True, help="Show what would be changed, and change nothing.")
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
    """Put JOB, which must not run, back to given offsets of its sources, with empty state.

    Its changelogs and repartition topics, its snapshots and its local state are deleted, its offsets set;
    what goes is shown before. Sources and output topics stay as they are. When it is broken off, the job
    doesn't start until it was run again. FILE has a line TOPIC/PARTITION=OFFSET for each partition.

    \b
    Examples:
      fcluster reset flights.py --to earliest --dry-run
      fcluster reset flights.py --to earliest
      fcluster reset flights.py --to time:2026-01-31T12:00:00+01:00 --yes
      fcluster reset flights.py --to latest --keep-state
      fcluster reset flights.py --to flights/0=4711 --to flights/1=0
    """
    from fcluster.groundwork import load, start_logging
    from fcluster.reset import carry_out, plan_reset
    from fcluster.reset_target import parse_target

    options = _options(**common, snapshots=snapshots)
    where = parse_target(to)
    start_logging(options.log_level)
    job, settings = load(target, options.flags, options.config, os.environ)
    topology = job.build(settings)
    plan = plan_reset(settings, topology, where, keep_state=keep_state)
    for line in plan.describe():
        click.echo(line)
    if dry_run:
        click.echo("nothing is changed (--dry-run)")
        return
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("nothing is changed: there is nobody to be asked; add --yes")
    if not yes and not click.confirm("Do it?"):
        click.echo("nothing is changed")
        context.exit(EXIT_MISTAKE)
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
    help="read-uncommitted shows records before their epoch is committed, and those of aborted ones.",
)
@click.option("--from-beginning", is_flag=True, help="Start with the oldest record, not with the next one.")
@click.option("--max", "count_max", metavar="N", type=click.IntRange(0), help="End after N records.")
@click.option("--headers", is_flag=True, help="Show the records' headers too.")
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
    """Print the records of TOPIC, one JSON object a line, until Ctrl-C.

    Each line has topic, partition, offset, timestamp (ms), key and value. A value that isn't JSON is
    printed as text; one that isn't text as base64, and "value_encoding" says so. A record without a value has
    "tombstone"; a dead letter has its origin and reason in "dead_letter". No group is joined, nothing is
    committed.

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
@click.option("--key-field", metavar="FIELD", help="The field whose value is the record's key.")
@click.option(
    "--partitions", metavar="N", type=click.IntRange(1), help="Create the topic, if it isn't there."
)
@click.option("--skip-errors", is_flag=True, help="Leave out lines that can't be sent, and name them.")
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
    """Send each line of stdin, a JSON value, as one record to TOPIC.

    A line that isn't JSON, or lacks the key field, ends the command: what was before it is sent, nothing
    after it. So does a line that Kafka refuses; some of what is after that may be sent as well. Records go to
    the partitions that Java clients would choose (murmur2).

    \b
    Examples:
      fcluster produce flights --key-field carrier < flights.jsonl
      echo '{"carrier": "UA"}' | fcluster produce flights --partitions 4
    """
    connection = _connection(context, _options(**common))
    if sys.stdin.isatty():
        click.echo("One JSON value a line; Ctrl-D ends.", err=True)
    sent, partition_count = connection.produce(
        topic, sys.stdin.buffer, key_field=key_field, partitions=partitions, skip_errors=skip_errors
    )
    from fcluster.console_clients import records

    skipped = f", skipped {sent.skipped} lines" if sent.skipped else ""
    click.echo(f"sent {records(sent.count)} to {topic!r}, {partition_count} partitions{skipped}", err=True)


# --- kafka -----------------------------------------------------------------------------------------


@commands.group()
def kafka() -> None:
    """The embedded Kafka of a data directory: one broker, or several for trying their failures.

    \b
    Examples:
      fcluster kafka start
      fcluster kafka start --nodes 3
      fcluster kafka kill --node 2
      fcluster kafka start --node 2
      fcluster kafka status --data-dir ./state
      fcluster kafka stop
    """


_node = click.option("--node", type=int, default=0, metavar="N", help="Only this broker of several.")


@kafka.command("start")
@click.option(
    "--nodes",
    type=int,
    default=0,
    metavar="N",
    help="How many brokers, an odd number.  [default: as many as there are, 1 in a new data directory]",
)
@_node
@click.option(
    "--broker-config",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of Kafka's, for all brokers of several, kept for later starts; may be given again.",
)
@click.option("--foreground", is_flag=True, help="Stay until Ctrl-C, and stop the brokers then.")
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
    """Start the broker or brokers, and leave them running after this command.

    Commands with the same data directory find them by themselves. Three brokers keep three replicas of
    each topic, so any one of them may die; each takes up to 256 MB of heap.

    \b
    Examples:
      fcluster kafka start --data-dir ./state
      fcluster kafka start --nodes 3
      fcluster kafka start --node 2
    """
    from fcluster.local_kafka import Brokers, start_kafka

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
    """Stop what `fcluster kafka start` left running. Its data stays.

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
    """End it as a crash would (kill -9), to try what happens then. Its data stays.

    Don't kill two of three brokers at the same time: docs/kafka.md says what Kafka itself may lose by it.

    \b
    Example:
      fcluster kafka kill --node 2
    """
    _end_kafka(context, node, hard=True, **common)


def _end_kafka(context: click.Context, node: int, *, hard: bool, **common: Any) -> None:
    from fcluster.local_kafka import Brokers, stop_kafka

    data_dir = _data_dir(context, _options(**common))
    ended = stop_kafka(data_dir, Brokers(only=node), hard=hard)
    click.echo(("killed" if hard else "stopped") if ended else "not running")


@kafka.command("status")
@_common
@click.pass_context
def kafka_status(context: click.Context, **common: Any) -> None:
    """Say whether the brokers run, and where; exit code 1 unless all of them do.

    \b
    Example:
      fcluster kafka status
    """
    from fcluster.local_kafka import describe_kafka

    running, text = describe_kafka(_data_dir(context, _options(**common)))
    click.echo(text)
    context.exit(0 if running else 1)


def _data_dir(context: click.Context, options: CommonOptions) -> Path:
    from fcluster.groundwork import data_directory

    path = data_directory(options.flags, options.config, os.environ)
    context.ensure_object(Session).data_dir = path
    return path


def _progress(text: str) -> None:
    click.echo(text, err=True)


# --- keys ------------------------------------------------------------------------------------------


@commands.group()
def keys() -> None:
    """The keys without which nobody takes part, once a cluster spans hosts.

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
    """Make key pairs for coordinator, worker and admin in DIRECTORY; nothing is overwritten.

    Coordinators need all of it; workers need worker.key and coordinator.pub; whoever runs `fcluster status`
    and the like needs admin.key and coordinator.pub.
    """
    from fcluster.common.keys import create_keys

    for role, public_key in create_keys(directory).items():
        click.echo(f"{role:12} {public_key.decode()}")


@keys.command("add")
@_keys_argument
@click.argument("role", type=click.Choice(["worker", "admin"]))
@click.argument("name")
@_debug_option
def keys_add(directory: Path, role: str, name: str) -> None:
    """Make a further key pair in DIRECTORY, which can be taken back by itself.

    The coordinator allows it within a second. Copy ROLE-NAME.key to the other host's keys directory as
    ROLE.key. To take it back, remove ROLE-NAME.pub and restart the coordinator.
    """
    from fcluster.common.keys import Role, add_key

    click.echo(f"{role}-{name} {add_key(directory, Role(role), name).decode()}")


@keys.command("show")
@_keys_argument
@_debug_option
def keys_show(directory: Path) -> None:
    """List the keys in DIRECTORY by their public halves, and check them."""
    from fcluster.common.keys import describe_keys

    for row in describe_keys(directory):
        click.echo(f"{row['name']:20} {row['public']}  {row['here']}")


# --- the parts by hand -----------------------------------------------------------------------------


@commands.command()
@_job_argument
@click.option("--workers", metavar="N", type=click.IntRange(1), help="Workers to expect.  [default: 4]")
@_snapshots_option
@_caught_up_option
@click.option("--bind", metavar="tcp://HOST:PORT", help="Where to listen (setting coordinator.bind).")
@click.option("--no-standby", is_flag=True, help="End with an error if another coordinator leads JOB.")
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
    """Run JOB's coordinator. Its workers find it through Kafka.

    Started again, on this host or another one, it stands by and takes over when the one that leads dies or
    hangs. Ctrl-C at the one that leads drains and ends the job, and its standbys with it. SIGTERM makes it
    hand over to a standby, so that the job goes on; only without a standby the job ends. At a standby both
    end only that.

    \b
    Examples:
      fcluster coordinator flights.py --brokers host:9092 --workers 2
      fcluster coordinator flights.py --brokers host:9092 --workers 2    # once more: a standby
    """
    context.ensure_object(Session).is_server = True
    options = _options(**common, workers=workers, snapshots=snapshots, bind=bind)
    from fcluster.groundwork import load, start_logging

    start_logging(options.log_level)
    job, settings = load(target, options.flags, options.config, os.environ)
    from fcluster.coordinator.server import run_coordinator

    code = run_coordinator(
        job,
        settings,
        expected_workers=settings.workers,
        until_caught_up=until_caught_up,
        stand_by=not no_standby,
        ready_file=ready_file,
    )
    if code == EXIT_JOB_FAILED:
        from fcluster.groundwork import job_failure

        report(*job_failure())
    context.exit(code)


@commands.command()
@_job_argument
@_snapshots_option
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(1),
    help="Be an agent: run N workers on this host, and as many as `fcluster scale` says later.",
)
@click.option(
    "--slot", metavar="N", type=click.IntRange(-1), default=-1, help="The slot to take.  [default: any]"
)
@click.option(
    "--coordinator",
    "address",
    metavar="tcp://HOST:PORT",
    help="Where the coordinator is.  [default: Kafka says]",
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

    On SIGTERM or Ctrl-C its shards move to other workers first, warm, then it ends (exit code 0); a second
    one makes it commit and go. After `fcluster drain` the exit code is 4: don't start it again.

    With --workers it starts workers as processes of their own, starts again what dies, and ends with the job.

    \b
    Examples:
      fcluster worker flights.py --brokers host:9092
      fcluster worker flights.py --brokers host:9092 --workers 8
    """
    if workers is not None and slot >= 0:
        raise click.UsageError("--slot is for one worker, --workers for several")
    context.ensure_object(Session).is_server = True
    options = _options(**common, snapshots=snapshots)
    from fcluster.groundwork import load, start_logging
    from fcluster.run_agent import AgentOptions, run_agent

    start_logging(options.log_level)
    if workers is not None:
        agent = AgentOptions(target, options.flags, options.config, options.log_level, workers, address or "")
        context.exit(run_agent(agent))
    from fcluster.worker import handler_processes

    handler_processes.prepare()
    job, settings = load(target, options.flags, options.config, os.environ)
    from fcluster.worker.server import run_worker

    address = address or settings.coordinator_address
    code = run_worker(job, settings, slot=slot, coordinator_address=address)
    if code == EXIT_MISTAKE:
        from fcluster.groundwork import worker_failure

        report(*worker_failure())
    if code == EXIT_JOB_ENDED and not kept:
        code = 0  # who keeps the worker has to tell that from a request to leave; for others it is success
    handler_processes.leave_within(HANDLERS_END_S, code)
    context.exit(code)
