"""Draw a graph, or a graph before and after a pass, as SVG.

    draw(sketch)              one picture, with its own style: a file that any browser shows
    draw_pair(before, after)  two pictures in which what is in both stands at the same place

Boxes and what they leave out: collapse.py; their places: layout.py. Colours are those of the page
around the picture (``drawing.css``, CSS variables, light and dark); a box also says in words
what it is. Text is escaped: names are a user's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from importlib import resources

from amber_compile.sketch import Sketch

from .boxes import Box
from .collapse import Edge, Scene, in_order, scene_of
from .layout import Layout, layout_of

MOST = 400
"""Boxes of the largest graph that is drawn: more than that nobody can read."""
ROW, HEIGHT, LOW = 72.0, 46.0, 30.0
"""Distance of two rows; heights of a box with two lines and with one, in pixels."""
MARGIN = 14.0
TITLE, DETAIL = 7.6, 6.3
"""Estimated widths of a character of the two lines, in pixels."""
WORDS = {"amber": "selection", "input": "input", "other": "operation"}


def draw(sketch: Sketch, *, within: str = "") -> str:
    """Return a picture of a graph, or of a layer of one, as an SVG document.

    Args:
        sketch: what to draw.
        within: the layer's path: names in the picture start below it.

    Raises:
        ImportError: without networkx, which PyTorch brings.
    """
    style = resources.files(__package__).joinpath("drawing.css").read_text("utf-8")
    picture = draw_pair(sketch, sketch, within=within)[1]
    return picture.replace(">", f">\n<style>\n{style}</style>", 1)


def draw_pair(before: Sketch, after: Sketch, *, within: str = "") -> tuple[str, str]:
    """Return pictures of a graph before and after a pass, for a page that has the style.

    Raises:
        ImportError: without networkx, which PyTorch brings.
    """
    scene = scene_of(before, after, within)
    if len(scene.boxes) > MOST:
        note = _note(f"{len(scene.boxes)} operations are too many to draw: see the text.")
        return note, note
    if scene.has_cycle and before != after:  # each side in an order of its own, and unmarked
        return draw_pair(before, before, within=within)[0], draw_pair(after, after, within=within)[
            1
        ]
    canvas = _Canvas.of(scene)
    return canvas.svg(0, "before"), canvas.svg(1, "after")


@dataclass(frozen=True, slots=True)
class _Canvas:
    """A scene with its places; an edge that a box of the other side interrupts
    goes through the place of that box."""

    scene: Scene
    layout: Layout
    through: Mapping[Edge, str]

    @classmethod
    def of(cls, scene: Scene) -> _Canvas:
        through = _interrupted(scene)
        both = in_order(scene.edges[0] | scene.edges[1], scene.boxes)
        edges = [edge for edge in both if edge not in through]
        widths = {key: max(map(_width, filter(None, pair))) for key, pair in scene.boxes.items()}
        return cls(scene, layout_of(widths, edges), through)

    def svg(self, side: int, label: str) -> str:
        """Return the picture of one side."""
        width, height = self.layout.width + 2 * MARGIN, self.layout.rows * ROW - ROW + HEIGHT
        height += 2 * MARGIN
        parts = [
            '<svg xmlns="http://www.w3.org/2000/svg" class="graph" role="img" '
            f'aria-label="the graph {label}" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}">',
            *(
                self._edge(edge, side)
                for edge in in_order(self.scene.edges[side], self.scene.boxes)
            ),
            *self._boxes(side),
            "</svg>",
        ]
        return "\n".join(parts)

    def _boxes(self, side: int) -> Iterator[str]:
        for key, pair in self.scene.boxes.items():
            box = pair[side]
            if box is not None:
                yield _box(box, *self._centre(key))

    def _centre(self, key: str) -> tuple[float, float]:
        return self.layout.x[key] + MARGIN, self.layout.rank[key] * ROW + HEIGHT / 2 + MARGIN

    def _half(self, key: str, side: int) -> float:
        box = self.scene.boxes[key][side]
        return (HEIGHT if box is not None and box.detail else LOW) / 2

    def _edge(self, edge: Edge, side: int) -> str:
        """Return a smooth line from the lower border of one box to the upper of another."""
        (x, y), (end, low) = map(self._centre, edge)
        way = [(x, y + self._half(edge[0], side), y + HEIGHT / 2)]
        way += [
            (at, y + (row + 1) * ROW - HEIGHT / 2, y + (row + 1) * ROW + HEIGHT / 2)
            for row, at in enumerate(self._bends(edge))
        ]
        way.append((end, low - HEIGHT / 2, low - self._half(edge[1], side) - 1))
        path = f"M{x:.1f} {way[0][1]:.1f}V{way[0][2]:.1f}"
        for (one, _, bottom), (other, top, exit_) in itertools.pairwise(way):
            middle = (bottom + top) / 2
            path += f"C{one:.1f} {middle:.1f} {other:.1f} {middle:.1f} {other:.1f} {top:.1f}"
            path += f"V{exit_:.1f}"
        return f'<path class="edge" d="{path}"/>'

    def _bends(self, edge: Edge) -> list[float]:
        """Return the centres of an edge's way through the rows between its ends."""
        if edge not in self.through:
            return [x + MARGIN for x in self.layout.bends[edge]]
        new = self.through[edge]
        first, second = (edge[0], new), (new, edge[1])
        bends = [*self.layout.bends[first], self.layout.x[new], *self.layout.bends[second]]
        return [x + MARGIN for x in bends]


