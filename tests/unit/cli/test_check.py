"""`fcluster check`: how it shows a job, and what it collects from the brokers' answers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from fcluster.cli import check
from fcluster.cli.check import Finding, check_on_brokers
from fcluster.cli.ending import Session
from fcluster.cli.job_views import as_mermaid, as_text, findings_as_text
from fcluster.cli.main import commands
from fcluster.common.errors import KafkaUnavailable, SettingsError
from fcluster.common.settings import Settings
from fcluster.graph.outline import outline
from fcluster.graph.topology import Topology

pytestmark = pytest.mark.usefixtures("forgets_jobs")
REPOSITORY = Path(__file__).parents[3]
JOB = """
from fcluster import Job

job = Job("shop")
orders = job.topic("orders")
totals = job.topic("totals")
refused = job.topic("refused", value="bytes")

def total(ctx, order):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return ctx.state

job.stream(orders).filter(lambda order: order, on_error="skip").key_by("account").process(
    total, to=totals, on_error=refused
)
"""


@pytest.fixture(autouse=True)
def _in_a_directory_with_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "start_logging", lambda _level: None)
    for name in list(os.environ):
        if name.startswith("FCLUSTER_"):
            monkeypatch.delenv(name)
    (tmp_path / "shop.py").write_text(JOB)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(commands, ["check", "shop.py", *arguments], obj=Session())


# --- the job alone ------------------------------------------------------------------------------------


def test_job_is_shown_as_text() -> None:
    result = run("--offline")
    assert result.exit_code == 0, result.output
    assert re.sub(r"-[0-9a-f]{10}\b", "-##########", result.output) == (
        "job 'shop', topology #\n".replace("#", re.findall("topology (.*)", result.output)[0])
        + """
topics
  orders                             source: text keys, json values, read-committed
  shop-total-repartition-##########  repartition: text keys, json values, read-committed
  refused                            dead letters: text keys, bytes values
  totals                             output: text keys, json values
  shop-total-changelog-##########    changelog
  shop-journal                       journal

stage 'orders'
  reads orders
  has no state
  chain 'orders-to-shop-total-repartition-##########', of orders
    filter <lambda>
      failures: skip
    key_by field account
    to shop-total-repartition-##########

stage 'total'
  reads shop-total-repartition-##########; failures: dead letter to refused
  keeps its state in shop-total-changelog-##########
  chain 'total', of shop-total-repartition-##########
    process 'total'
      state: total
      failures: dead letter to refused
    to totals
      failures: dead letter to refused
"""
    )


def test_documentation_shows_what_the_readmes_job_gives() -> None:
    readme, page = (
        (REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/check.md")
    )
    (first_block, *_) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert "\n".join(["```", *as_text(outline(built(first_block))), "```"]) in page


def test_job_is_shown_as_json() -> None:
    result = run("--offline", "--format", "json")
    document = json.loads(result.output)
    assert document["findings"] is None
    assert [stage["name"] for stage in document["job"]["stages"]] == ["orders", "total"]
    steps = document["job"]["stages"][1]["chains"][0]["steps"]
    assert steps[0]["state"] == ["total"]


def test_aggregate_that_counts_a_window_several_times_is_a_warning_without_brokers_too() -> None:
    Path("shop.py").write_text(
        """
from fcluster import Job, Tumbling, count, minutes

