from __future__ import annotations

from pathlib import Path

import pytest

from fcluster.common.offset_targets import Target, TargetError, chosen_offsets, parse_target

BEGINS = {("a", 0): 3, ("a", 1): 0}
ENDS = {("a", 0): 9, ("a", 1): 5}


def test_forms_of_a_target_are_parsed(tmp_path: Path) -> None:
    file = tmp_path / "offsets"
    file.write_text("# of last night\na/0=4\n\n a/1=5 \n")
    wanted = Target("offsets", offsets={("a", 0): 4, ("a", 1): 5})
    assert parse_target(["earliest"]) == Target("earliest")
    assert parse_target(["latest"]) == Target("latest")
    assert parse_target(["time:1970-01-01T00:00:01"]) == Target("time", 1000)
    assert parse_target(["time:1970-01-01T01:00:01+01:00"]) == Target("time", 1000)
    assert parse_target([f"offsets:{file}"]) == wanted
    assert parse_target(["a/0=4", "a/1=5"]) == wanted


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["earlier"],
        ["earliest", "latest"],
        ["earliest", "a/0=1"],
        ["time:yesterday"],
        ["a/0=1", "a/0=2"],
        ["a/0=-1"],
        ["offsets:/does/not/exist"],
    ],
)
def test_unknown_form_of_a_target_is_refused_with_the_known_ones(given: list[str]) -> None:
    with pytest.raises(TargetError) as caught:
        parse_target(given)
    assert "TOPIC/PARTITION=OFFSET" in caught.value.remedy


def test_unparsable_line_is_named_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "offsets"
    file.write_text("a/0=4\na/1:5\n")
    with pytest.raises(TargetError, match="line 2: a/1:5"):
        parse_target([f"offsets:{file}"])


def test_offsets_follow_from_the_target() -> None:
    assert chosen_offsets(Target("earliest"), BEGINS, ENDS, {}) == BEGINS
    assert chosen_offsets(Target("latest"), BEGINS, ENDS, {}) == ENDS
    assert chosen_offsets(Target("time", 5), BEGINS, ENDS, {("a", 0): 7}) == {("a", 0): 7, ("a", 1): 5}
    begins, ends = {**BEGINS, ("t", 0): 2}, {**ENDS, ("t", 0): 8}
    for target in (Target("latest"), Target("time", 5)):
        chosen = chosen_offsets(target, begins, ends, {("t", 0): 7}, {"t"})
        assert chosen == {**ENDS, ("t", 0): 2}, "a table is read from its beginning"
    given = {("a", 0): 9, ("a", 1): 0}
    assert chosen_offsets(Target("offsets", offsets=given), BEGINS, ENDS, {}) == given


@pytest.mark.parametrize(
    ("offsets", "named"),
    [
        ({("a", 0): 4}, "a/1"),
        ({("a", 0): 4, ("a", 1): 1, ("b", 0): 1}, "b/0"),
        ({("a", 0): 2, ("a", 1): 1}, "a/0 has no offset 2: it has 3 to 9"),
        ({("a", 0): 3, ("a", 1): 6}, "a/1 has no offset 6: it has 0 to 5"),
    ],
)
def test_offsets_outside_of_the_sources_are_refused(offsets: dict[tuple[str, int], int], named: str) -> None:
    with pytest.raises(TargetError, match=named):
        chosen_offsets(Target("offsets", offsets=offsets), BEGINS, ENDS, {})


def test_end_of_a_run_is_called_end_and_its_start_as_that_of_a_reset() -> None:
    assert parse_target(["end"], "--end") == Target("latest")
    assert parse_target(["latest"], "--start") == Target("latest")
    for given, option in (
        (["latest"], "--end"),
        (["earliest"], "--end"),
        (["end"], "--start"),
        (["end"], "--to"),
    ):
        with pytest.raises(TargetError, match=f"{option} {given[0]} isn't valid") as caught:
            parse_target(given, option)
        assert ("Use end," if option == "--end" else "Use earliest, latest,") in caught.value.remedy
