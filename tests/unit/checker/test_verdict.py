"""Each kind of wrong output is planted by hand, and the checker has to name it."""

from __future__ import annotations

from collections import defaultdict

import pytest

from tests.checker.records import (
    InputRecord,
    MalformedRecord,
    OutputRecord,
    decode_input,
    decode_output,
    encode_input,
    generate_records,
    group_of,
)
from tests.checker.verdict import (
    judge_between,
    judge_ends,
    judge_live,
    judge_regrouped,
    judge_state,
    judge_totals,
    judge_uncommitted,
    state_by_group,
    state_by_key,
)

PARTITIONS = 3
GROUPS = 4


@pytest.fixture
def inputs() -> list[InputRecord]:
    placed: list[InputRecord] = []
    next_offset = [0] * PARTITIONS
    for record in generate_records(600, keys=20, seed=7):
        partition = int(record.key[1:]) % PARTITIONS
        placed.append(record._replace(partition=partition, offset=next_offset[partition]))
        next_offset[partition] += 1
    return placed


def totals_of(inputs: list[InputRecord], *, regroup: bool = False) -> list[OutputRecord]:
    """What a correct job writes: totals by key, or by group after a repartition."""
    state: dict[str, tuple[int, int]] = {}
    rows: list[OutputRecord] = []
    for r in inputs:
        group = group_of(r.key, GROUPS) if regroup else r.key
        count, total = state.get(group, (0, 0))
        state[group] = count, total = count + 1, total + r.value
        place = (-1, -1) if regroup else (r.partition, r.offset)
        at = int(group[1:]) % 2 if regroup else r.partition
        rows.append(OutputRecord(r.id, r.key, r.sequence, group, count, total, *place, at, len(rows)))
    return rows


@pytest.fixture
def outputs(inputs: list[InputRecord]) -> list[OutputRecord]:
    """What a correct totals job writes."""
    return totals_of(inputs)


@pytest.fixture
def regrouped(inputs: list[InputRecord]) -> list[OutputRecord]:
    """What a correct regrouping job writes if one source partition arrives after the other."""
    return totals_of(sorted(inputs, key=lambda record: record.partition), regroup=True)


def kinds(verdict) -> set[str]:
    return {kind for kind, count in verdict.counts.items() if count}


def test_correct_output_is_exactly_once(inputs, outputs) -> None:
    verdict = judge_totals(inputs, outputs)
    assert verdict.ok, verdict.report()
    assert (verdict.inputs, verdict.outputs, verdict.keys) == (600, 600, 20)
    assert "exactly once" in verdict.report()
    assert "NOT" not in verdict.report()


def test_missing_output_is_lost_and_a_gap_in_its_key(inputs, outputs) -> None:
    gone = outputs.pop(100)
    verdict = judge_totals(inputs, outputs)
    assert kinds(verdict) == {"lost", "sequence"}
    assert verdict.counts["lost"] == 1
    assert f"input {gone.id} " in verdict.report()


def test_missing_last_output_is_lost(inputs, outputs) -> None:
    outputs.pop()
    assert kinds(judge_totals(inputs, outputs)) == {"lost"}


def test_missing_outputs_are_lost(inputs) -> None:
    assert judge_totals(inputs, []).counts["lost"] == 600


def test_output_written_twice_is_repeated(inputs, outputs) -> None:
    outputs.insert(300, outputs[250]._replace(at_offset=300))
    verdict = judge_totals(inputs, outputs)
    assert kinds(verdict) == {"repeated", "sequence"}
    assert verdict.counts["repeated"] == 1


def test_swapped_outputs_of_a_key_are_reordered(inputs, outputs) -> None:
    key = outputs[50].key
    first, second = [index for index, row in enumerate(outputs) if row.key == key][3:5]
    outputs[first], outputs[second] = outputs[second], outputs[first]
    verdict = judge_totals(inputs, outputs)
    assert kinds(verdict) == {"reordered", "sequence"}
    assert verdict.counts["reordered"] == 1


def test_another_order_between_keys_is_accepted(inputs, outputs) -> None:
    outputs.sort(key=lambda row: row.key)
    assert judge_totals(inputs, outputs).ok


@pytest.mark.parametrize(
    "change",
    [
        {"sum": 10**9},
        {"count": 99},
        {"sequence": 77},
        {"partition": 2},
        {"offset": 9999},
        {"partition": 9, "offset": -1},
    ],
)
def test_field_that_differs_from_the_fold_is_wrong(inputs, outputs, change) -> None:
    index = next(index for index, row in enumerate(outputs) if row.partition == 0)
    outputs[index] = outputs[index]._replace(**change)
    verdict = judge_totals(inputs, outputs)
    assert verdict.counts["wrong"] == 1
    assert kinds(verdict) <= {"wrong", "sequence"}


