"""The checker's verdict.

Responsible for: comparing what a job wrote with what it must have written. It is pure: records in, verdict
out. It trusts nothing that the job says about itself, and recomputes every expected output with a fold over
the input. Must not read Kafka, files or the clock.

Kinds of findings:

    lost         an input before the committed offset has no output
    repeated     an input has more than one output
    unexpected   an output without an input before the committed offset
    reordered    a key's outputs stand in another order than its inputs
    wrong        count, sum, sequence, or the named place of the input differ from the fold's
    sequence     a key's sequences in the output are not 1, 2, 3, ... (seen from the output alone)
    misplaced    one key's outputs stand in more than one partition
    malformed    a record that is no output of the job
    input        the input itself is not what the generator writes: the test is broken, not the job
    state        the job's state differs from a fold of the input up to the committed offsets
    vanished     a read_committed reader saw a record that a later reader doesn't find
    skipped      a live reader passed over a record that a later reader finds
    open         a transaction is left open: the last stable offset stays below the high watermark
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.checker.records import InputRecord, OutputRecord, group_of
from tests.checker.repeats import Repeats

EXAMPLES_MAX = 5

KINDS = (
    "lost",
    "repeated",
    "unexpected",
    "reordered",
    "wrong",
    "sequence",
    "misplaced",
    "malformed",
    "input",
    "state",
    "vanished",
    "skipped",
    "open",
)


@dataclass
class Verdict:
    """What was found. It is `ok` only if there is no finding of any kind."""

    title: str = ""
    inputs: int = 0
    outputs: int = 0
    keys: int = 0
    repeated_inputs: int = 0
    """How many of the `inputs` their producer wrote twice; see `repeats`."""
    counts: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list[str])

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not any(self.counts.values())

    def found(self, kind: str, example: str) -> None:
        """Count one finding and keep the first few as examples."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of finding")
        self.counts[kind] += 1
        if len(self.examples[kind]) < EXAMPLES_MAX:
            self.examples[kind].append(example)

    def merge(self, other: Verdict) -> Verdict:
        """Add the findings and notes of another part of the same check. Returns self."""
        self.counts.update(other.counts)
        for kind, examples in other.examples.items():
            room = EXAMPLES_MAX - len(self.examples[kind])
            self.examples[kind].extend(examples[:room])
        self.notes.extend(other.notes)
        return self

    def report(self) -> str:
        """The verdict for people: one line with the result, then each kind with its count and examples."""
        name = f"{self.title}: " if self.title else ""
        result = "exactly once" if self.ok else "NOT exactly once"
        lines = [f"{name}{result}: {self.inputs} inputs, {self.outputs} outputs, {self.keys} keys"]
        for kind in KINDS:
            if not self.counts[kind]:
                continue
            lines.append(f"  {kind}: {self.counts[kind]}")
            lines.extend(f"    {example}" for example in self.examples[kind])
            hidden = self.counts[kind] - len(self.examples[kind])
            if hidden > 0:
                lines.append(f"    ... and {hidden} more")
        lines.extend(f"  {note}" for note in self.notes)
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Expected:
    """The fold's result for one input."""

    record: InputRecord
    count: int
    sum: int


def fold_by_key(inputs: Iterable[InputRecord]) -> dict[str, list[Expected]]:
    """Running count and sum for each key, in input order."""
    by_key: dict[str, list[Expected]] = defaultdict(list)
    for record in inputs:
        rows = by_key[record.key]
        total = (rows[-1].sum if rows else 0) + record.value
        rows.append(Expected(record, len(rows) + 1, total))
    return by_key


def judge_totals(inputs: Sequence[InputRecord], outputs: Sequence[OutputRecord], title: str = "") -> Verdict:
    """The verdict on a job that writes running totals per key, one output for each input.

    Args:
        inputs: the source records before the committed offsets, each partition in offset order.
        outputs: the read_committed output to its end, each partition in offset order.
        title: names the check in the report.
    """
    verdict = Verdict(title, len(inputs), len(outputs))
    inputs, outputs = _told_apart(inputs, outputs, verdict)
    expected_by_key = fold_by_key(inputs)
    verdict.keys = len(expected_by_key)
    _judge_input(expected_by_key, verdict)
    actual_by_key = _grouped(outputs, lambda output: output.key)
    for key in expected_by_key.keys() | actual_by_key.keys():
        expected = expected_by_key.get(key, [])
        actual = actual_by_key.get(key, [])
        if not _same(expected, actual):
            _judge_presence([row.record for row in expected], actual, verdict)
            _judge_order([row.record.id for row in expected], actual, f"key {key}", verdict)
            _judge_values({row.record.id: row for row in expected}, actual, verdict)
        _judge_sequences(key, actual, verdict)
        _judge_placement(f"key {key}", actual, verdict)
    return verdict