def _interrupted(scene: Scene) -> dict[Edge, str]:
    """Return the edges of one side in which the other has one box more, and that box."""
    found = {}
    for side, other in ((0, 1), (1, 0)):
        mine, theirs = scene.edges[side], scene.edges[other]
        for a, b in mine - theirs:
            ends = {end for start, end in theirs if start == a}
            between = ends & {start for start, end in theirs if end == b}
            more = sorted(key for key in between if scene.boxes[key][side] is None)
            if more:
                found[a, b] = more[0]
    return found


def _width(box: Box) -> float:
    return max(len(box.title) * TITLE, len(box.detail) * DETAIL) + 30


def _box(box: Box, x: float, y: float) -> str:
    """Return a box around (x, y): border, two lines of text, what happened to it."""
    width, height = _width(box), HEIGHT if box.detail else LOW
    left, top = x - width / 2, y - height / 2
    classes = " ".join(filter(None, ["box", box.kind, box.state]))
    site = f' data-site="{escape(box.site)}"' if box.site else ""
    words = ", ".join(filter(None, [WORDS.get(box.kind, f"{box.kind} projection"), box.state]))
    baseline = y - 3 if box.detail else y + 4.5
    parts = [
        f'<g class="{classes}"{site}><title>{escape(box.site or box.title)}: {words}</title>',
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.0f}" rx="7"/>',
        f'<text class="title" x="{x:.1f}" y="{baseline:.1f}">{escape(box.title)}</text>',
    ]
    if box.detail:
        parts.append(
            f'<text class="detail" x="{x:.1f}" y="{y + 13:.1f}">{escape(box.detail)}</text>'
        )
    if box.state:
        parts += _badge(box.state, left + width, top)
    return "".join([*parts, "</g>"])


def _note(text: str) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" class="graph" width="460" height="40">'
        f'<text x="230" y="24">{text}</text></svg>'
    )


def _badge(word: str, right: float, top: float) -> list[str]:
    width = len(word) * 5.6 + 12
    x = right - width + 6
    return [
        f'<rect class="badge" x="{x:.1f}" y="{top - 8:.1f}" width="{width:.1f}" height="15" '
        'rx="7.5"/>',
        f'<text class="badge" x="{x + width / 2:.1f}" y="{top + 2.8:.1f}">{word}</text>',
    ]
