"""Commands that run an embedded Kafka: `kafka start`, `stop`, `kill`, `status`. Parsing only."""

from __future__ import annotations

from typing import Any

import click

from fcluster.cli.commands.options import common_options, data_dir_of, options_of, progress


@click.group()
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
@common_options
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
    data_dir = data_dir_of(context, options_of(**common))
    servers, wait = start_kafka(data_dir, foreground, progress, Brokers(nodes, node, settings))
    click.echo(servers)
    wait()


@kafka.command("stop")
@_node
@common_options
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
@common_options
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

    data_dir = data_dir_of(context, options_of(**common))
    ended = stop_kafka(data_dir, Brokers(only=node), hard=hard)
    click.echo(("killed" if hard else "stopped") if ended else "not running")


@kafka.command("status")
@common_options
@click.pass_context
def kafka_status(context: click.Context, **common: Any) -> None:
    """Show whether the brokers run, and their addresses. The exit code is 1 unless all of them run.

    \b
    Example:
      fcluster kafka status
    """
    from fcluster.cli.local_kafka import describe_kafka

    running, text = describe_kafka(data_dir_of(context, options_of(**common)))
    click.echo(text)
    context.exit(0 if running else 1)