def judge_regrouped(
    inputs: Sequence[InputRecord], outputs: Sequence[OutputRecord], group_count: int, title: str = ""
) -> Verdict:
    """The verdict on a job that repartitions and writes running totals per group. The job must have caught
    up.

    Records of different source partitions may meet in any order, so a group's order is taken from the output.
    But the records of a key keep their order, and count and sum must be the fold of the group's inputs in the
    order that the output claims.
    """
    verdict = Verdict(title, len(inputs), len(outputs))
    inputs, outputs = _told_apart(inputs, outputs, verdict)
    by_id = {record.id: record for record in inputs}
    expected_by_key = fold_by_key(inputs)
    verdict.keys = len(expected_by_key)
    _judge_input(expected_by_key, verdict)
    _judge_presence(inputs, outputs, verdict)
    for group, actual in _grouped(outputs, lambda output: output.group).items():
        _judge_group_fold(group, actual, by_id, group_count, verdict)
        _judge_placement(f"group {group}", actual, verdict)
    for key, actual in _grouped(outputs, lambda output: output.key).items():
        _judge_order([row.record.id for row in expected_by_key.get(key, [])], actual, f"key {key}", verdict)
        _judge_sequences(key, actual, verdict)
    return verdict


def judge_uncommitted(
    inputs: Sequence[InputRecord], outputs: Sequence[OutputRecord], title: str = ""
) -> Verdict:
    """The verdict on what a read_uncommitted reader saw: repeats are allowed, but each one must be
    correct.

    `inputs` is the whole source topic, because a reader may see what isn't committed yet. This is only for
    the job without a repartition, whose output depends only on its input.
    """
    verdict = Verdict(title, len(inputs), len(outputs))
    inputs, outputs = _told_apart(inputs, outputs, verdict)
    expected_by_key = fold_by_key(inputs)
    verdict.keys = len(expected_by_key)
    expected = {row.record.id: row for rows in expected_by_key.values() for row in rows}
    seen: Counter[int] = Counter(output.id for output in outputs)
    for record in inputs:
        if record.id not in seen:
            verdict.found("lost", f"{_place(record)} never seen")
    for output in outputs:
        if output.id not in expected:
            verdict.found("unexpected", _describe(output))
    _judge_values(expected, outputs, verdict)
    repeats = sum(seen.values()) - len(seen)
    verdict.notes.append(f"{repeats} repeats of aborted transactions, all of them checked")
    return verdict


def judge_state(
    expected: Mapping[str, Mapping[str, Any]], actual: Mapping[str, Mapping[str, Any]], title: str = "state"
) -> Verdict:
    """The verdict on state: for each key, the dict that the job keeps compared with that of the fold."""
    verdict = Verdict(title, keys=len(expected))
    for key, wanted in expected.items():
        if key not in actual:
            verdict.found("state", f"{title}: {key} is missing, should be {dict(wanted)}")
        elif dict(actual[key]) != dict(wanted):
            verdict.found("state", f"{title}: {key} is {dict(actual[key])}, should be {dict(wanted)}")
    for key in actual.keys() - expected.keys():
        verdict.found("state", f"{title}: {key} is {dict(actual[key])}, should not exist")
    return verdict


def state_by_key(inputs: Iterable[InputRecord]) -> dict[str, dict[str, int]]:
    """The state that the totals job must hold after `inputs`."""
    return {key: {"count": rows[-1].count, "sum": rows[-1].sum} for key, rows in fold_by_key(inputs).items()}


def state_by_group(inputs: Iterable[InputRecord], group_count: int) -> dict[str, dict[str, int]]:
    """The state that the regrouping job must hold after `inputs`."""
    state: dict[str, dict[str, int]] = {}
    for record in inputs:
        totals = state.setdefault(group_of(record.key, group_count), {"count": 0, "sum": 0})
        totals["count"] += 1
        totals["sum"] += record.value
    return state


