"""What a run of the suite leaves: one JSON document, read back by the plots.

Its format is these structs: `msgspec.json.decode` refuses a document that isn't of this form, and `FORMAT`
tells versions apart. Figures are numbers by name; units are in the names: `_ms`, `_s`, `_mb` (10**6 bytes),
`rate` (records a second).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from benchmarks import figures

FORMAT = 1


class Spread(msgspec.Struct, frozen=True):
    """A figure over all rounds: see `figures.Spread`."""

    median: float
    least: float
    most: float


class Round(msgspec.Struct, frozen=True):
    """What one lane has measured in one round.

    Attributes:
        number: from 1.
        lane: what was measured: a version of fcluster, a peer, or a yardstick.
        figures: by name.
    """

    number: int
    lane: str
    figures: dict[str, float]


class Ratio(msgspec.Struct, frozen=True):
    """One lane's figures divided by another's, round by round."""

    lane: str
    by: str
    figures: dict[str, Spread]


class ScenarioResult(msgspec.Struct, frozen=True):
    """One scenario.

    Attributes:
        name: as `--scenario` takes it.
        about: what it measures, in a sentence.
        kind: what its figures are: "drain", "latency" or "engine".
        settings: records, keys, rate and so on, as they were after `--scale`.
        rounds: all that was measured, in the order of measuring.
        spreads: lane to figure to its median, least and most.
        ratios: between lanes.
        failures: what couldn't be measured, and why.
    """

    name: str
    about: str
    kind: str
    settings: dict[str, str | int | float]
    rounds: list[Round]
    spreads: dict[str, dict[str, Spread]]
    ratios: list[Ratio]
    failures: list[str]


class Results(msgspec.Struct, frozen=True):
    """A run of the suite.

    Attributes:
        format: of this document.
        began_at: UTC, ISO 8601.
        command: the options it was started with.
        rounds: how many were asked for.
        scale: what all record counts were multiplied with.
        machine: processor, cores, memory, system.
        versions: of fcluster and what it is built from.
        settings: fcluster's, given with `--set`.
        scenarios: in the order of measuring.
    """

    format: int
    began_at: str
    command: list[str]
    rounds: int
    scale: float
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    settings: dict[str, str]
    scenarios: list[ScenarioResult]


class UnreadableResultsError(Exception):
    """The file holds no results of this version; the message says what is wrong with it."""


class _Format(msgspec.Struct):
    format: int


_decode_format = msgspec.json.Decoder(_Format).decode
_decode = msgspec.json.Decoder(Results).decode


def summarise(
    rounds: list[Round], pairs: list[tuple[str, str]]
) -> tuple[dict[str, dict[str, Spread]], list[Ratio]]:
    """Spreads of each lane, and ratios of these pairs of lanes, as far as they were measured."""
    by_lane: dict[str, dict[int, Mapping[str, float]]] = {}
    for one in rounds:
        by_lane.setdefault(one.lane, {})[one.number] = one.figures
    spreads = {
        lane: {name: Spread(*spread) for name, spread in figures.spreads(list(found.values())).items()}
        for lane, found in by_lane.items()
    }
    ratios = [
        Ratio(lane, by, {name: Spread(*spread) for name, spread in found.items()})
        for lane, by in pairs
        if (found := figures.ratios(by_lane.get(lane, {}), by_lane.get(by, {})))
    ]
    return spreads, ratios


def write(path: Path, results: Results) -> None:
    """Replace the file."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))


def read(path: Path) -> Results:
    """The results in the file.

    Raises:
        UnreadableResultsError: it isn't there, or holds something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableResultsError(f"{path}: {error.strerror}") from error
    return decode(data, str(path))


def decode(data: bytes, name: str) -> Results:
    """The results in this document.

    Raises:
        UnreadableResultsError: it is something else; `name` tells which document.
    """
    try:
        found = _decode_format(data).format
        if found != FORMAT:
            raise UnreadableResultsError(f"{name} has format {found}; this version reads {FORMAT}")
        return _decode(data)
    except msgspec.DecodeError as error:
        raise UnreadableResultsError(f"{name} holds no results of the benchmarks: {error}") from error