def test_output_is_wrong_from_where_state_was_lost(inputs, outputs) -> None:
    key = outputs[0].key
    mine = [row for row in outputs if row.key == key]
    base = mine[9]
    half = [
        row._replace(count=row.count - base.count, sum=row.sum - base.sum) if row in mine[10:] else row
        for row in outputs
    ]
    assert judge_totals(inputs, half).counts["wrong"] == len(mine) - 10


def test_output_beyond_the_committed_offset_is_unexpected(inputs, outputs) -> None:
    verdict = judge_totals(inputs[:-1], outputs)
    assert kinds(verdict) == {"unexpected"}


def test_key_in_two_output_partitions_is_misplaced(inputs, outputs) -> None:
    outputs[10] = outputs[10]._replace(at_partition=PARTITIONS)
    assert kinds(judge_totals(inputs, outputs)) == {"misplaced"}


def test_gap_in_the_input_is_blamed_on_the_input(inputs, outputs) -> None:
    verdict = judge_totals(inputs[:200] + inputs[201:], outputs)
    assert verdict.counts["input"] > 0


def test_long_list_of_findings_is_truncated_but_counted(inputs) -> None:
    report = judge_totals(inputs, []).report()
    assert "lost: 600" in report
    assert "and 595 more" in report
    assert len(report.splitlines()) == 8


def test_correct_regrouped_output_is_exactly_once(inputs, regrouped) -> None:
    verdict = judge_regrouped(inputs, regrouped, GROUPS)
    assert verdict.ok, verdict.report()


def test_missing_regrouped_output_is_lost(inputs, regrouped) -> None:
    regrouped.pop(77)
    verdict = judge_regrouped(inputs, regrouped, GROUPS)
    assert verdict.counts["lost"] == 1
    assert verdict.counts["wrong"] > 0, "later totals of the group claim a record that isn't there"


def test_regrouped_input_counted_twice_is_repeated(inputs, regrouped) -> None:
    regrouped.append(regrouped[-1]._replace(count=regrouped[-1].count + 1))
    verdict = judge_regrouped(inputs, regrouped, GROUPS)
    assert verdict.counts["repeated"] == 1


def test_regrouped_outputs_out_of_order_are_reordered(inputs, regrouped) -> None:
    key = regrouped[0].key
    first, second = [index for index, row in enumerate(regrouped) if row.key == key][:2]
    regrouped[first], regrouped[second] = regrouped[second], regrouped[first]
    assert judge_regrouped(inputs, regrouped, GROUPS).counts["reordered"] == 1


def test_wrong_regrouped_sum_is_wrong(inputs, regrouped) -> None:
    regrouped[5] = regrouped[5]._replace(sum=regrouped[5].sum + 1)
    assert kinds(judge_regrouped(inputs, regrouped, GROUPS)) == {"wrong"}


def test_output_in_the_wrong_group_is_wrong(inputs, regrouped) -> None:
    regrouped[5] = regrouped[5]._replace(group="g77")
    assert judge_regrouped(inputs, regrouped, GROUPS).counts["wrong"] > 0


def test_uncommitted_reader_may_see_repeats(inputs, outputs) -> None:
    verdict = judge_uncommitted(inputs, outputs + outputs[-50:])
    assert verdict.ok, verdict.report()
    assert "50 repeats" in verdict.report()


def test_wrong_repeat_seen_by_an_uncommitted_reader_is_wrong(inputs, outputs) -> None:
    repeat = outputs[-1]._replace(count=outputs[-1].count + 1)
    assert kinds(judge_uncommitted(inputs, [*outputs, repeat])) == {"wrong"}


def test_record_missing_for_an_uncommitted_reader_is_lost(inputs, outputs) -> None:
    assert kinds(judge_uncommitted(inputs, outputs[1:])) == {"lost"}


def test_state_equal_to_the_fold_is_accepted(inputs) -> None:
    assert judge_state(state_by_key(inputs), state_by_key(inputs)).ok
    groups = state_by_group(inputs, GROUPS)
    assert sum(row["count"] for row in groups.values()) == len(inputs)


@pytest.mark.parametrize("fault", ["missing", "stale", "extra"])
def test_state_that_differs_from_the_fold_is_found(inputs, fault: str) -> None:
    expected, actual = state_by_key(inputs), state_by_key(inputs)
    if fault == "missing":
        del actual["k3"]
    elif fault == "stale":
        actual = state_by_key(inputs[:-1])
    else:
        actual["k999"] = {"count": 1, "sum": 1}
    verdict = judge_state(expected, actual)
    assert verdict.counts["state"] == 1


def by_partition(rows: list[OutputRecord]) -> dict[int, list[OutputRecord]]:
    parts: dict[int, list[OutputRecord]] = defaultdict(list)
    for row in rows:
        parts[row.at_partition].append(row)
    return parts


def test_live_reader_that_stopped_early_agrees(outputs) -> None:
    assert judge_live(by_partition(outputs[:200]), by_partition(outputs)).ok


