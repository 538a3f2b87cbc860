"""`fcluster check`: what a job is, and whether it could start, found out without starting it.

Responsible for: the checks of `fcluster up` and of a coordinator before it leads, all of them, where those
stop at the first problem; and what becomes of existing state. Invariant: nothing is created, changed or
committed, so a job that runs isn't disturbed. Must not format anything: `job_views` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args

from confluent_kafka import TopicPartition

from fcluster.api.loader import load_job
from fcluster.cli.diagram import diagram_of
from fcluster.cli.job_views import as_json, as_mermaid, as_text, findings_as_text
from fcluster.cli.preflight import leader_answers, problems_of_sources, risks_of_loss
from fcluster.cli.startup import start_logging, with_known_brokers
from fcluster.cli.svg import as_svg
from fcluster.common.errors import FclusterError, KafkaUnavailable
from fcluster.common.exit_codes import ExitCode
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings, resolve, with_settings
from fcluster.coordinator.checks import (
    check_inputs,
    check_partitions,
    check_reset,
    check_topics,
    committed_positions,
    look_for,
    no_longer_fits,
    refresh_interval_ms,
    remembered_ids,
)
from fcluster.coordinator.core.topics import Role, roles_of
from fcluster.coordinator.owned_topics import own_names
from fcluster.graph.codecs import BoundCodec
from fcluster.graph.outline import changes_to_state, outline
from fcluster.graph.remarks import remarks_on
from fcluster.graph.topology import Topology
from fcluster.kafka.brokers import broker_setting, connect_or_raise
from fcluster.kafka.clients import Admin, make_admin, make_consumer
from fcluster.kafka.rights import rights_on
from fcluster.kafka.topics import check_creation, existing_topics, plan_topics
from fcluster.wire.discovery import leader_in, read_journal

_P = ParamSpec("_P")
_T = TypeVar("_T")

Form = Literal["text", "mermaid", "svg", "json"]
Level = Literal["ok", "note", "warning", "error"]
Subject = Literal["job", "brokers", "topics", "rights", "formats", "state"]
_SUBJECTS: tuple[Subject, ...] = get_args(Subject)
"""In the order in which a reader asks for them: without topics, for example, state doesn't matter."""

_NEEDED: Mapping[Role, tuple[str, ...]] = {
    Role.SOURCE: ("READ",),
    Role.SINK: ("WRITE",),
    Role.REPARTITION: ("READ", "WRITE", "DELETE"),
    Role.CHANGELOG: ("READ", "WRITE", "DELETE"),
    Role.JOURNAL: ("READ", "WRITE"),
}
"""What the job's Kafka user does with topics (docs/security.md)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found.

    Attributes:
        level: "error": the job doesn't start, or stops soon. "warning": it starts, but something should be
            done about it. "note": good to know. "ok": as it should be.
        subject: what was checked.
        message: what was found.
        remedy: what to do about it. There is one for each error.
    """

    level: Level
    subject: Subject
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class CheckOptions:
    """The options of `fcluster check`; `flags` are settings by name."""

    target: str
    flags: Mapping[str, str]
    config: Path | None
    log_level: str
    offline: bool
    form: Form


def run_check(options: CheckOptions, write: Callable[[str], None]) -> int:
    """Show the job and what was found. Returns the exit code.

    Args:
        options: of the command.
        write: takes the output.

    Raises:
        FclusterError: the job can't be loaded, a setting is wrong, or no brokers are known.
    """
    start_logging(options.log_level)
    job = load_job(options.target)
    settings = resolve(job.settings, options.config, os.environ, options.flags)
    topology = job.build(settings)
    if options.form == "mermaid":
        write("\n".join(as_mermaid(outline(topology))))
        return ExitCode.DONE
    if options.form == "svg":
        write(as_svg(diagram_of(outline(topology)), f"the job {topology.job}"))
        return ExitCode.DONE
    findings = check_job(topology)
    if not options.offline:
        topology, found = check_on_brokers(with_known_brokers(settings, or_offline=True), topology)
        findings += found
    if options.form == "json":
        write(as_json(outline(topology), findings, offline=options.offline))
    else:
        write("\n".join([*as_text(outline(topology)), *findings_as_text(findings)]))
    failed = any(finding.level == "error" for finding in findings)
    return ExitCode.MISTAKE if failed else ExitCode.DONE


