"""The slow, obvious interpreter: what a job does, written down again without any code of the engine.

It takes one record after another, copies everything before it touches it, and keeps nothing of a chain that
has failed. It uses the standard library's JSON.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from fcluster import UNSET, Record
from tests.fuzz.plans import (
    SMALL_BYTES_MAX,
    ChainPlan,
    Input,
    JobPlan,
    apply_filter,
    apply_flat_map,
    apply_handler,
    apply_key,
    apply_map,
    apply_peek,
    returned_by_handler,
)

Output = tuple[Any, ...]
"""Topic, value, key, timestamp, headers: in a form that can be compared with what was really written; see
`comparable`.
"""


class Fail(Exception):  # noqa: N818
    """A step failed. Its rule says what follows."""

    def __init__(self, rule: str, name: str) -> None:
        super().__init__(rule)
        self.rule = rule
        self.name = name


class Context:
    """`ctx`, with the state as a plain dict of dicts."""

    def __init__(self, states: dict[bytes, dict[str, Any]], record: Input) -> None:
        self._states = states
        self._record = record

    @property
    def state(self) -> dict[str, Any]:
        if self._record.key is None:
            raise ValueError("no key")
        return self._states.setdefault(self._record.key, {})

    @property
    def key(self) -> Any:
        return None if self._record.key is None else self._record.key.decode()

    @property
    def timestamp(self) -> int:
        return self._record.timestamp

    @property
    def headers(self) -> Any:
        return self._record.headers


def interpret(plan: JobPlan, records: list[Input]) -> tuple[list[Output], int | None, int, dict[str, Any]]:
    """All outputs, where the job stopped (None: at the end), how many chains failed, and all states."""
    states: dict[str, Any] = {}
    outputs: list[Output] = []
    failed = 0
    for offset, record in enumerate(records):
        try:
            written, new_states, failures = one_record(plan, record, offset, states)
        except Fail:
            return outputs, offset, failed, states
        outputs += written
        states = new_states
        failed += failures
    return outputs, None, failed, states


def one_record(
    plan: JobPlan, record: Input, offset: int, states: dict[str, Any]
) -> tuple[list[Output], dict[str, Any], int]:
    """The effects of one record. Raises Fail if it stops the job."""
    try:
        decode(plan.value, record.value)
    except ValueError:
        rule = source_rule(plan)
        return dead_letter(rule, "", record, offset), states, 1
    outputs: list[Output] = []
    failures = 0
    for number, chain in enumerate(plan.chains):
        after = copy.deepcopy(states)
        try:
            written = list(run_chain(plan, number, chain, record, after))
            for output, rule, name in written:
                if size_of(output) > SMALL_BYTES_MAX:
                    raise Fail(rule, name)
            for name, table in after.items():
                for state in table.values():
                    if "odd" in state:
                        handler, place = name.split("|")
                        raise Fail(rule_of_handler(plan, int(handler), int(place)), f"h{handler}x{place}")
        except Fail as failure:
            failures += 1
            outputs += dead_letter(failure.rule, failure.name, record, offset)
        else:
            outputs += [output for output, _rule, _name in written]
            states = after
    return outputs, states, failures


def rule_of_handler(plan: JobPlan, chain: int, place: int) -> str:
    return plan.chains[chain].steps[place].rule or plan.default_rule or "stop"


def run_chain(
    plan: JobPlan, number: int, chain: ChainPlan, record: Input, states: dict[str, Any]
) -> Iterator[tuple[Output, str, str]]:
    """The outputs of a chain, each with the rule and the name of the step that is responsible for it."""
    handlers = [place for place, step in enumerate(chain.steps) if step.kind == "process"]
    calls = [place for place, step in enumerate(chain.steps) if step.kind == "map_async"]
    reached: list[Any] = []
    is_raw = plan.value == sink_kind(chain.sink) and all(
        step.kind in ("filter", "peek") for step in chain.steps
    )

    def through(place: int, value: Any) -> Iterator[tuple[Output, str, str]]:
        if place == len(chain.steps):
            yield write(value)
            return
        if place in calls:
            reached.append(copy.deepcopy(value))
            return
        step = chain.steps[place]
        rule = step.rule or plan.default_rule or "stop"
        name = f"h{number}x{place}" if step.kind == "process" else step.kind
        without_state = Context({}, record)
        try:
            if step.kind == "filter":
                going_on = [value] if apply_filter(step.behaviour, value, without_state) else []
            elif step.kind == "peek":
                apply_peek(step.behaviour, value, without_state)
                going_on = [value]
            elif step.kind == "map":
                going_on = [apply_map(step.behaviour, value, without_state)]
            elif step.kind == "flat_map":
                going_on = apply_flat_map(step.behaviour, value, without_state)
                if not isinstance(going_on, list | tuple | Iterator):
                    raise TypeError("no list of values")
            else:
                context = Context(states.setdefault(f"{number}|{place}", {}), record)
                if step.behaviour == "returns":
                    going_on = [returned_by_handler(step.behaviour, context, value)]
                else:
                    going_on = apply_handler(step.behaviour, context, value, "elsewhere")
                going_on = iter(going_on)
            for output in going_on:
                if isinstance(output, Record):
                    yield write_record(output, rule, name)
                elif output is not None or step.kind != "process":
                    yield from through(place + 1, output)
        except Fail:
            raise
        except BaseException as error:
            if isinstance(error, GeneratorExit) and not error.__traceback__:
                raise
            raise Fail(rule, name) from error

    def write(value: Any) -> tuple[Output, str, str]:
        last_rule = (
            chain.steps[-1].rule or plan.default_rule if chain.steps else plan.topic_rule or plan.default_rule
        )
        rule = last_rule or "stop"
        key = record.key
        if chain.end == "key_by":
            rule = chain.key_rule or plan.default_rule or "stop"
            try:
                key = apply_key(chain.key_behaviour, value, Context({}, record))
                assert isinstance(key, str)
                key = key.encode()
            except BaseException as error:
                raise Fail(rule, "key_by") from error
        rule = chain.sink_rule or rule
        if is_raw:
            raw = record.value
        elif value is None and record.value is None and not handlers:
            raw = None
        else:
            try:
                raw = encode(sink_kind(chain.sink), value)
            except (TypeError, ValueError) as error:
                raise Fail(rule, "writing") from error
        return (chain.sink, raw, key, record.timestamp, record.headers), rule, "writing"

    def write_record(output: Record, rule: str, name: str) -> tuple[Output, str, str]:
        headers = record.headers if output.headers is UNSET else output.headers or ()
        if any(not isinstance(value, bytes) for _name, value in headers if output.headers is not UNSET):
            raise Fail(rule, name)
        key = record.key if output.key is UNSET else output.key
        if output.value is UNSET:
            raw = record.value
        else:
            raw = None if output.value is None else encode("json", output.value)
        timestamp = record.timestamp if output.timestamp is UNSET else output.timestamp
        return ("elsewhere", raw, key, timestamp, tuple(headers)), rule, name

    def called(place: int, value: Any) -> Any:
        step = chain.steps[place]
        try:
            return apply_map(step.behaviour, value, Context({}, record))
        except BaseException as error:
            raise Fail(step.rule or plan.default_rule or "stop", step.kind) from error

    # All values are there before they are called for, and all results before the steps behind run.
    values, place = [decode(plan.value, record.value)], 0
    for call in calls:
        reached.clear()
        for value in values:
            for _output in through(place, value):
                raise AssertionError("a step in front of a call writes nothing")
        values, place = [called(call, value) for value in reached], call + 1
    for value in values:
        yield from through(place, value)


def source_rule(plan: JobPlan) -> str:
    if plan.topic_rule or plan.default_rule:
        return plan.topic_rule or plan.default_rule or ""
    firsts = {
        next((step.rule or "stop" for step in chain.steps if step.kind == "process"), "stop")
        for chain in plan.chains
    }
    return firsts.pop() if len(firsts) == 1 else "stop"


def dead_letter(rule: str, name: str, record: Input, offset: int) -> list[Output]:
    """Nothing, a dead letter or its stub. Raises Fail for "stop"."""
    if rule == "stop":
        raise Fail(rule, name)
    if rule == "skip":
        return []
    ours = (name, str(offset))
    whole = (rule, record.value, record.key, record.timestamp, (*record.headers, ours))
    if size_of(whole) > SMALL_BYTES_MAX:
        return [(rule, None, record.key, record.timestamp, ("stub", ours))]
    return [whole]


def size_of(output: Output) -> int:
    return len(output[1] or b"") + len(output[2] or b"")


def sink_kind(sink: str) -> str:
    return {"out": "json", "out-text": "text", "out-bytes": "bytes"}[sink]


def decode(kind: str, raw: bytes | None) -> Any:
    if raw is None or kind == "bytes":
        return raw
    if kind == "text":
        return raw.decode()
    value = json.loads(raw, parse_constant=lambda name: int(name))
    raw.decode()
    json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair isn't text
    return value


def encode(kind: str, value: Any) -> bytes:
    if kind == "json":
        if isinstance(value, bytes):
            raise TypeError("bytes")
        return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    if kind == "text":
        if not isinstance(value, str):
            raise TypeError("no text")
        return value.encode()
    if not isinstance(value, bytes):
        raise TypeError("no bytes")
    return value
