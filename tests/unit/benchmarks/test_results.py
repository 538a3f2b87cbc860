"""The document that a run of the suite writes, and the plots of it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import pytest

from benchmarks import results
from benchmarks.plots import draw_results, family_of
from benchmarks.results import Ratio, Results, Round, ScenarioResult, Spread, summarise
from benchmarks.svg import Bar, Panel, draw, show_number

ROUNDS = [
    Round(1, "fcluster", {"rate": 200_000.0, "cpu_s_per_million": 5.0}),
    Round(1, "Kafka <Streams>", {"rate": 100_000.0, "cpu_s_per_million": 15.0}),
    Round(2, "Kafka <Streams>", {"rate": 50_000.0, "cpu_s_per_million": 16.0}),
    Round(2, "fcluster", {"rate": 150_000.0, "cpu_s_per_million": 6.0}),
]


def scenario(name: str) -> ScenarioResult:
    spreads, ratios = summarise(ROUNDS, [("fcluster", "Kafka <Streams>"), ("fcluster", "nobody")])
    return ScenarioResult(name, "a drain", "drain", {"records": 10}, ROUNDS, spreads, ratios, [])


def document(*names: str) -> Results:
    return Results(
        format=results.FORMAT,
        began_at="2026-11-26T08:00:00+00:00",
        command=["--rounds", "2"],
        rounds=2,
        scale=1.0,
        machine={"processor": "fast", "cores": 2},
        versions={"fcluster": "0.1.0"},
        settings={},
        scenarios=[scenario(name) for name in names],
    )


# --- the document ---------------------------------------------------------------------------------------


def test_summary_has_spreads_and_the_ratios_of_lanes_that_were_measured() -> None:
    spreads, ratios = summarise(ROUNDS, [("fcluster", "Kafka <Streams>"), ("fcluster", "nobody")])
    assert spreads["fcluster"]["rate"] == Spread(175_000.0, 150_000.0, 200_000.0)
    assert ratios == [
        Ratio(
            "fcluster",
            "Kafka <Streams>",
            {
                "rate": Spread(2.5, 2.0, 3.0),
                "cpu_s_per_million": Spread(*(pytest.approx(x) for x in (17 / 48, 1 / 3, 3 / 8))),
            },
        )
    ]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = document("drain-few")
    results.write(tmp_path / "results.json", written)
    assert results.read(tmp_path / "results.json") == written


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[]", "holds no results"),
        (b"{", "holds no results"),
        (b'{"format": 1}', "began_at"),
        (b'{"format": 99}', "has format 99; this version reads 1"),
    ],
)
def test_another_document_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(results.UnreadableResultsError, match=says):
        results.decode(data, "x.json")


def test_a_figure_that_is_no_number_is_refused() -> None:
    plain = msgspec.to_builtins(document("drain-few"))
    plain["scenarios"][0]["rounds"][0]["figures"]["rate"] = "fast"
    with pytest.raises(results.UnreadableResultsError, match="figures"):
        results.decode(msgspec.json.encode(plain), "x.json")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(results.UnreadableResultsError, match=r"nothing\.json: No such file"):
        results.read(tmp_path / "nothing.json")


# --- plots ------------------------------------------------------------------------------------------------


def test_scenarios_of_a_group_share_a_plot() -> None:
    assert family_of("state-1e4") == ("state", "1e4")
    assert family_of("latency-2000") == ("latency", "2000")
    assert family_of("latency-at-least-once") == ("latency-at-least-once", "")
    drawn = draw_results(document("drain-few", "state-1e4", "state-1e5"))
    assert list(drawn) == ["drain-few.svg", "state.svg"]
    assert "1e4 fcluster" in drawn["state.svg"]
    assert "1e5 fcluster" in drawn["state.svg"]


def test_plots_are_well_formed_and_show_every_figure() -> None:
    svg = draw_results(document("drain-few"))["drain-few.svg"]
    texts = [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "Kafka <Streams>" in texts
    assert "175,000 [150,000 to 200,000]" in texts
    assert "5.5 [5 to 6]" in texts
    assert "2026-11-26, 2 cores of fast; medians of 2 rounds, least to most" in texts


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("a", 100.0, 100.0, 100.0, "#000000"), Bar("b", 25.0, 20.0, 50.0, "#000000")]
    root = ET.fromstring(draw("t", "s", [Panel("p", [bars])]))
    _, long, short = (float(one.attrib["width"]) for one in root.iter("{http://www.w3.org/2000/svg}rect"))
    assert short == pytest.approx(long / 4, abs=0.1)


def test_a_plot_of_nothing_is_empty_and_not_an_error() -> None:
    ET.fromstring(draw("t", "s", [Panel("p", [[Bar("a", 0.0, 0.0, 0.0, "#000000")]])]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.2345, "1.23"),
        (99.96, "100"),
        (123.4, "123"),
        (207_345.0, "207,000"),
        (0.012, "0.012"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert show_number(value) == text
