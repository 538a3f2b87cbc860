"""The diagram of a job as an SVG image, which browsers show and documents embed.

Responsible for: where everything is, and the image's text. Each stage has a lane of rows from left to right,
which it shares with the topics that it writes; so no box covers a topic or another box. (Graphviz would be a
program that each host needs.) Invariants: the same job gives the same image; names come from a user's job,
and are escaped; in a page that has the image in its own text, it changes nothing else. Pure.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from xml.sax.saxutils import escape

from fcluster.cli.diagram import Arrow, Box, Diagram, Node, Shape

_CHARACTER_PX = 7.3
"""How wide a character of the font is, at its size of 12 pixels."""
_HEIGHT_PX = 28
_ROW_PX = 52
_GAP_PX = 90
"""Between two columns: room for the labels of arrows."""
_PADDING_PX = 12
_MARGIN_PX = 16
_FILLS: Mapping[Shape, str] = {"topic": "#fff6dd", "step": "#ffffff", "step with state": "#e3edff"}
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_HEAD = """\
<style>
.fcluster-job text {{ font: 12px ui-monospace, Menlo, Consolas, monospace; fill: #222 }}
.fcluster-job text.aside {{ font-size: 10px; fill: #777 }}
.fcluster-job rect, .fcluster-job path {{ stroke: #555; stroke-width: 1 }}
.fcluster-job rect.stage {{ fill: #f5f5f5; stroke: #bbb }}
.fcluster-job path.way {{ fill: none }}
.fcluster-job path.aside {{ fill: none; stroke: #999; stroke-dasharray: 4 3 }}
</style>
<marker id="fcluster-head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker>
<rect width="{width}" height="{height}" fill="#ffffff" stroke="none"/>"""


@dataclass(frozen=True, slots=True)
class _Cell:
    """Where a node or a box is: its first and last column and row."""

    column: int
    row: int
    last_column: int
    last_row: int


def as_svg(diagram: Diagram, title: str) -> str:
    """An SVG document.

    Args:
        diagram: what is drawn.
        title: shown by browsers when the mouse rests on the image, and read out by screen readers.
    """
    return _Image(diagram, _cells_of(diagram), title).text


# --- where everything is -------------------------------------------------------------------------------


def _cells_of(diagram: Diagram) -> dict[str, _Cell]:
    """Where each node and each box is, by its name."""
    inside = {node.name: box for box in diagram.boxes for chain in box.chains for node in chain}
    writers: dict[str, list[Box]] = {topic.name: [] for topic in diagram.topics}
    by_name = {box.name: box for box in diagram.boxes}
    for arrow in diagram.arrows:
        box = inside.get(arrow.begin) or by_name.get(arrow.begin)
        if box is None:  # from a topic: the stage that reads it
            box = next((one for one in diagram.boxes if arrow.begin in one.reads), None)
        if box is not None and arrow.end in writers:
            writers[arrow.end].append(box)
    depths = _depths_of(diagram, inside)
    lengths = {
        box.name: max((depths[node.name] + 1 for chain in box.chains for node in chain), default=1)
        for box in diagram.boxes
    }
    columns = _columns_of(diagram, writers, lengths)
    cells = dict[str, _Cell]()
    row = 0
    for box in diagram.boxes:
        begin = columns[box.name]
        own = [
            topic.name
            for topic in diagram.topics
            if topic.name not in cells
            and (box in writers[topic.name][:1] or (not writers[topic.name] and topic.name in box.reads))
        ]
        chains = [chain for chain in box.chains if chain]
        for number, chain in enumerate(chains):
            for node in chain:
                at = begin + depths[node.name]
                cells[node.name] = _Cell(at, row + number, at, row + number)
        used = dict[int, int]()
        for topic in own:
            below = used.get(columns[topic], 0)
            used[columns[topic]] = below + 1
            cells[topic] = _Cell(columns[topic], row + below, columns[topic], row + below)
        rows = max(len(chains), 1)
        cells[box.name] = _Cell(begin, row, begin + lengths[box.name] - 1, row + rows - 1)
        row += max(rows, *used.values())
    return cells


def _depths_of(diagram: Diagram, inside: Mapping[str, Box]) -> dict[str, int]:
    """How many steps of its stage are in front of each step, on the longest way: chains that are merged share
    steps.
    """
    before: dict[str, list[str]] = {name: [] for name in inside}
    for arrow in diagram.arrows:
        if arrow.begin in inside and arrow.end in inside:
            before[arrow.end].append(arrow.begin)
    depths = dict[str, int]()

    def of(name: str) -> int:
        if name not in depths:
            depths[name] = max((of(one) + 1 for one in before[name]), default=0)
        return depths[name]

    for name in inside:
        of(name)
    return depths


def _columns_of(
    diagram: Diagram, writers: Mapping[str, list[Box]], lengths: Mapping[str, int]
) -> dict[str, int]:
    """The column of each topic, and the first one of each box: behind all that leads there. Where a job reads
    what it writes itself, one arrow goes back.
    """
    columns = dict[str, int]()
    underway = set[str]()

    def of_topic(topic: str) -> int:
        if topic not in columns:
            ends = [of_box(box) + lengths[box.name] for box in writers[topic] if box.name not in underway]
            columns[topic] = max(ends, default=0)
        return columns[topic]

    def of_box(box: Box) -> int:
        if box.name not in columns:
            underway.add(box.name)
            before = [of_topic(topic) for topic in box.reads]
            underway.discard(box.name)
            columns[box.name] = max(before, default=0) + 1
        return columns[box.name]

    for box in diagram.boxes:
        of_box(box)
    for topic in diagram.topics:
        of_topic(topic.name)
    return columns


# --- the image's text ----------------------------------------------------------------------------------


class _Image:
    def __init__(self, diagram: Diagram, cells: Mapping[str, _Cell], title: str) -> None:
        self._cells = cells
        nodes = [*diagram.topics, *(node for box in diagram.boxes for chain in box.chains for node in chain)]
        self._widths_px = {node.name: _width_px(node.label) + 2 * _PADDING_PX for node in nodes}
        self._left_px = self._columns_px(diagram)
        rows = max((cell.last_row for cell in cells.values()), default=0) + 1
        width, height = self._left_px[-1] - _GAP_PX + 2 * _MARGIN_PX, rows * _ROW_PX + 2 * _MARGIN_PX
        size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        self.text = "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="fcluster-job" {size} role="img">',
                f"<title>{_escaped(title)}</title>",
                _HEAD.format(width=width, height=height),
                *(line for box in diagram.boxes for line in self._stage(box)),
                *(line for arrow in diagram.arrows for line in self._arrow(arrow)),
                *(line for node in nodes for line in self._node(node)),
                "</svg>",
            ]
        )

    def _columns_px(self, diagram: Diagram) -> list[int]:
        """Where each column begins, and where one more would."""
        count = max((cell.last_column for cell in self._cells.values()), default=0) + 1
        widths_px = [2 * _PADDING_PX] * count
        for name, width_px in self._widths_px.items():
            column = self._cells[name].column
            widths_px[column] = max(widths_px[column], width_px)
        for box in diagram.boxes:  # its label has to fit, too
            cell = self._cells[box.name]
            between_px = (cell.last_column - cell.column) * _GAP_PX
            missing_px = (
                _width_px(box.label) - sum(widths_px[cell.column : cell.last_column + 1]) - between_px
            )
            widths_px[cell.last_column] += max(0, missing_px)
        left_px = [_MARGIN_PX]
        for width_px in widths_px:
            left_px.append(left_px[-1] + width_px + _GAP_PX)
        return left_px

    def _top_px(self, row: int) -> int:
        return _MARGIN_PX + row * _ROW_PX + (_ROW_PX - _HEIGHT_PX) // 2 + 4

    def _stage(self, box: Box) -> Iterator[str]:
        left_px, top_px, width_px, height_px = self._outline_px(box.name)
        yield (
            f'<rect class="stage" x="{left_px}" y="{top_px}" width="{width_px}" height="{height_px}" rx="4"/>'
        )
        yield f'<text class="aside" x="{left_px + 4}" y="{top_px + 10}">{_escaped(box.label)}</text>'

    def _node(self, node: Node) -> Iterator[str]:
        left_px, top_px, width_px, height_px = self._outline_px(node.name)
        round_px = _HEIGHT_PX // 2 if node.shape == "topic" else 2
        yield (
            f'<rect x="{left_px}" y="{top_px}" width="{width_px}" height="{height_px}" rx="{round_px}" '
            f'fill="{_FILLS[node.shape]}"/>'
        )
        yield f'<text x="{left_px + _PADDING_PX}" y="{top_px + 18}">{_escaped(node.label)}</text>'

    def _arrow(self, arrow: Arrow) -> Iterator[str]:
        from_left_px, from_top_px, from_width_px, from_height_px = self._outline_px(arrow.begin)
        to_left_px, to_top_px, _width, to_height_px = self._outline_px(arrow.end)
        begin_px, begin_y_px = from_left_px + from_width_px, from_top_px + from_height_px // 2
        end_y_px = to_top_px + to_height_px // 2
        bend_px = max(abs(to_left_px - begin_px) // 2, 30)
        curve = (
            f"M{begin_px} {begin_y_px} C{begin_px + bend_px} {begin_y_px}, "
            f"{to_left_px - bend_px} {end_y_px}, {to_left_px} {end_y_px}"
        )
        kind = "aside" if arrow.label else "way"
        yield f'<path class="{kind}" d="{curve}" marker-end="url(#fcluster-head)"/>'
        if arrow.label:
            middle_px, middle_y_px = (begin_px + to_left_px) // 2, (begin_y_px + end_y_px) // 2 - 3
            yield (
                f'<text class="aside" x="{middle_px}" y="{middle_y_px}" text-anchor="middle">'
                f"{_escaped(arrow.label)}</text>"
            )

    def _outline_px(self, name: str) -> tuple[int, int, int, int]:
        """Left, top, width and height."""
        cell = self._cells[name]
        left_px, top_px = self._left_px[cell.column], self._top_px(cell.row)
        if name in self._widths_px:
            return left_px, top_px, self._widths_px[name], _HEIGHT_PX
        right_px = self._left_px[cell.last_column + 1] - _GAP_PX
        height_px = (cell.last_row - cell.row) * _ROW_PX + _HEIGHT_PX
        return left_px - 8, top_px - 14, right_px - left_px + 16, height_px + 20


def _width_px(label: str) -> int:
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in label)
    return round((len(label) + wide) * _CHARACTER_PX)


def _escaped(text: str) -> str:
    return escape(_NOT_XML.sub("\ufffd", text).replace("\n", " "))