def judge_live(
    live: Mapping[int, Sequence[OutputRecord]],
    final: Mapping[int, Sequence[OutputRecord]],
    title: str = "live reader",
) -> Verdict:
    """The verdict on a reader that ran next to the job: it must have seen exactly what a later reader
    sees.

    Args:
        live: by partition, what the live reader received, in the order in which it received it.
        final: the same from a reader that started from the beginning after everything had ended.
        title: names the check in the report.
    """
    verdict = Verdict(title)
    for partition, seen in live.items():
        later = final.get(partition, ())
        verdict.inputs += len(later)
        verdict.outputs += len(seen)
        if list(seen) == list(later):
            continue
        later_at = {output.at_offset: output for output in later}
        last_offset = -1
        for output in seen:
            if later_at.get(output.at_offset) != output:
                verdict.found("vanished", f"seen live, not there later: {_describe(output)}")
            if output.at_offset <= last_offset:
                verdict.found("repeated", f"live reader got an offset again: {_describe(output)}")
            last_offset = max(last_offset, output.at_offset)
        seen_at = {output.at_offset for output in seen}
        for output in later:
            if output.at_offset <= last_offset and output.at_offset not in seen_at:
                verdict.found("skipped", f"passed over by the live reader: {_describe(output)}")
    return verdict


def judge_between(
    inputs: Iterable[InputRecord], seen: Mapping[int, Sequence[InputRecord]], title: str = "between"
) -> Verdict:
    """The verdict on a repartition topic, which the job writes and reads: each input once, and each key in
    order.

    Args:
        inputs: the whole source topic.
        seen: what a read_committed reader saw while the job ran. At the beginning of each key, records that
            were deleted before the reader came may be missing, but no others.
        title: names the check in the report.
    """
    repeats = Repeats(list(inputs))
    if repeats:
        seen = repeats.of_copies(seen)
    rows = [row for partition in sorted(seen) for row in seen[partition]]
    verdict = Verdict(title, outputs=len(rows))
    expected = fold_by_key(repeats.inputs)
    at: dict[str, InputRecord] = {}
    for row in rows:
        before = at.get(row.key)
        wanted = expected.get(row.key, [])
        place = f"input {row.id} (key {row.key}, sequence {row.sequence}) at [{row.partition}]@{row.offset}"
        if not 0 < row.sequence <= len(wanted) or wanted[row.sequence - 1].record.id != row.id:
            verdict.found("unexpected", f"{title}: {place}")
            continue
        if before is not None and row.sequence <= before.sequence:
            verdict.found("repeated", f"{title}: {place} behind sequence {before.sequence}")
            continue
        if before is not None and row.sequence > before.sequence + 1:
            verdict.found("lost", f"{title}: {before.sequence + 1} to {row.sequence - 1} before {place}")
        if before is not None and row.partition != before.partition:
            verdict.found("misplaced", f"{title}: {place}, before in {before.partition}")
        if row.value != wanted[row.sequence - 1].record.value:
            verdict.found("wrong", f"{title}: {place} has another value")
        at[row.key] = row
    for key, row in at.items():
        if row.sequence < len(expected[key]):
            verdict.found("lost", f"{title}: key {key} ends at {row.sequence} of {len(expected[key])}")
    verdict.notes.append(f"{len(rows)} records in the repartition topic, each key's in order")
    return verdict


def judge_ends(ends: Mapping[tuple[str, int], tuple[int, int]]) -> Verdict:
    """The verdict on open transactions: by (topic, partition), the last stable offset and the high
    watermark.
    """
    verdict = Verdict("transactions")
    for (topic, partition), (stable, high) in sorted(ends.items()):
        if stable < high:
            verdict.found("open", f"{topic}[{partition}]: last stable offset {stable}, high watermark {high}")
    return verdict


def _told_apart(
    inputs: Sequence[InputRecord], outputs: Sequence[OutputRecord], verdict: Verdict
) -> tuple[Sequence[InputRecord], Sequence[OutputRecord]]:
    """Both, with their own ids for records that are in the source twice."""
    repeats = Repeats(inputs)
    if not repeats:
        return inputs, outputs
    verdict.notes.append(repeats.note())
    verdict.repeated_inputs = repeats.count
    return repeats.inputs, repeats.of_outputs(outputs)


def _same(expected: Sequence[Expected], actual: Sequence[OutputRecord]) -> bool:
    return len(expected) == len(actual) and all(
        row.record.id == output.id and not _differences(row, output)
        for row, output in zip(expected, actual, strict=True)
    )


