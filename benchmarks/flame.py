"""Flame graphs of a worker that drains a topic: where its processor time goes.

    python -m benchmarks.flame --out docs/flame [--py-spy /path/to/py-spy] [--brokers HOST:PORT]

The running count and sum of the suite's `drain-few` and `drain-many`, with one worker. `py-spy` (`pip install
py-spy`, in an environment of its own) samples the worker from its first output on, until everything is
committed: whichever thread has the interpreter's lock, with functions of the C libraries as far as their
names are known. It writes few-keys.svg and many-keys.svg. A frame's width is its share of the samples.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.drain import DRAIN_TIMEOUT_S, START_TIMEOUT_S, fill, is_all_committed
from benchmarks.lanes import Fcluster, Task
from benchmarks.records import Input
from benchmarks.support import Names, Place, place, topics
from tests.checker.reading import READ_UNCOMMITTED, end_offsets
from tests.harness import wait_until

CASES = {"few-keys": Input(1_000_000, 50_000), "many-keys": Input(1_000_000, 800_000)}
SAMPLES_PER_S = 200
PARTITIONS = 4
_TITLE = re.compile(r'(id="title"[^>]*>)[^<]*')


def record(made: Input, where: Place, py_spy: str, out: Path) -> None:
    """Drain such records, and write the graph."""
    names = Names.new()
    with topics(where.brokers, names, PARTITIONS):
        fill(where.brokers, names.source, made)
        with Fcluster().run(where, names, Task(partitions=PARTITIONS)) as running:

            def written() -> int:
                running.assert_alive()
                return sum(end_offsets(where.brokers, [names.output], READ_UNCOMMITTED).values())

            wait_until(written, "the first output", START_TIMEOUT_S)
            command = [py_spy, "record", "--pid", str(running.workers[0]), "--output", str(out)]
            command += ["--gil", "--native", "--rate", str(SAMPLES_PER_S), "--duration", "600"]
            sampler = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            try:
                wait_until(
                    lambda: written() >= made.records and is_all_committed(where.brokers, names.output),
                    "all outputs",
                    DRAIN_TIMEOUT_S,
                )
            finally:
                sampler.send_signal(signal.SIGINT)  # it writes what it has
                sampler.wait()
            if not out.exists():
                raise RuntimeError(f"py-spy wrote nothing: {' '.join(command)}")
            title = f"a worker that drains {made.records:,} records with {made.keys:,} keys"
            out.write_text(_TITLE.sub(rf"\g<1>{title}", out.read_text()))


def main() -> int:
    """Draw both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="A directory.")
    parser.add_argument("--case", action="append", choices=CASES, help="Default: both.")
    parser.add_argument("--py-spy", default="py-spy")
    parser.add_argument("--brokers", help="Default: a broker is started.")
    parser.add_argument("--scale", type=float, default=1.0, help="So many times the records and keys.")
    chosen = parser.parse_args()
    if shutil.which(chosen.py_spy) is None:
        print(f"there is no {chosen.py_spy}; install py-spy, or name it with --py-spy", file=sys.stderr)
        return 1
    chosen.out.mkdir(parents=True, exist_ok=True)
    with place(chosen.brokers) as where:
        for name in chosen.case or CASES:
            made = CASES[name]
            scaled = Input(int(made.records * chosen.scale), int(made.keys * chosen.scale))
            record(scaled, where, chosen.py_spy, chosen.out / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
