"""Horizontal bars as SVG, by hand: no library, no fonts, no scripts. Text in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, MARGIN, LABEL_WIDTH, VALUE_WIDTH = 760, 16, 170, 190
ROW_HEIGHT, BAR_HEIGHT, GROUP_GAP = 18, 12, 6
TITLE_HEIGHT, HEADING_HEIGHT, PANEL_GAP = 52, 24, 14
COLOURS = ("#3465a4", "#cc5500", "#888a85", "#babdb6", "#75507b", "#4e9a06")
TEXT, FAINT, LINE = "#222222", "#666666", "#222222"


@dataclass(frozen=True)
class Bar:
    """One bar: its length is the median, a thin line goes from the least to the most."""

    label: str
    median: float
    least: float
    most: float
    colour: str


@dataclass(frozen=True)
class Panel:
    """Bars of one unit, which share a scale.

    Attributes:
        heading: what they show, with the unit.
        groups: bars that stand together.
    """

    heading: str
    groups: Sequence[Sequence[Bar]]


def colours(lanes: Sequence[str]) -> Mapping[str, str]:
    """A colour for each lane; after the last one they begin again."""
    return {lane: COLOURS[number % len(COLOURS)] for number, lane in enumerate(lanes)}


def draw(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """An SVG document."""
    parts: list[str] = []
    y = TITLE_HEIGHT
    for panel in panels:
        parts.append(_text(MARGIN, y + 15, panel.heading, size=13, weight="bold"))
        y += HEADING_HEIGHT
        longest = max((bar.most for group in panel.groups for bar in group), default=0.0)
        for group in panel.groups:
            for bar in group:
                parts += _bar(bar, y, longest)
                y += ROW_HEIGHT
            y += GROUP_GAP
        y += PANEL_GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        'role="img" font-family="system-ui, sans-serif">'
    )
    return "\n".join(
        [
            head,
            f"<title>{escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>',
            _text(MARGIN, 24, title, size=15, weight="bold"),
            _text(MARGIN, 42, subtitle, colour=FAINT),
            *parts,
            "</svg>",
            "",
        ]
    )


def _bar(bar: Bar, y: int, longest: float) -> list[str]:
    begin = MARGIN + LABEL_WIDTH
    room = WIDTH - 2 * MARGIN - LABEL_WIDTH - VALUE_WIDTH

    def x(value: float) -> float:
        return begin + (room * value / longest if longest > 0 else 0)

    middle, width = y + BAR_HEIGHT / 2, x(bar.median) - begin
    value = show_number(bar.median)
    if bar.least != bar.most:
        value += f" [{show_number(bar.least)} to {show_number(bar.most)}]"
    return [
        _text(begin - 8, y + 10, bar.label, anchor="end"),
        f'<rect x="{begin}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT}" fill="{bar.colour}"/>',
        f'<path d="M{x(bar.least):.1f} {middle}H{x(bar.most):.1f}" stroke="{LINE}" stroke-width="1.5"/>',
        _text(x(bar.most) + 8, y + 10, value),
    ]


def _text(
    x: float, y: float, text: str, *, size: int = 11, weight: str = "", anchor: str = "", colour: str = TEXT
) -> str:
    more = (f' font-weight="{weight}"' if weight else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"{more}>{escape(text)}</text>'


def show_number(value: float) -> str:
    """Three digits that matter."""
    if value >= 100:
        digits = len(str(int(value)))
        return f"{round(value, 3 - digits):,.0f}"
    return f"{value:.3g}"