def _differences(row: Expected, output: OutputRecord) -> list[str]:
    """Where `output` differs from the fold. A position that the job doesn't report isn't compared."""
    wanted = [
        ("key", row.record.key, output.key),
        ("sequence", row.record.sequence, output.sequence),
        ("count", row.count, output.count),
        ("sum", row.sum, output.sum),
    ]
    if output.offset >= 0 or output.partition >= 0:
        wanted.append(("partition", row.record.partition, output.partition))
        wanted.append(("offset", row.record.offset, output.offset))
    return [f"{name} {got}, should be {want}" for name, want, got in wanted if want != got]


def _judge_input(expected_by_key: Mapping[str, Sequence[Expected]], verdict: Verdict) -> None:
    ids: set[int] = set()
    for key, rows in expected_by_key.items():
        partitions = {row.record.partition for row in rows}
        if len(partitions) > 1:
            verdict.found("input", f"key {key} stands in the partitions {sorted(partitions)}")
        for number, row in enumerate(rows, start=1):
            if row.record.sequence != number:
                verdict.found("input", f"key {key}: sequence {row.record.sequence} where {number} should be")
            if row.record.id in ids:
                verdict.found("input", f"id {row.record.id} twice in the input")
            ids.add(row.record.id)


def _judge_presence(inputs: Iterable[InputRecord], outputs: Iterable[OutputRecord], verdict: Verdict) -> None:
    first_of: dict[int, OutputRecord] = {}
    for output in outputs:
        if output.id in first_of:
            verdict.found("repeated", f"{_describe(output)}; first at {_at(first_of[output.id])}")
        else:
            first_of[output.id] = output
    known: set[int] = set()
    for record in inputs:
        known.add(record.id)
        if record.id not in first_of:
            verdict.found("lost", f"{_place(record)} has no output")
    for number, output in first_of.items():
        if number not in known:
            verdict.found("unexpected", f"{_describe(output)} has no input before the committed offset")


def _judge_order(
    expected_ids: Sequence[int], actual: Sequence[OutputRecord], what: str, verdict: Verdict
) -> None:
    """Repeats and outputs without an input are left out, because they are findings of their own."""
    rank = {number: index for index, number in enumerate(expected_ids)}
    seen: set[int] = set()
    before: OutputRecord | None = None
    for output in actual:
        if output.id not in rank or output.id in seen:
            continue
        seen.add(output.id)
        if before is not None and rank[output.id] < rank[before.id]:
            verdict.found("reordered", f"{what}: {_describe(output)} after {_describe(before)}")
        before = output


def _judge_values(expected: Mapping[int, Expected], actual: Iterable[OutputRecord], verdict: Verdict) -> None:
    for output in actual:
        row = expected.get(output.id)
        if row is None:
            continue
        differences = _differences(row, output)
        if differences:
            verdict.found("wrong", f"{_describe(output)}: {'; '.join(differences)}")


def _judge_group_fold(
    group: str,
    actual: Sequence[OutputRecord],
    by_id: Mapping[int, InputRecord],
    group_count: int,
    verdict: Verdict,
) -> None:
    count, total = 0, 0
    for output in actual:
        record = by_id.get(output.id)
        if record is None:
            continue
        count += 1
        total += record.value
        wanted = (record.key, record.sequence, group_of(record.key, group_count), count, total)
        got = (output.key, output.sequence, group, output.count, output.sum)
        if wanted != got:
            verdict.found(
                "wrong", f"{_describe(output)}: (key, sequence, group, count, sum) {got}, should be {wanted}"
            )


def _judge_sequences(key: str, actual: Sequence[OutputRecord], verdict: Verdict) -> None:
    for number, output in enumerate(actual, start=1):
        if output.sequence != number:
            verdict.found("sequence", f"key {key}: {_describe(output)} where sequence {number} should be")
            return


def _judge_placement(what: str, actual: Sequence[OutputRecord], verdict: Verdict) -> None:
    partitions = {output.at_partition for output in actual}
    if len(partitions) > 1:
        verdict.found("misplaced", f"{what} stands in the output partitions {sorted(partitions)}")


def _grouped(outputs: Iterable[OutputRecord], of: Any) -> dict[str, list[OutputRecord]]:
    groups: dict[str, list[OutputRecord]] = defaultdict(list)
    for output in outputs:
        groups[of(output)].append(output)
    return groups


def _place(record: InputRecord) -> str:
    at = f"[{record.partition}]@{record.offset}"
    return f"input {record.id} (key {record.key}, sequence {record.sequence}, at {at})"


def _at(output: OutputRecord) -> str:
    return f"[{output.at_partition}]@{output.at_offset}"


def _describe(output: OutputRecord) -> str:
    return f"output of {output.id} (key {output.key}, sequence {output.sequence}) at {_at(output)}"
