"""`python -m tests.simulation`: play many seeds on all cores, one seed in full, or look for a seed that
catches a bug.

python -m tests.simulation --seeds 2000                  numbers 0 to 1999
python -m tests.simulation --seeds 1000 --seed 50000     numbers 50000 to 50999
python -m tests.simulation --seed 7 --verbose            one run, with its transcript
python -m tests.simulation --find "no fence"             which seeds catch this planted bug

Most numbers are played as they are. To the others, `jobs.seeds` adds millions, so that they play another job.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator

from tests.simulation.job_mix import SEEDS_OF_A_JOB, seeds
from tests.simulation.mutations import BY_NAME, Mutation
from tests.simulation.run import Result, catches, run

PROGRESS_INTERVAL_S = 15
FINDINGS_SHOWN_MAX = 20
FINDINGS_OF_A_MUTATION_MAX = 5
_CHUNK = 20


def replay_command(seed: int, mutation: Mutation | None = None) -> str:
    """The command that plays a seed again, and shows what happened."""
    planted = f' --mutation "{mutation.name}"' if mutation else ""
    return f"python -m tests.simulation --seed {seed}{planted} --verbose"


def play(first: int, count: int, processes: int | None = None) -> Iterator[Result]:
    """Play this many seeds (see `jobs.seeds`), on all cores."""
    # Spawned, not forked: a forked child of a process with threads (of a Kafka client) may hang.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(run, seeds(first, count), _CHUNK)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 if all was well, 1 if a seed failed."""
    parser = argparse.ArgumentParser("python -m tests.simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="how many to play")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first, or the only one")
    parser.add_argument("--verbose", action="store_true", help="show the transcript")
    parser.add_argument("--mutation", default="", metavar="NAME", help="plant this bug")
    parser.add_argument(
        "--find", default="", metavar="NAME", help="look for seeds that catch this planted bug"
    )
    parser.add_argument("--processes", type=int, default=None, metavar="P", help="default: one for each core")
    options = parser.parse_args(arguments)
    for name in (options.mutation, options.find):
        if name and name not in BY_NAME:
            parser.error(f"no planted bug is called {name!r}; there are:\n  " + "\n  ".join(BY_NAME))
    if options.find:
        mutation = BY_NAME[options.find]
        first = options.seed or mutation.seed // SEEDS_OF_A_JOB * SEEDS_OF_A_JOB
        return _find(mutation, first, options.seeds or 5000)
    if options.seeds:
        return _play_many(options.seed, options.seeds, options.processes)
    return _play_one(options.seed, BY_NAME.get(options.mutation), verbose=options.verbose)


def _play_one(seed: int, mutation: Mutation | None, *, verbose: bool) -> int:
    result = run(seed, mutation=mutation, recording=verbose)
    for line in result.transcript:
        print(line)
    plan = result.plan
    print(
        f"seed {seed}: theme {plan.theme}, {plan.inputs} inputs, {result.commits} commits, "
        f"{result.virtual_ms} ms of virtual time, {result.events} events"
    )
    for fault, count in sorted(result.landed.items()):
        print(f"  {count:5d}  {fault}")
    print(result.failure or "all was well")
    return 1 if result.failure else 0


def _play_many(first: int, count: int, processes: int | None) -> int:
    began_s = time.monotonic()
    landed, themes, failed, commits = Counter[str](), Counter[str](), 0, 0
    told_s = began_s
    for played, result in enumerate(play(first, count, processes), 1):
        if time.monotonic() - told_s >= PROGRESS_INTERVAL_S:
            told_s = time.monotonic()
            print(
                f"{played} of {count} seeds, {failed} failed, {told_s - began_s:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        landed += result.landed
        themes[result.plan.theme] += 1
        commits += result.commits
        if result.failure:
            failed += 1
            if failed <= FINDINGS_SHOWN_MAX:
                print(f"seed {result.seed} ({result.plan.theme}): {result.failure}")
                print(f"  {replay_command(result.seed)}", flush=True)
    took_s = time.monotonic() - began_s
    print("how often each fault and some other events happened:")
    for fault, number in sorted(landed.items(), key=lambda item: (-item[1], item[0])):
        print(f"  {number:8d}  {fault}")
    print("themes: " + ", ".join(f"{theme} {number}" for theme, number in sorted(themes.items())))
    print(f"{count} seeds, {commits} commits, {failed} failed, {took_s:.1f} s, {count / took_s:.0f} seeds/s")
    return 1 if failed else 0


def _find(mutation: Mutation, first: int, count: int) -> int:
    found = 0
    for seed in range(first, first + count):
        if catches(seed, mutation):
            result = run(seed, mutation=mutation)
            found += 1
            print(f"seed {seed} ({result.plan.theme}): {result.failure}")
            print(f"  {replay_command(seed, mutation)}", flush=True)
            if found == FINDINGS_OF_A_MUTATION_MAX:
                break
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
