"""Commands that create and list keys: `keys new`, `add`, `show`. Parsing only."""

from __future__ import annotations

from pathlib import Path

import click

from fcluster.cli.commands.options import debug_option


@click.group()
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
@debug_option
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
@debug_option
def keys_add(directory: Path, role: str, name: str) -> None:
    """Create another key pair in DIRECTORY, which can be revoked on its own.

    The coordinator accepts it within a second. Copy ROLE-NAME.key to the other host's keys directory as
    ROLE.key. To revoke it, remove ROLE-NAME.pub and restart the coordinator.
    """
    from fcluster.wire.keys import Role, add_key

    click.echo(f"{role}-{name} {add_key(directory, Role(role), name).decode()}")


@keys.command("show")
@_keys_argument
@debug_option
def keys_show(directory: Path) -> None:
    """List the keys in DIRECTORY by their public keys, and check them."""
    from fcluster.wire.keys import describe_keys

    for row in describe_keys(directory):
        click.echo(f"{row['name']:20} {row['public']}  {row['here']}")
