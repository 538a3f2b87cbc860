"""The suite's scenarios: names, selection and scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lanes import JOBS, Fcluster, WrongTreeError
from benchmarks.plots import FIGURES
from benchmarks.scenarios import SCENARIOS, UnknownScenarioError, choose, names


def test_names_are_unique_and_kinds_and_jobs_known() -> None:
    assert len(set(names(SCENARIOS))) == len(SCENARIOS)
    assert {scenario.kind for scenario in SCENARIOS} == FIGURES.keys()
    assert {scenario.task.job for scenario in SCENARIOS} == JOBS.keys()


def test_choice_by_name_and_pattern_keeps_the_order_of_the_suite() -> None:
    assert names(choose(["state-1e5", "drain-few"])) == ["drain-few", "state-1e5"]
    assert names(choose(["latency-2*"])) == ["latency-200", "latency-2000", "latency-20000"]
    assert choose([]) == list(SCENARIOS)


def test_a_name_that_fits_nothing_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(UnknownScenarioError, match=r"no scenario 'state-\?'; there are .*drain-few"):
        choose(["drain-few", "state-?"])


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 2.0])
def test_scaled_scenarios_keep_their_parts(scenario, scale: float) -> None:
    scaled = scenario.scaled(scale)
    assert 0 < scaled.split_at < scaled.input.records
    assert 0 < scaled.input.keys <= scaled.input.records
    assert scaled.load.rate == scenario.load.rate
    assert scaled.load.records > 0
    assert (scaled == scenario) == (scale == 1.0)


def test_scale_is_a_factor_for_records_keys_and_seconds() -> None:
    (scenario,) = choose(["drain-many"])
    scaled = scenario.scaled(0.01)
    assert (scaled.input.records, scaled.input.keys) == (20_000, 16_000)
    assert (scaled.load.seconds, scaled.load.warm_up_s) == (1.0, 1.0)


def test_settings_are_reported_after_scaling() -> None:
    (scenario,) = choose(["state-1e6"])
    settings = scenario.scaled(0.1).settings()
    assert settings["keys"] == settings["split_at"] == 100_000
    assert settings["records"] == 200_000


def test_a_directory_without_fcluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongTreeError, match="holds no fcluster"):
        Fcluster("other", {}, tmp_path).check()