def check_job(topology: Topology) -> list[Finding]:
    """Find out whether the job does something that may not be meant. It is none of the brokers' business."""
    return [
        Finding("error" if remark.is_error else "warning", "job", remark.message, remark.remedy)
        for remark in remarks_on(topology)
    ]


def check_on_brokers(settings: Settings, topology: Topology) -> tuple[Topology, list[Finding]]:
    """Find out whether the job could start.

    Args:
        settings: the resolved settings, with brokers.
        topology: the job's topology.

    Returns:
        The topology, with the actual names of its internal topics as far as they are known, and the findings.
    """
    checks = _Checks(with_settings(settings, reading_group=topology.job), topology)
    checks.run()
    return checks.topology, sorted(checks.findings, key=lambda finding: _SUBJECTS.index(finding.subject))


class _Checks:
    def __init__(self, settings: Settings, topology: Topology) -> None:
        self.topology = topology
        self.findings: list[Finding] = []
        self._settings = settings

    def run(self) -> None:
        self._formats()
        admin = self._attempt("brokers", make_admin, self._settings)
        if admin is None or not self._brokers(admin):
            return
        existing = self._attempt("topics", existing_topics, admin)
        past = self._attempt("state", read_journal, self._settings, self.topology.job)
        if existing is None:
            return
        if past is not None:
            self._running(past)
            self.topology = (
                self._attempt("state", own_names, self._settings, admin, self.topology) or self.topology
            )
        self._topics(admin, existing)
        self._rights(admin, existing)
        if past is not None:
            self._state(admin, existing, past)

    # --- brokers and topics ---------------------------------------------------------------------------

    def _brokers(self, admin: Admin) -> bool:
        """Returns whether they answer."""
        settings = self._settings
        try:
            connect_or_raise(admin, settings)
        except FclusterError as error:
            self._error("brokers", error)
            return not isinstance(error, KafkaUnavailable)
        self._say("ok", "brokers", f"Kafka at {settings.bootstrap_servers} answers")
        if settings.processing_guarantee != "exactly-once":
            return True
        limit_ms = self._attempt("brokers", broker_setting, admin, "transaction.max.timeout.ms")
        if limit_ms is None:
            self._say("note", "brokers", "this user may not see the brokers' limits of transactions")
            return True
        timeout_ms = settings.transaction_timeout_ms
        self._say("ok", "brokers", f"transaction.timeout.ms={timeout_ms} is within their limit of {limit_ms}")
        remembered_ms = self._attempt("brokers", broker_setting, admin, "transactional.id.expiration.ms")
        _, warning = refresh_interval_ms(settings, remembered_ms)
        if warning:
            self._say("warning", "brokers", warning)
        return True

    def _topics(self, admin: Admin, existing: Mapping[str, int]) -> None:
        for source in self.topology.inputs:
            if source.topic.name in existing:
                count = _partitions(existing[source.topic.name])
                self._say("ok", "topics", f"{source.topic.name!r} is there, with {count}")
        problems = list(problems_of_sources(self._settings, self.topology, existing))
        for problem in problems:
            self._error("topics", problem)
        plan = None if problems else self._attempt("topics", plan_topics, self.topology, existing)
        if plan is not None:
            # If one can't be created, there is an error for it, and the others may be all right.
            self._attempt("topics", check_creation, admin, plan, self._settings)
            for name, (partitions, _) in plan.missing.items():
                self._say("note", "topics", f"{name!r} will be created, with {_partitions(partitions)}")
        for line in risks_of_loss(admin, self.topology):
            self._say("warning", "topics", f"committed data can be lost (docs/kafka.md): {line}")

    def _rights(self, admin: Admin, existing: Mapping[str, int]) -> None:
        roles = {topic: role for topic, role in roles_of(self.topology).items() if topic in existing}
        rights = rights_on(admin, roles)
        lacking = {
            topic: [what for what in _NEEDED[roles[topic]] if what not in rights[topic]] for topic in rights
        }
        for topic, operations in lacking.items():
            if operations:
                names = " and ".join(operation.capitalize() for operation in operations)
                self._say(
                    "error",
                    "rights",
                    f"this Kafka user lacks the right {names} on the {roles[topic].value} {topic!r}",
                    "Grant it; docs/security.md lists all that the job needs.",
                )
        if rights and not any(lacking.values()):
            self._say("ok", "rights", "this Kafka user may do what the job does with the topics that exist")

    def _formats(self) -> None:
        """What the codecs of the job's topics say, such as those with a schema registry."""
        topology = self.topology
        read = {source.topic.name: source.topic for source in topology.inputs}
        written = {topic.name: topic for topic in topology.outputs}
        written |= {source.topic.name: source.topic for source in topology.inputs if source.internal}
        for topic in (read | written).values():
            for kind in (topic.key, topic.value):
                if isinstance(kind, BoundCodec):
                    reads, writes = topic.name in read, topic.name in written
                    try:
                        notes = list(kind.declared.notes_on(kind.use, reads=reads, writes=writes))
                    except FclusterError as error:
                        self._error("formats", error)
                        return  # the others would say the same
                    for note in notes:
                        finding = Finding(note.level, "formats", note.message, note.remedy)
                        if finding not in self.findings:
                            self.findings.append(finding)

    # --- what is there already ------------------------------------------------------------------------

    def _running(self, past: Mapping[str, Any]) -> None:
        leader = self._attempt("state", leader_in, past, self.topology.job)
        if leader is not None and leader_answers(self._settings, leader, self.topology.job):
            self._say(
                "note",
                "state",
                f"a cluster of the job runs, with its coordinator at {leader.address}: stop it before you "
                "start this one",
            )

    def _state(self, admin: Admin, existing: Mapping[str, int], past: Mapping[str, Any]) -> None:
        topology, settings = self.topology, self._settings
        self._attempt("state", check_reset, past, topology.job)
        counts = {
            source.topic.name: existing[source.topic.name]
            for source in topology.inputs
            if source.topic.name in existing
        }
        positions = self._attempt("state", self._positions, counts)
        ids = remembered_ids(past)
        for at, position in (positions or {}).items():
            ids |= {at.topic: position.topic_id} if position.topic_id else {}
        self._attempt("state", check_topics, topology, settings, ids, look_for(admin, topology, ids))
        self._attempt("state", check_partitions, past, topology, counts)
        if positions is not None:
            self._attempt("state", check_inputs, past, topology, positions)
        former = past.get("topology")
        if former is not None:
            self._changes(former)
        elif positions:
            self._say("note", "state", "the job has committed offsets, from which it goes on")
        elif positions is not None:
            self._say("note", "state", "the job has no state yet; it begins with the oldest records")

    def _positions(self, counts: Mapping[str, int]) -> dict[TopicPartition, CommittedPosition]:
        job = self.topology.job
        consumer = make_consumer(self._settings, "read-uncommitted", **{"group.id": job})
        try:
            return committed_positions(consumer, job, counts)
        finally:
            consumer.close()

    def _changes(self, former: Mapping[str, Any]) -> None:
        changes = changes_to_state(former, self.topology)
        for reason in changes.reasons:
            self._error("state", no_longer_fits(self.topology.job, reason))
        for remark in changes.remarks:
            self._say("warning", "state", remark)
        if changes.kept and not changes.reasons:
            self._say("ok", "state", f"state goes on: {_listed(changes.kept)}")
        if changes.begun:
            self._say("note", "state", f"new, with empty state: {_listed(changes.begun)}")
        if changes.read_anew:
            self._say(
                "note", "state", f"not read before, so from the oldest records: {_listed(changes.read_anew)}"
            )
        if changes.left:
            self._say("note", "state", f"no longer read: {_listed(changes.left)}")

    # --- findings -------------------------------------------------------------------------------------

    def _attempt(
        self, subject: Subject, check: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> _T | None:
        """What the check returns. If it raises, that is a finding, and None is returned."""
        try:
            return check(*args, **kwargs)
        except FclusterError as error:
            self._error(subject, error)
            return None

    def _error(self, subject: Subject, error: FclusterError) -> None:
        finding = Finding("error", subject, error.message, error.remedy)
        if finding not in self.findings:  # several checks may run into the same problem
            self.findings.append(finding)

    def _say(self, level: Level, subject: Subject, message: str, remedy: str = "") -> None:
        self.findings.append(Finding(level, subject, message, remedy))


def _partitions(count: int) -> str:
    return f"{count} partition" if count == 1 else f"{count} partitions"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
