"""Commands that read and write topics: `consume`, `produce`. Parsing only."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from fcluster.cli.commands.options import common_options, connection_of, options_of

if TYPE_CHECKING:
    from fcluster.common.isolation import Isolation

ISOLATIONS = ("read-committed", "read-uncommitted")


@click.command()
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
@common_options
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
    options = options_of(**common)
    connection = connection_of(context, options)
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


@click.command()
@click.argument("topic")
@click.option("--key-field", metavar="FIELD", help="The field of the value that becomes the record's key.")
@click.option(
    "--partitions",
    metavar="N",
    type=click.IntRange(1),
    help="Create the topic with N partitions if it doesn't exist.",
)
@click.option("--skip-errors", is_flag=True, help="Skip lines that can't be sent, and list them.")
@common_options
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
    connection = connection_of(context, options_of(**common))
    if sys.stdin.isatty():
        click.echo("Enter one JSON value per line; Ctrl-D ends the input.", err=True)
    sent, partition_count = connection.produce(
        topic, sys.stdin.buffer, key_field=key_field, partitions=partitions, skip_errors=skip_errors
    )
    from fcluster.cli.console_clients import records

    skipped = f", skipped {sent.skipped} lines" if sent.skipped else ""
    click.echo(f"sent {records(sent.count)} to {topic!r}, {partition_count} partitions{skipped}", err=True)
