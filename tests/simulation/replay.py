"""Feeds the last events of a process to its core again, and shows what the core decides.

    python -m tests.simulation.replay FILE [--job job.py]

FILE is what a worker or coordinator writes on SIGUSR1, and a worker that ends itself because something hangs
(`event_ring`).
A coordinator's core needs the job as well. If the file has the core's first event, the effects have to be the
same as those of the process; otherwise the core lacks what happened before, and the replay shows only the
part that doesn't depend on it. Texts about failures are left out of the file, so they are empty.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from fcluster.api.loader import load_job
from fcluster.common.event_ring import RingFile, read_ring
from fcluster.common.settings import REDACTED, Settings, resolve
from fcluster.coordinator.core import events as coordinator_events
from fcluster.coordinator.core.coordinator import Coordinator
from fcluster.coordinator.core.model import Terms
from fcluster.worker.core import events as worker_events
from fcluster.worker.core.model import Bounds, Identity
from fcluster.worker.core.worker import WorkerCore

Handle = Callable[[Any, Any], list[Any]]


def replay(file: RingFile, job: str = "") -> Iterator[tuple[float, Any, list[Any], list[str]]]:
    """Each event with its time, its effects, and the classes of the effects in the process.

    Args:
        file: the file of the process.
        job: the job, as the command line names it. Needed for a coordinator.
    """
    handle, module = _core_of(file, job)
    for now_ms, name, fields, effects in file.events:
        event = msgspec.convert(fields, getattr(module, name), strict=False)
        yield now_ms, event, handle(event, int(now_ms) if file.role == "worker" else now_ms), effects


def _core_of(file: RingFile, job: str) -> tuple[Handle, Any]:
    begin = file.begin
    if file.role == "worker":
        identity = msgspec.convert(begin["identity"], Identity)
        bounds = msgspec.convert(begin["bounds"], Bounds)
        return WorkerCore(identity, bounds, begin["now_ms"]).handle, worker_events
    settings = _settings(begin["settings"])
    topology = load_job(job).build(settings)
    given = {name: value for name, value in begin["terms"].items() if name not in ("topology", "settings")}
    terms = Terms(topology=topology, settings=settings, **given)
    return Coordinator.recover(begin["journal"], terms, begin["now_ms"]).handle, coordinator_events


def _settings(redacted: dict[str, str]) -> Settings:
    return resolve({}, None, {}, {name: value for name, value in redacted.items() if REDACTED not in value})


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 if the effects should be the same as in the process, but aren't."""
    parser = argparse.ArgumentParser("python -m tests.simulation.replay", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--job", default="", help="the job file, for a coordinator")
    options = parser.parse_args(arguments)
    file = read_ring(options.file)
    print(f"{file.role}, fcluster {file.version}: {len(file.events)} events, complete: {file.complete}")
    differing = 0
    for now_ms, event, effects, before in replay(file, options.job):
        print(f"{now_ms:.0f} {event}")
        for effect in effects:
            print(f"    {effect}")
        if [type(effect).__name__ for effect in effects] != before:
            differing += 1
            print(f"    in the process: {', '.join(before) or 'nothing'}")
    print(f"{differing} events had other effects in the process")
    return 1 if differing and file.complete else 0


if __name__ == "__main__":
    sys.exit(main())
