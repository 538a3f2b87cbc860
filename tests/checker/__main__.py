"""The checker by hand: `python -m tests.checker generate|check|ends --help`."""

from __future__ import annotations

import argparse
import sys

from tests.checker.check import check_no_open_transactions, check_regrouped, check_totals
from tests.checker.generate import create_topic, write_records
from tests.checker.reading import partitions_of
from tests.checker.records import generate_records


def main() -> int:
    """Run one command. Returns 0 if the verdict is good."""
    arguments = _parse()
    if arguments.command == "generate":
        if not partitions_of(arguments.brokers, arguments.source):
            create_topic(arguments.brokers, arguments.source, arguments.partitions)
        records = generate_records(arguments.count, keys=arguments.keys, seed=arguments.seed)
        print(f"{write_records(arguments.brokers, arguments.source, records)} records written")
        return 0
    if arguments.command == "ends":
        verdict = check_no_open_transactions(arguments.brokers, arguments.job, arguments.output)
    elif arguments.groups:
        verdict = check_regrouped(
            arguments.brokers, arguments.job, arguments.source, arguments.output, arguments.groups
        )
    else:
        verdict = check_totals(arguments.brokers, arguments.job, arguments.source, arguments.output)
    print(verdict.report())
    return 0 if verdict.ok else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.checker", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="write test records to a source topic")
    check = commands.add_parser("check", help="judge the output of a test job")
    ends = commands.add_parser("ends", help="look for transactions left open")
    for command in (generate, check, ends):
        command.add_argument("--brokers", required=True)
    for command in (generate, check):
        command.add_argument("--source", required=True)
    for command in (check, ends):
        command.add_argument("--job", required=True)
        command.add_argument("--output", required=True)
    generate.add_argument("--count", type=int, default=200_000)
    generate.add_argument("--keys", type=int, default=20_000)
    generate.add_argument("--partitions", type=int, default=8)
    generate.add_argument("--seed", type=int, default=1)
    check.add_argument("--groups", type=int, default=0, help="of the regrouping job; 0: the plain one")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
