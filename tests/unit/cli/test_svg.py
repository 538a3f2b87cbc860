"""The image of a job: all names are in it, and nothing covers anything else."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest

from fcluster import Job, Tumbling, count, minutes
from fcluster.cli.diagram import Arrow, Box, Diagram, Node, diagram_of
from fcluster.cli.svg import as_svg
from fcluster.common.settings import Settings
from fcluster.graph.outline import outline

_SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Rectangle:
    left: float
    top: float
    width: float
    height: float
    stage: bool
    topic: bool

    def covers(self, other: Rectangle) -> bool:
        beside = self.left + self.width <= other.left or other.left + other.width <= self.left
        above = self.top + self.height <= other.top or other.top + other.height <= self.top
        return not beside and not above


def drawn(job: Job) -> tuple[Diagram, ElementTree.Element]:
    diagram = diagram_of(outline(job.build(Settings())))
    return diagram, ElementTree.fromstring(as_svg(diagram, "a title"))


def texts(image: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in image.iter(f"{_SVG}text")]


def rectangles(image: ElementTree.Element) -> list[Rectangle]:
    _background, *found = image.iter(f"{_SVG}rect")
    return [
        Rectangle(
            *(float(one.attrib[name]) for name in ("x", "y", "width", "height")),
            stage=one.get("class") == "stage",
            topic=one.get("rx") == "14",
        )
        for one in found
    ]


def shop() -> Job:
    """Two stages that read what others write, and outputs of all kinds."""
    job = Job("shop")
    orders, dead = job.topic("orders"), job.topic("dead", value="bytes")
    customers = job.table(job.topic("customers"))
    good = job.stream(orders, on_error=dead).filter(bool)
    per_minute = good.key_by("account", name="account").window(Tumbling(minutes(1)), name="m", late="late")
    per_minute.aggregate(n=count()).to("per-minute")
    good.map(str).filter(bool).peek(str).key_by("customer").join(customers).through("joined").to("again")
    return job


def foreign() -> Job:
    job = Job("foreign")
    orders, customers = job.table(job.topic("orders")), job.table(job.topic("customers"))
    orders.join(customers, on="customer", name="labelled").to_stream().to("labels")
    return job


def merged() -> Job:
    job = Job("merged")
    both = job.merge(job.topic("a"), job.stream(job.topic("b")).filter(bool).map(str))
    both.process(lambda _ctx, value: value, name="both").map(str).to("out")
    return job


def copied() -> Job:
    job = Job("copied")
    job.stream(job.topic("a")).to("b")
    return job


@pytest.mark.parametrize("build", [shop, foreign, merged, copied])
def test_everything_is_drawn_and_nothing_covers_anything(build: Any) -> None:
    diagram, image = drawn(build())
    nodes = [*diagram.topics, *(node for box in diagram.boxes for chain in box.chains for node in chain)]
    labels = [node.label for node in nodes] + [box.label for box in diagram.boxes]
    labels += [arrow.label for arrow in diagram.arrows if arrow.label]
    assert sorted(texts(image)) == sorted(labels)
    assert len([path for path in image.iter(f"{_SVG}path") if path.get("class")]) == len(diagram.arrows)
    found = rectangles(image)
    assert len(found) == len(nodes) + len(diagram.boxes)
    for one, other in combinations(found, 2):
        step_in_stage = one.stage != other.stage and not (one.topic or other.topic)
        assert step_in_stage or not one.covers(other)
    size = [float(image.attrib[name]) for name in ("width", "height")]
    assert all(one.left + one.width <= size[0] and one.top + one.height <= size[1] for one in found)


@pytest.mark.parametrize("build", [shop, foreign, merged, copied])
def test_records_go_from_left_to_right(build: Any) -> None:
    diagram, image = drawn(build())
    for arrow, path in zip(
        diagram.arrows, (path for path in image.iter(f"{_SVG}path") if path.get("class")), strict=True
    ):
        numbers = path.attrib["d"].replace("M", "").replace("C", "").replace(",", "").split()
        assert float(numbers[0]) < float(numbers[-2]), arrow


def test_names_are_escaped() -> None:
    hostile = '</text><script>"&amp;\x00\x1b\ud800\n'
    topics = (Node("t0", hostile, "topic"), Node("t1", "out", "topic"))
    diagram = Diagram(topics, (Box("s0", hostile, ((),), ("t0",)),), (Arrow("t0", "t1", hostile),))
    image = ElementTree.fromstring(as_svg(diagram, hostile))
    shown = '</text><script>"&amp;\ufffd\ufffd\ufffd '
    assert texts(image) == [shown] * 3 + ["out"]
    assert [title.text for title in image.iter(f"{_SVG}title")] == [shown]


def test_topic_that_leads_back_to_its_own_stage_is_drawn() -> None:
    topics = (Node("t0", "a", "topic"), Node("t1", "b", "topic"))
    step = Node("s0c0n0", "map str", "step")
    arrows = (Arrow("t0", "s0c0n0"), Arrow("s0c0n0", "t1"), Arrow("t1", "s0c0n0"))
    image = ElementTree.fromstring(
        as_svg(Diagram(topics, (Box("s0", "stage a", ((step,),), ("t0", "t1")),), arrows), "a")
    )
    assert sorted(texts(image)) == ["a", "b", "map str", "stage a"]


def test_image_in_the_text_of_a_page_changes_nothing_else_there() -> None:
    _diagram, image = drawn(shop())
    assert image.get("class") == "fcluster-job"
    (style,) = image.iter(f"{_SVG}style")
    rules = [line.split("{", 1)[0] for line in (style.text or "").strip().splitlines()]
    assert rules
    selectors = [selector.strip() for rule in rules for selector in rule.split(",")]
    assert [one for one in selectors if not one.startswith(".fcluster-job ")] == []
    (marker,) = image.iter(f"{_SVG}marker")
    ways = [path for path in image.iter(f"{_SVG}path") if path.get("marker-end")]
    assert ways
    assert marker.attrib["id"].startswith("fcluster-")
    assert {way.get("marker-end") for way in ways} == {f"url(#{marker.attrib['id']})"}