job = Job("shop")
windows = job.stream(job.topic("orders")).window(Tumbling(minutes(1)), name="w", emit="update")
windows.aggregate(n=count()).key_by("key", name="by-key").count(name="results").to_stream().to("out")
"""
    )
    result = run("--offline")
    assert result.exit_code == 0, result.output
    assert "warning  The running aggregate 'results' adds up results of the window 'w'" in result.output
    assert result.output.endswith("1 warning\n")
    (finding,) = json.loads(run("--offline", "--format", "json").output)["findings"]
    assert (finding["level"], finding["subject"]) == ("warning", "job")


def test_job_is_shown_as_a_diagram_without_brokers() -> None:
    result = run("--format", "mermaid")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "flowchart LR"
    nodes = dict(re.findall(r'^ +(\w+)(?:\[\(|\[\[|\[)"([^"]*)"', result.output, re.MULTILINE))
    names = {name: node for node, name in nodes.items()}
    arrows = {tuple(arrow) for arrow in re.findall(r"^  (\w+) --> (\w+)$", result.output, re.MULTILINE)}
    aside = re.findall(r'^  (\w+) -\. "([^"]*)" \.-> (\w+)$', result.output, re.MULTILINE)
    (repartition,) = (node for name, node in names.items() if "repartition" in name)
    assert arrows == {
        (names["orders"], names["filter #60;lambda#62;"]),
        (names["filter #60;lambda#62;"], names["key_by field account"]),
        (names["key_by field account"], repartition),
        (repartition, names["process total"]),
        (names["process total"], names["totals"]),
    }
    assert (names["process total"], "failures", names["refused"]) in aside
    assert "shop-journal" not in names
    assert lines.count("  end") == 2


def test_job_is_shown_as_an_image_without_brokers() -> None:
    result = run("--format", "svg")
    assert result.exit_code == 0, result.output
    image = ElementTree.fromstring(result.output)
    texts = [text.text for text in image.iter("{http://www.w3.org/2000/svg}text")]
    assert {"orders", "filter <lambda>", "process total", "totals", "stage orders"} <= set(texts)


def test_names_that_mean_something_in_a_diagram_are_escaped(tmp_path: Path) -> None:
    hostile = 'end"]; click s0 <script> #quot; `x` é\n'
    (tmp_path / "shop.py").write_text(
        f"{JOB}\ndef odd(order): return order\nodd.__name__ = {hostile!r}\n"
        "job.stream(orders).map(odd).to(totals)\n"
    )
    result = run("--format", "mermaid")
    (line,) = [line for line in result.output.splitlines() if "map end" in line]
    assert re.fullmatch(r'    s0c1n0\["[\w .,:/()=+*#;-]*"\]', line, re.ASCII)


@pytest.mark.parametrize("form", ["text", "mermaid", "svg", "json"])
def test_job_that_cannot_be_imported_is_told_with_its_line(tmp_path: Path, form: str) -> None:
    (tmp_path / "shop.py").write_text("from fcluster import Job\nnosuch\n")
    result = run("--offline", "--format", form)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "shop.py:2: nosuch" in result.stderr
    assert "remedy: Correct the file" in result.stderr


def test_setting_that_is_wrong_is_told() -> None:
    result = run("--offline", "--set", "comit.interval.ms=5")
    assert result.exit_code == 1
    assert "commit.interval.ms" in result.stderr.split("remedy:")[1]


def test_without_brokers_the_remedy_names_the_way_without_them() -> None:
    result = run()
    assert result.exit_code == 1
    assert "error: no brokers are given" in result.stderr
    assert "--offline" in result.stderr.split("remedy:")[1]


# --- on brokers ---------------------------------------------------------------------------------------


def test_findings_are_listed_by_subject_and_counted() -> None:
    findings = [
        Finding("ok", "brokers", "they answer"),
        Finding("error", "topics", "no such topic", "Create it."),
        Finding("warning", "topics", "two\nlines"),
        Finding("ok", "brokers", "limits"),
    ]
    assert "\n".join(findings_as_text(findings)).splitlines() == [
        "",
        "brokers",
        "  ok       they answer",
        "  ok       limits",
        "",
        "topics",
        "  error    no such topic",
        "           remedy: Create it.",
        "  warning  two",
        "           lines",
        "",
        "1 error, 1 warning",
    ]
    assert findings_as_text(findings[:1])[-1] == "nothing stands in the way of a start"
    assert findings_as_text(()) == []


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("note", 0), ("warning", 0), ("error", 1)])
@pytest.mark.parametrize("form", ["text", "json"])
def test_only_errors_make_the_command_fail(
    monkeypatch: pytest.MonkeyPatch, level: Any, code: int, form: str
) -> None:
    found = [Finding(level, "brokers", "something")]
    monkeypatch.setattr(check, "check_on_brokers", lambda _settings, topology: (topology, found))
    result = run("--brokers", "h:9092", "--format", form)
    assert result.exit_code == code
    assert "something" in result.stdout


class World:
    """The brokers' answers that `check` gets, by name of the function that it calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.existing = {"orders": 4}
        self.past: dict[str, Any] = {}
        self.rights: Mapping[str, frozenset[str]] = {}
        self.settings = {"transaction.max.timeout.ms": 900_000, "transactional.id.expiration.ms": 604_800_000}
        self._set = monkeypatch.setattr
        answers: dict[str, Any] = {
            "make_admin": lambda settings: object(),
            "connect_or_raise": lambda admin, settings: None,
            "existing_topics": lambda admin: self.existing,
            "read_journal": lambda settings, job: self.past,
            "own_names": lambda settings, admin, topology: topology,
            "broker_setting": lambda admin, name: self.settings.get(name),
            "check_creation": lambda admin, plan, settings: None,
            "risks_of_loss": lambda admin, topology: [],
            "rights_on": lambda admin, topics: {
                topic: rights for topic, rights in self.rights.items() if topic in set(topics)
            },
            "look_for": lambda admin, topology, ids: {},
            "make_consumer": lambda *args, **more: SimpleNamespace(close=lambda: None),
            "committed_positions": lambda consumer, job, counts: {},
        }
        for name, answer in answers.items():
            self.answer(name, answer)

    def answer(self, name: str, function: Any) -> None:
        self._set(check, name, function)

    def fail(self, name: str, error: Exception) -> None:
        def raise_it(*_args: Any, **_more: Any) -> None:
            raise error

        self.answer(name, raise_it)

    def findings(self, **settings: Any) -> list[Finding]:
        _, findings = check_on_brokers(Settings(bootstrap_servers="h:9092", **settings), built())
        return findings


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def built(source: str = JOB) -> Topology:
    names: dict[str, Any] = {}
    exec(source, names)
    return names["job"].build(Settings())