def test_aborted_record_seen_by_a_live_reader_is_vanished(outputs) -> None:
    later = outputs[:100] + outputs[101:]
    assert kinds(judge_live(by_partition(outputs), by_partition(later))) == {"vanished"}


def test_record_that_a_live_reader_did_not_see_is_skipped(outputs) -> None:
    assert kinds(judge_live(by_partition(outputs[:100] + outputs[101:]), by_partition(outputs))) == {
        "skipped"
    }


def test_offset_that_a_live_reader_got_twice_is_repeated(outputs) -> None:
    seen = by_partition(outputs)
    seen[0].append(seen[0][-1])
    assert kinds(judge_live(seen, by_partition(outputs))) == {"repeated"}


def test_last_stable_offset_below_the_end_is_an_open_transaction() -> None:
    verdict = judge_ends({("out", 0): (10, 10), ("out", 1): (7, 9)})
    assert kinds(verdict) == {"open"}
    assert "out[1]: last stable offset 7, high watermark 9" in verdict.report()


def test_generated_records_are_the_same_for_the_same_seed() -> None:
    assert list(generate_records(50, keys=5, seed=3)) == list(generate_records(50, keys=5, seed=3))
    assert list(generate_records(50, keys=5, seed=3)) != list(generate_records(50, keys=5, seed=4))


def test_second_generated_part_continues_each_keys_sequence() -> None:
    sequences: dict[str, int] = {}
    first = list(generate_records(100, keys=5, seed=3, sequences=sequences))
    second = list(generate_records(100, keys=5, seed=4, first_id=100, sequences=sequences))
    assert judge_totals(first + second, []).counts["input"] == 0


def test_record_is_decoded_as_it_was_encoded() -> None:
    record = next(generate_records(1, keys=3))
    assert decode_input(encode_input(record, 42), 1, 9) == record._replace(
        partition=1, offset=9, produced_at_ns=42
    )


@pytest.mark.parametrize("value", [None, b"", b"{", b"[1]", b'{"id": 1}'])
def test_value_of_another_kind_is_malformed(value: bytes | None) -> None:
    with pytest.raises(MalformedRecord):
        decode_output(value, 0, 0)
    with pytest.raises(MalformedRecord):
        decode_input(value, 0, 0)


# --- a producer that writes records again ---------------------------------------------------------------


def with_repeats(inputs: list[InputRecord], first: int, last: int) -> list[InputRecord]:
    """The same source, with the records from `first` to before `last` repeated in one partition."""
    rows = [row for row in inputs if row.partition == 1]
    rows[last:last] = rows[first:last]
    again = iter(row._replace(offset=offset) for offset, row in enumerate(rows))
    others = [row for row in inputs if row.partition != 1]
    return [*others, *again]


def test_record_that_is_twice_in_the_source_has_two_outputs(inputs) -> None:
    again = with_repeats(inputs, 40, 70)
    for verdict in (
        judge_totals(again, totals_of(again)),
        judge_regrouped(again, totals_of(again, regroup=True), GROUPS),
        judge_uncommitted(again, [*totals_of(again), *totals_of(again)[300:500]]),
        judge_between(again, {0: again}),
        judge_between(again, {0: again[len(inputs) - 150 :]}),
    ):
        assert verdict.ok, verdict.report()
    verdict = judge_totals(again, totals_of(again))
    assert (verdict.inputs, verdict.repeated_inputs) == (630, 30)
    assert "30 records stand in the source again" in verdict.report()


@pytest.mark.parametrize("regroup", [False, True])
def test_missing_output_of_a_repeat_is_lost(inputs, regroup) -> None:
    again = with_repeats(inputs, 40, 70)
    outputs = totals_of(again, regroup=regroup)
    seen: set[int] = set()
    index = next(i for i, row in enumerate(outputs) if row.id in seen or seen.add(row.id))
    del outputs[index]
    verdict = judge_regrouped(again, outputs, GROUPS) if regroup else judge_totals(again, outputs)
    assert verdict.counts["lost"] == 1


@pytest.mark.parametrize("regroup", [False, True])
def test_third_output_of_a_record_that_is_twice_in_the_source_is_repeated(inputs, regroup) -> None:
    again = with_repeats(inputs, 40, 41)
    outputs = totals_of(again, regroup=regroup)
    twice = next(row for row in reversed(outputs) if sum(row.id == other.id for other in outputs) == 2)
    outputs.append(twice._replace(at_offset=len(outputs)))
    verdict = judge_regrouped(again, outputs, GROUPS) if regroup else judge_totals(again, outputs)
    assert verdict.counts["repeated"] == 1


def test_same_id_with_another_content_is_not_a_repeat(inputs) -> None:
    strange = inputs[50]._replace(value=inputs[50].value + 1, offset=10_000)
    assert "input" in kinds(judge_totals([*inputs, strange], totals_of([*inputs, strange])))
