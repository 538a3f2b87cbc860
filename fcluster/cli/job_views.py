"""How `fcluster check` shows a job: as text, as a Mermaid diagram and as JSON; and its findings.

Responsible for: the form only. Names come from a user's job, so each form escapes them. Must not know what a
finding means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import orjson

from fcluster.cli.diagram import Node, Shape, diagram_of
from fcluster.graph.outline import Flow, InputOutline, JobOutline, StepOutline
from fcluster.graph.timestamps import FROM_KAFKA

if TYPE_CHECKING:
    from fcluster.cli.check import Finding

_LEVEL_WIDTH = len("warning")


def as_json(job: JobOutline, findings: Sequence[Finding], *, offline: bool) -> str:
    """One JSON document. `findings` is null if the brokers weren't asked, and the job alone is as it should
    be.
    """
    found = None if offline and not findings else findings
    return orjson.dumps({"job": job, "findings": found}, option=orjson.OPT_INDENT_2).decode()


# --- text ----------------------------------------------------------------------------------------------


def as_text(job: JobOutline) -> list[str]:
    """The job in lines: its topics, then its stages with their steps."""
    lines = [f"job {job.job!r}, topology {job.fingerprint}", "", "topics"]
    width = max(len(topic.name) for topic in job.topics)
    for topic in job.topics:
        parts = [f"{topic.key} keys", f"{topic.value} values"] if topic.key is not None else []
        parts += [topic.isolation] if topic.isolation is not None else []
        described = f": {', '.join(parts)}" if parts else ""
        lines.append(f"  {topic.name:{width}}  {', '.join(topic.roles)}{described}")
    for stage in job.stages:
        lines += ["", f"stage {stage.name!r}"]
        lines += [f"  reads {_input_text(source)}" for source in stage.inputs]
        lines.append(
            f"  keeps its state in {stage.changelog}" if stage.changelog is not None else "  has no state"
        )
        for chain in stage.chains:
            lines.append(f"  chain {chain.name!r}, of {chain.topic}")
            lines += [f"    {line}" for step in chain.steps for line in _step_lines(step)]
    return lines


def _input_text(source: InputOutline) -> str:
    parts = [source.topic]
    if source.watermark is not None and source.internal:
        parts.append("event time is that of the stages before")
    elif source.watermark is not None:
        idle_ms = source.watermark.idle_ms
        idle = "" if idle_ms is None else f", idle after {idle_ms} ms"
        drift_ms = source.watermark.max_drift_ms
        drift = "" if drift_ms is None else f", at most {drift_ms} ms ahead of others"
        parts.append(f"event time: delay {source.watermark.max_delay_ms} ms{idle}{drift}")
    if source.timestamp != FROM_KAFKA:
        parts.append(f"timestamps {source.timestamp}")
    parts += _failures_text(source.on_error, source.writes)
    return "; ".join(parts)


def _failures_text(rule: str, writes: Sequence[Flow]) -> list[str]:
    topics = [flow.topic for flow in writes if flow.what == "failures"]
    return [] if rule == "stop" else [f"failures: {' to '.join([rule, *topics])}"]


def _step_lines(step: StepOutline) -> Iterator[str]:
    yield f"{step.kind} {step.name!r}" if step.state else f"{step.kind} {step.name}".rstrip()
    for name, text in step.details.items():
        if name != "on_error":
            yield f"  {name}: {text}"
    if step.state:
        yield f"  state: {', '.join(step.state)}"
    for flow in step.writes:
        if flow.what not in ("results", "failures"):
            yield f"  {flow.what}: to {flow.topic}"
    for text in _failures_text(step.details.get("on_error", "stop"), step.writes):
        yield f"  {text}"


def findings_as_text(findings: Sequence[Finding]) -> list[str]:
    """The findings in lines, by subject, and how many errors and warnings there are."""
    lines: list[str] = []
    for subject in dict.fromkeys(finding.subject for finding in findings):
        lines += ["", subject]
        for finding in findings:
            if finding.subject == subject:
                message = finding.message.replace("\n", f"\n  {'':{_LEVEL_WIDTH}}  ")
                lines.append(f"  {finding.level:{_LEVEL_WIDTH}}  {message}")
                lines += [f"  {'':{_LEVEL_WIDTH}}  remedy: {finding.remedy}"] if finding.remedy else []
    return [*lines, "", _verdict(findings)] if lines else []


def _verdict(findings: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    named = [f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts.items() if count]
    return ", ".join(named) or "nothing stands in the way of a start"


# --- Mermaid -------------------------------------------------------------------------------------------

_SPECIAL = re.compile(r"[^\w .,:/()=+*-]", re.ASCII)
"""What could mean something in a quoted label of Mermaid, or in the HTML that it becomes."""


_BRACKETS: Mapping[Shape, tuple[str, str]] = {
    "topic": ("[(", ")]"),
    "step": ("[", "]"),
    "step with state": ("[[", "]]"),
}


def as_mermaid(job: JobOutline) -> list[str]:
    """A flowchart of the job in Mermaid's language, in lines."""
    diagram = diagram_of(job)
    lines = ["flowchart LR", *(f"  {_node(topic)}" for topic in diagram.topics)]
    for box in diagram.boxes:
        steps = (node for chain in box.chains for node in chain)
        lines += [
            f'  subgraph {box.name}["{_label(box.label)}"]',
            *(f"    {_node(step)}" for step in steps),
            "  end",
        ]
    for arrow in diagram.arrows:
        drawn = f'-. "{arrow.label}" .->' if arrow.label else "-->"
        lines.append(f"  {arrow.begin} {drawn} {arrow.end}")
    return lines


def _node(node: Node) -> str:
    opening, closing = _BRACKETS[node.shape]
    return f'{node.name}{opening}"{_label(node.label)}"{closing}'


def _label(text: str) -> str:
    return _SPECIAL.sub(lambda match: f"#{ord(match[0])};", text)