def of_level(findings: list[Finding], level: str) -> list[str]:
    return [finding.message for finding in findings if finding.level == level]


def test_new_job_in_good_order_has_no_errors_and_is_told_what_will_be_created(world: World) -> None:
    findings = world.findings()
    assert of_level(findings, "error") == of_level(findings, "warning") == []
    created = [message for message in of_level(findings, "note") if "will be created" in message]
    assert {re.findall("'(.*?)'", message)[0] for message in created} == {
        topic.name for topic in outline(built()).topics
    } - {"orders"}
    assert "'orders' is there, with 4 partitions" in of_level(findings, "ok")
    assert any("no state yet" in message for message in of_level(findings, "note"))


def test_brokers_that_do_not_answer_are_the_only_finding(world: World) -> None:
    world.fail("connect_or_raise", KafkaUnavailable("no brokers", remedy="Start them."))
    assert world.findings() == [Finding("error", "brokers", "no brokers", "Start them.")]


def test_limit_of_transactions_is_told_and_the_rest_is_checked_too(world: World) -> None:
    world.fail("connect_or_raise", SettingsError("transaction.timeout.ms is too high", remedy="Lower it."))
    world.existing = {}
    errors = of_level(world.findings(), "error")
    assert errors[0] == "transaction.timeout.ms is too high"
    assert "'orders' doesn't exist" in errors[1]


def test_limits_that_cannot_be_seen_are_noted(world: World) -> None:
    world.settings = {}
    assert any("may not see" in message for message in of_level(world.findings(), "note"))


def test_brokers_that_forget_ids_early_are_a_warning(world: World) -> None:
    world.settings["transactional.id.expiration.ms"] = 4_000
    (warning,) = of_level(world.findings(), "warning")
    assert "at most 1000 ms" in warning


def test_all_problems_are_found_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = """
from fcluster import Job
job = Job("shop")
a, b, c = (job.topic(name) for name in "abc")
job.merge(a, b).process(lambda ctx, value: None, name="both")
job.stream(c).process(lambda ctx, value: None, name="one")
"""
    world.existing = {"a": 2, "b": 3}
    _, findings = check_on_brokers(Settings(bootstrap_servers="h:9092"), built(merged))
    errors = of_level(findings, "error")
    assert len(errors) == 2
    assert "'c' doesn't exist" in errors[0]
    assert "different numbers of partitions: 'a' (2 partitions) and 'b' (3 partitions)" in errors[1]
    assert all(finding.remedy for finding in findings if finding.level == "error")


def test_topic_that_cannot_be_created_is_an_error(world: World) -> None:
    world.fail("check_creation", KafkaUnavailable("creating 'totals' failed", remedy="Grant it."))
    assert of_level(world.findings(), "error") == ["creating 'totals' failed"]


