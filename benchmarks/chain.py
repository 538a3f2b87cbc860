"""How long the compiled chain of a stage takes for a record, without Kafka: this source tree compared with
another one.

    python -m benchmarks.chain /path/to/another/checkout

Each tree runs in its own process, in turns, so whatever else the host does affects both. The ratio is the
other tree's best time divided by this one's. If it is more than 1, this tree is faster.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROUNDS = 31
RECORDS = 10_000

RUNNER = """
import gc, json, sys, time
sys.path.insert(0, sys.argv[1])
from fcluster import Job, Record
from fcluster.common.positions import CommittedPosition
from fcluster.worker.processing import OutputPort, ShardRunner
try:
    from fcluster.engine.state import ShardState, StoreMeta
except ImportError:  # an older tree
    from fcluster.worker.state import ShardState, StoreMeta
try:
    from fcluster.engine.memory import StateMemory
except ImportError:  # an older tree: a number of entries
    StateMemory = int
from confluent_kafka import Message

class Store:
    def meta(self): return StoreMeta()
    def get(self, key): return None
    def get_many(self, keys): return [None] * len(keys)

def handler(ctx, value):
    state = ctx.state
    state["n"] = state.get("n", 0) + 1
    yield {"key": value["key"], "n": state["n"], "value": value["value"]}

def one(ctx, value):
    state = ctx.state
    state["n"] = state.get("n", 0) + 1
    return {"key": value["key"], "n": state["n"], "value": value["value"]}

def process(job, source, out): job.process(source, to=out)(handler)
def process_one(job, source, out): job.process(source, to=out)(one)
def skip(job, source, out): job.process(source, to=out, on_error="skip")(handler)
def two(job, source, out): job.process(source, to=out)(handler); job.process(source, to=out)(one)
def dropped(job, source, out): job.stream(source).filter(lambda v: v["value"] > 10**6).to(out)
def filtered(job, source, out): job.stream(source).filter(lambda v: v["value"] >= 0).to(out)
def mapped(job, source, out): job.stream(source).map(lambda v: {**v, "x": 1}).to(out)
def keyed(job, source, out): job.stream(source).key_by("key").process(handler, to=out)

def message(number):
    value = json.dumps({"id": number, "key": f"k{number % 500}", "value": number % 1000, "at": 0}).encode()
    fields = dict(topic="in", partition=0, offset=number, timestamp=(1, 1700000000000))
    return Message(key=f"k{number % 500}".encode(), value=value, **fields)
RECORDS = int(sys.argv[2])
messages = [message(number) for number in range(RECORDS)]
class Producer:
    def produce(self, topic, value, key, timestamp, headers=None): pass
def run(build):
    job = Job("j")
    build(job, job.topic("in"), job.topic("out"))
    try:
        from fcluster.common.settings import Settings
        stage = job.build(Settings()).stages[0]
    except TypeError:
        stage = job.build().stages[0]
    port = OutputPort()
    port.produce = lambda topic, value, key, timestamp, headers=None: None
    state = ShardState(Store(), stage.stores, StateMemory(1_000_000))
    runner = ShardRunner(stage, 0, state, CommittedPosition(0, 0, 0, ""), port).inputs[0]
    gc.collect(); gc.disable()
    began = time.process_time()
    for message in messages:
        runner.handle(message)
        runner.last = message
    took = time.process_time() - began
    gc.enable()
    return took
builds = (process, process_one, skip, two, dropped, filtered, mapped, keyed)
jobs = {build.__name__: build for build in builds}
print(json.dumps(list(jobs)), flush=True)
for line in sys.stdin:
    print(run(jobs[line.strip()]), flush=True)
"""


def main() -> None:
    """Print a line for each kind of chain."""
    here = Path(__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(tree), str(RECORDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for tree in (Path(sys.argv[1]), here)
    ]
    names, _same = (json.loads(process.stdout.readline()) for process in processes)  # type: ignore[union-attr]
    for name in names:
        best = [1e9, 1e9]
        for round_number in range(ROUNDS):
            for number in (0, 1) if round_number % 2 else (1, 0):
                process = processes[number]
                process.stdin.write(name + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                best[number] = min(best[number], float(process.stdout.readline()))  # type: ignore[union-attr]
        other, this = (1e9 * seconds / RECORDS for seconds in best)
        print(f"{name:12} {other:7.0f} ns -> {this:7.0f} ns, ratio {other / this:.2f}")
    for process in processes:
        process.stdin.close()  # type: ignore[union-attr]
        process.wait(10)


if __name__ == "__main__":
    main()
