"""The checker of long runs accepts a correct run, and names each kind of error."""

from __future__ import annotations

import random

import pytest

from tests.checker.records import InputRecord, OutputRecord, generate_records, group_of
from tests.checker.stream import Aborted, Blocks, Fold, judge_blocks
from tests.checker.verdict import Verdict, judge_between, state_by_group, state_by_key

PARTITIONS = 3
GROUPS = 4


def made(group_count: int, seed: int = 5) -> tuple[list[InputRecord], list[OutputRecord]]:
    """The input, and the outputs of a correct job."""
    inputs: list[InputRecord] = []
    offsets = [0] * PARTITIONS
    for record in generate_records(400, keys=20, seed=seed, hot_keys=3):
        partition = int(record.key[1:]) % PARTITIONS
        inputs.append(record._replace(partition=partition, offset=offsets[partition]))
        offsets[partition] += 1
    return inputs, outputs_of(inputs, group_count)


def outputs_of(inputs: list[InputRecord], group_count: int) -> list[OutputRecord]:
    """The outputs of a correct job."""
    totals: dict[str, tuple[int, int]] = {}
    outputs: list[OutputRecord] = []
    for r in inputs:
        group = group_of(r.key, group_count) if group_count else r.key
        count, total = totals.get(group, (0, 0))
        totals[group] = count, total = count + 1, total + r.value
        place = int(group[1:]) % PARTITIONS
        at = (-1, -1) if group_count else (r.partition, r.offset)
        outputs.append(OutputRecord(r.id, r.key, r.sequence, group, count, total, *at, place, len(outputs)))
    return outputs


def judged(inputs: list[InputRecord], outputs: list[OutputRecord], group_count: int = 0) -> Verdict:
    """Feed the checker as two readers would, with sometimes one and sometimes the other a little ahead."""
    draw, fold = random.Random(1), Fold(group_count)
    left, right = list(inputs), list(outputs)
    while left or right:
        for _ in range(draw.randrange(20)):
            if left:
                fold.take_input(left.pop(0))
        for _ in range(draw.randrange(20)):
            if right:
                fold.take_output(right.pop(0))
        fold.settle()
    return fold.finish()


@pytest.mark.parametrize("group_count", [0, GROUPS])
def test_correct_run_is_accepted(group_count: int) -> None:
    inputs, outputs = made(group_count)
    verdict = judged(inputs, outputs, group_count)
    assert verdict.ok, verdict.report()
    assert (verdict.inputs, verdict.outputs, verdict.keys) == (400, 400, 20)


@pytest.mark.parametrize("group_count", [0, GROUPS])
def test_expected_state_is_that_of_the_other_checker(group_count: int) -> None:
    inputs, _ = made(group_count)
    fold = Fold(group_count)
    for record in inputs:
        fold.take_input(record)
    assert fold.state() == (state_by_group(inputs, group_count) if group_count else state_by_key(inputs))


@pytest.mark.parametrize("group_count", [0, GROUPS])
def test_lost_output_is_found(group_count: int) -> None:
    inputs, outputs = made(group_count)
    verdict = judged(inputs, outputs[:200] + outputs[201:], group_count)
    assert verdict.counts["lost"] == 1
    last = judged(inputs, outputs[:-1], group_count)
    assert last.counts["lost"] == 1
    assert last.counts.total() == 1


@pytest.mark.parametrize("group_count", [0, GROUPS])
def test_repeated_output_is_found(group_count: int) -> None:
    inputs, outputs = made(group_count)
    assert judged(inputs, [*outputs, outputs[-1]], group_count).counts["repeated"] == 1
    assert judged(inputs, [*outputs[:99], *outputs[50:]], group_count).counts["repeated"] == 49


def test_two_outputs_of_one_key_in_the_wrong_order_are_found() -> None:
    inputs, outputs = made(0)
    first, second = [at for at, output in enumerate(outputs) if output.key == outputs[0].key][:2]
    outputs[first], outputs[second] = outputs[second], outputs[first]
    assert judged(inputs, outputs).counts["sequence"] > 0


@pytest.mark.parametrize("group_count", [0, GROUPS])
@pytest.mark.parametrize("change", [{"sum": 1_000_000}, {"count": 77}])
def test_wrong_total_is_found(group_count: int, change: dict[str, int]) -> None:
    inputs, outputs = made(group_count)
    outputs[100] = outputs[100]._replace(**change)
    assert judged(inputs, outputs, group_count).counts["wrong"] in (1, 2)  # and the next total


def test_output_without_an_input_is_found() -> None:
    inputs, outputs = made(0)
    assert judged(inputs[:-1], outputs).counts["unexpected"] == 1
    strange = outputs[10]._replace(id=12345)
    assert judged(inputs, [*outputs[:20], strange, *outputs[20:]]).counts.total() == 1