def test_rights_that_lack_are_named_for_each_topic(world: World) -> None:
    world.existing = {"orders": 4, "totals": 4, "shop-journal": 1}
    every = frozenset({"READ", "WRITE", "DELETE", "DESCRIBE"})
    world.rights = {"orders": every - {"READ"}, "totals": frozenset(), "shop-journal": every}
    assert of_level(world.findings(), "error") == [
        "this Kafka user lacks the right Read on the source 'orders'",
        "this Kafka user lacks the right Write on the output topic 'totals'",
    ]
    world.rights = dict.fromkeys(world.existing, every)
    assert of_level(world.findings(), "error") == []


def test_state_that_no_longer_fits_is_an_error_with_the_choice(world: World) -> None:
    former = built(JOB.replace("total(", "sum_up(").replace("total,", "sum_up,"))
    world.past = {"term": {"term": 1}, "topology": former.describe()}
    findings = world.findings()
    (error,) = [finding for finding in findings if finding.level == "error"]
    assert "sum_up" in error.message
    assert "fcluster reset" in error.remedy
    assert any("new, with empty state: 'total'" in message for message in of_level(findings, "note"))


def test_state_that_fits_goes_on(world: World) -> None:
    world.past = {"term": {"term": 1}, "topology": built().describe()}
    assert "state goes on: 'total'" in of_level(world.findings(), "ok")


def test_other_partition_count_than_before_is_an_error(world: World) -> None:
    topology = built()
    (repartition,) = (source.topic.name for source in topology.inputs if source.internal)
    world.past = {"topology": topology.describe(), f"partitions/{repartition}": {"count": 4}}
    world.existing = {"orders": 4, repartition: 8}
    assert any("has 8 partitions, but had 4" in message for message in of_level(world.findings(), "error"))


def test_reset_that_was_interrupted_is_an_error(world: World) -> None:
    world.past = {"resetting": {"to": "earliest"}}
    assert any("was started and then interrupted" in text for text in of_level(world.findings(), "error"))


def test_journal_that_cannot_be_read_is_an_error_and_topics_are_still_checked(world: World) -> None:
    world.fail("read_journal", KafkaUnavailable("can't read the journal", remedy="Grant it."))
    findings = world.findings()
    assert of_level(findings, "error") == ["can't read the journal"]
    assert "'orders' is there, with 4 partitions" in of_level(findings, "ok")


def test_job_that_runs_is_noted(world: World) -> None:
    world.past = {
        "leader": {"address": "tcp://h:1", "term": 1, "host": "h", "pid": 1, "cluster_id": "c"},
        "topology": built().describe(),
    }
    world.answer("leader_answers", lambda settings, leader, job: True)
    findings = world.findings()
    assert any("a cluster of the job runs" in message for message in of_level(findings, "note"))
    assert of_level(findings, "error") == []


def test_diagram_of_a_job_without_steps_goes_from_topic_to_topic() -> None:
    copies = 'from fcluster import Job\njob = Job("copy")\njob.stream(job.topic("a")).to(job.topic("b"))\n'
    assert as_mermaid(outline(built(copies)))[1:] == [
        '  t0[("a")]',
        '  t1[("b")]',
        '  subgraph s0["stage a"]',
        "  end",
        "  t0 --> t1",
    ]


def test_step_that_merged_streams_share_is_drawn_once() -> None:
    merged = """
from fcluster import Job
job = Job("shop")
a, b = job.topic("a"), job.topic("b")
both = job.merge(job.stream(a).filter(bool), b).process(lambda ctx, value: value, name="both")
both.map(str).to(job.topic("out"))
"""
    assert as_mermaid(outline(built(merged)))[5:] == [
        '  subgraph s0["stage a"]',
        '    s0c0n0["filter bool"]',
        '    s0c0n1[["process both"]]',
        '    s0c0n2["map str"]',
        "  end",
        "  t0 --> s0c0n0",
        "  s0c0n0 --> s0c0n1",
        "  s0c0n1 --> s0c0n2",
        "  s0c0n2 --> t2",
        "  t1 --> s0c0n1",
        '  s0 -. "state" .-> t3',
    ]
