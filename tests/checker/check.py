"""The whole check of a job's run: input, output, live reader, open transactions.

Responsible for: reading what the pure verdicts need, and joining them into one. It changes nothing in Kafka.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tests.checker.live import LiveReader
from tests.checker.reading import (
    READ_COMMITTED,
    READ_UNCOMMITTED,
    committed_offsets,
    end_offsets,
    first_record_from,
    read_input,
    read_output,
    topics_with_prefix,
)
from tests.checker.verdict import (
    Verdict,
    judge_ends,
    judge_live,
    judge_regrouped,
    judge_totals,
    judge_uncommitted,
)


def wait_until_committed(brokers: str, job: str, topics: Sequence[str], timeout_s: float) -> None:
    """Wait until the job has committed all records of `topics`.

    For a topic that is written in transactions, the end offset isn't enough: the transactions' markers come
    after the last record, and no committed offset ever passes them. A partition of such a topic counts as
    done when no transaction is open in it, and a read_committed reader that begins at the committed offset
    finds nothing. If one topic feeds another one, name both: committed offsets are read before ends.

    Raises:
        TimeoutError: it hasn't. The message says how far it has come.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        behind = _behind(brokers, job, topics)
        if not behind:
            return
        if time.monotonic() > deadline:
            shown = ", ".join(f"{topic}[{partition}] {why}" for (topic, partition), why in behind.items())
            raise TimeoutError(f"{job} has not caught up in {timeout_s} s: {shown}")
        time.sleep(0.1)


def _behind(brokers: str, job: str, topics: Sequence[str]) -> dict[tuple[str, int], str]:
    """The partitions in which something is uncommitted, and what it is. Empty if there are none."""
    committed = committed_offsets(brokers, job)
    high = end_offsets(brokers, topics, READ_UNCOMMITTED)
    stable = end_offsets(brokers, topics, READ_COMMITTED)
    gaps = {at: committed.get(at, 0) for at, end in high.items() if committed.get(at, 0) < end}
    behind = {
        at: f"has an open transaction at {stable[at]} of {high[at]}" for at in gaps if stable[at] < high[at]
    }
    if not behind:
        found = first_record_from(brokers, gaps)
        if found is not None:
            *at, offset = found
            behind[at[0], at[1]] = f"is committed up to {gaps[at[0], at[1]]}, and a record is at {offset}"
    return behind


def check_totals(
    brokers: str, job: str, source: str, output: str, *, readers: Sequence[LiveReader] = (), title: str = ""
) -> Verdict:
    """Check a run of jobs/running_totals.py, whether or not it has caught up, and whether or not it still
    runs.

    The output is read before the committed offsets, and the input after them. A job that still runs only adds
    output beyond what is compared, which is cut off by the offsets that each output carries.
    """
    final, malformed = read_output(brokers, output)
    committed = _committed_of(brokers, job, source)
    if end_offsets(brokers, [output], READ_COMMITTED) != end_offsets(brokers, [output], READ_COMMITTED):
        raise RuntimeError(f"{job} still writes: stop it, or let it catch up, before the check")
    inputs = read_input(brokers, source, committed)
    verdict = judge_totals(inputs, _in_order(final), title)
    return _complete(verdict, brokers, job, source, output, final, malformed, readers)


def check_regrouped(
    brokers: str,
    job: str,
    source: str,
    output: str,
    groups: int,
    *,
    readers: Sequence[LiveReader] = (),
    title: str = "",
) -> Verdict:
    """Check a run of jobs/regrouped_totals.py. The job must have caught up with all its topics."""
    final, malformed = read_output(brokers, output)
    inputs = read_input(brokers, source, _committed_of(brokers, job, source))
    verdict = judge_regrouped(inputs, _in_order(final), groups, title)
    return _complete(verdict, brokers, job, source, output, final, malformed, readers)


def check_no_open_transactions(brokers: str, job: str, output: str, timeout_s: float = 10) -> Verdict:
    """Whether the last stable offset reaches the high watermark in all topics of the job.

    A transaction that is just being committed gets `timeout_s` to finish.
    """
    topics = [output, *topics_with_prefix(brokers, f"{job}-")]
    deadline = time.monotonic() + timeout_s
    while True:
        high = end_offsets(brokers, topics, READ_UNCOMMITTED)
        stable = end_offsets(brokers, topics, READ_COMMITTED)
        verdict = judge_ends({at: (stable[at], high[at]) for at in high})
        if verdict.ok or time.monotonic() > deadline:
            return verdict
        time.sleep(0.1)


def _complete(
    verdict: Verdict,
    brokers: str,
    job: str,
    source: str,
    output: str,
    final: dict[int, list],
    malformed: Sequence[str],
    readers: Sequence[LiveReader],
) -> Verdict:
    for example in malformed:
        verdict.found("malformed", example)
    verdict.merge(check_no_open_transactions(brokers, job, output))
    for reader in readers:
        if reader.isolation == READ_COMMITTED:
            reader.wait_for({p: rows[-1].at_offset + 1 for p, rows in final.items() if rows}, timeout_s=30)
            verdict.merge(judge_live(reader.seen(), final))
        else:
            high = end_offsets(brokers, [output], READ_UNCOMMITTED)
            reader.wait_for({at[1]: end for at, end in high.items()}, timeout_s=30)
            verdict.merge(judge_uncommitted(read_input(brokers, source), _in_order(reader.seen())))
    return verdict


def _committed_of(brokers: str, job: str, source: str) -> dict[int, int]:
    return {at[1]: offset for at, offset in committed_offsets(brokers, job).items() if at[0] == source}


def _in_order(parts: dict[int, list]) -> list:
    return [row for partition in sorted(parts) for row in parts[partition]]