def test_output_that_names_another_place_of_its_input_is_found() -> None:
    inputs, outputs = made(0)
    outputs[7] = outputs[7]._replace(offset=999)
    assert judged(inputs, outputs).counts["wrong"] == 1


def test_key_in_two_output_partitions_is_found() -> None:
    inputs, outputs = made(0)
    last = next(at for at in range(399, 0, -1) if outputs[at].sequence > 1)
    outputs[last] = outputs[last]._replace(at_partition=(outputs[last].at_partition + 1) % PARTITIONS)
    verdict = judged(inputs, outputs)
    assert verdict.counts["misplaced"] >= 1, verdict.report()


def again(inputs: list[InputRecord], count: int, behind: int) -> list[InputRecord]:
    """Let the test's producer write the first `count` records again, after the first `behind` ones."""
    ends = [sum(record.partition == partition for record in inputs) for partition in range(PARTITIONS)]
    rewritten: list[InputRecord] = []
    for record in [*inputs[:behind], *inputs[:count], *inputs[behind:]]:
        offset = sum(other.partition == record.partition for other in rewritten)
        rewritten.append(record._replace(offset=offset))
    assert len(rewritten) == sum(ends) + count
    return rewritten


@pytest.mark.parametrize("group_count", [0, GROUPS])
def test_record_that_the_producer_wrote_twice_has_two_outputs_and_not_three(group_count: int) -> None:
    inputs = again(made(group_count)[0], 30, 50)
    outputs = outputs_of(inputs, group_count)
    verdict = judged(inputs, outputs, group_count)
    assert verdict.ok, verdict.report()
    assert verdict.repeated_inputs == 30
    assert "30 records stand in the source again" in verdict.report()
    assert judged(inputs, [*outputs, outputs[60]], group_count).counts["repeated"] == 1
    assert judged(inputs, outputs[:60] + outputs[61:], group_count).counts["lost"] == 1


def test_gap_in_the_input_is_reported_as_an_error_of_the_test() -> None:
    inputs, outputs = made(0)
    assert judged(inputs[1:], outputs[1:]).counts["input"] > 0


def blocks_of(values: list[bytes]) -> dict[int, Blocks]:
    blocks = Blocks()
    for offset, value in enumerate(values):
        blocks.take(offset, value)
    return {0: blocks}


def test_reader_that_saw_the_same_records_agrees() -> None:
    values = [b"%d" % number for number in range(2500)]
    assert judge_blocks(blocks_of(values), blocks_of(values)).ok


def test_record_that_changed_after_it_was_seen_is_found_with_its_place() -> None:
    values = [b"%d" % number for number in range(2500)]
    changed = [*values[:1700], b"x", *values[1701:]]
    verdict = judge_blocks(blocks_of(values), blocks_of(changed))
    assert verdict.counts["vanished"] == 1
    assert "near record 1000" in verdict.report()


def test_skipped_record_is_found() -> None:
    values = [b"%d" % number for number in range(2500)]
    assert judge_blocks(blocks_of(values[:-1]), blocks_of(values)).counts["skipped"] == 1
    assert judge_blocks({}, blocks_of(values)).counts["skipped"] == 1


def test_outputs_that_the_committed_reader_skipped_count_as_aborted() -> None:
    aborted = Aborted()
    for offset in range(10):
        aborted.saw(0, offset, 100 + offset)
    for offset in (0, 1, 4, 5):
        aborted.committed(0, offset)
    assert aborted.times_ns == [102, 103]
    aborted.finish()
    assert aborted.between(103, 107) == 3
    assert aborted.between(0, 1000) == 6


def test_repartition_topic_with_each_input_once_and_in_order_is_accepted() -> None:
    inputs, _ = made(0)
    assert judge_between(inputs, {0: inputs}).ok
    assert judge_between(inputs, {0: inputs[100:]}).ok  # the reader started late


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("repeated", lambda rows: [*rows[:20], *rows[10:]]),
        ("lost", lambda rows: [row for row in rows if (row.key, row.sequence) != (rows[-1].key, 5)]),
        ("lost", lambda rows: rows[:-1]),
        ("unexpected", lambda rows: [*rows[:-1], rows[-1]._replace(id=-5)]),
        ("wrong", lambda rows: [*rows[:-1], rows[-1]._replace(value=123_456)]),
        ("misplaced", lambda rows: [*rows[:-1], rows[-1]._replace(partition=7)]),
    ],
)
def test_repartition_topic_that_is_wrong_is_found(kind: str, change) -> None:
    inputs, _ = made(0)
    hot = [row for row in inputs if row.key == inputs[0].key]
    assert judge_between(hot, {0: change(hot)}).counts[kind] > 0
