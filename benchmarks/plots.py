"""Draws the results of the suite as SVG files.

    python -m benchmarks.plots bench-results.json [--out DIRECTORY]

Scenarios that differ in one thing (`state-*`, `size-*`, `partitions-*`, `workers-*`, `latency-200` and so on)
share a file, each other scenario has one of its own. Bars are medians of the rounds, thin lines go from the
least to the most. Decision 0130 says why there is no plotting library.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.results import Results, ScenarioResult
from benchmarks.svg import Bar, Panel, colours, draw

FIGURES = {
    "drain": {
        "rate": "records/s",
        "first_part_rate": "records/s, first part",
        "second_part_rate": "records/s, second part",
        "cpu_s_per_million": "CPU-s of the workers for each million records",
        "broker_cpu_s_per_million": "CPU-s of the broker for each million records",
        "peak_mb": "MB of the workers at the peak",
    },
    "latency": {
        "committed_median_ms": "ms read_committed, median",
        "committed_p99_ms": "ms read_committed, p99",
        "uncommitted_median_ms": "ms read_uncommitted, median",
        "uncommitted_p99_ms": "ms read_uncommitted, p99",
        "cpu_s": "CPU-s of the job",
        "broker_cpu_s": "CPU-s of the broker",
    },
    "engine": {
        "few_keys_ratio": "times the reference loop, few keys",
        "many_keys_ratio": "times the reference loop, many keys",
    },
}
FAMILIES = {
    "state": "drain, by the number of keys: new keys first, then updates",
    "size": "drain, by the size of the records in bytes",
    "partitions": "drain, by the number of partitions",
    "workers": "drain, by the number of workers",
    "latency": "latency, by records a second",
}
_FAMILY = re.compile(rf"({'|'.join(FAMILIES)})-(\d\w*)")


def family_of(name: str) -> tuple[str, str]:
    """The file that a scenario is drawn in, and what sets it apart there ("" if it is alone)."""
    found = _FAMILY.fullmatch(name)
    return (found[1], found[2]) if found else (name, "")


def draw_results(found: Results) -> dict[str, str]:
    """SVG documents by the names of their files."""
    families: dict[str, list[ScenarioResult]] = {}
    for scenario in found.scenarios:
        families.setdefault(family_of(scenario.name)[0], []).append(scenario)
    lanes = list(dict.fromkeys(lane for one in found.scenarios for lane in one.spreads))
    machine = f"{found.machine.get('cores')} cores of {found.machine.get('processor')}"
    subtitle = f"{found.began_at[:10]}, {machine}; medians of {found.rounds} rounds, least to most"
    return {
        f"{family}.svg": draw(_title(scenarios), subtitle, _panels(scenarios, lanes))
        for family, scenarios in families.items()
    }


def _title(scenarios: Sequence[ScenarioResult]) -> str:
    return scenarios[0].about if len(scenarios) == 1 else FAMILIES[family_of(scenarios[0].name)[0]]


def _panels(scenarios: Sequence[ScenarioResult], lanes: Sequence[str]) -> list[Panel]:
    colour = colours(lanes)
    panels: list[Panel] = []
    for figure, heading in FIGURES[scenarios[0].kind].items():
        groups: list[list[Bar]] = []
        for scenario in scenarios:
            apart = family_of(scenario.name)[1]
            groups.append(
                [
                    Bar(f"{apart} {lane}".strip(), spread.median, spread.least, spread.most, colour[lane])
                    for lane in lanes
                    if (spread := scenario.spreads.get(lane, {}).get(figure)) is not None
                ]
            )
        groups = [group for group in groups if group]
        if groups:
            panels.append(Panel(heading, groups))
    return panels


def main() -> int:
    """Read, draw, write; 2 if the file can't be read."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("results", type=Path, metavar="FILE")
    made.add_argument("--out", type=Path, default=Path("bench-plots"), metavar="DIRECTORY")
    arguments = made.parse_args()
    try:
        found = results.read(arguments.results)
    except results.UnreadableResultsError as error:
        print(error, file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, text in draw_results(found).items():
        (arguments.out / name).write_text(text, encoding="utf-8")
        print(arguments.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
