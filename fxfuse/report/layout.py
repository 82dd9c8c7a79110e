"""A layered drawing of a directed acyclic graph, from top to bottom (Sugiyama, Tagawa and Toda, 1981).

Layers by longest path, orders by barycentres, positions along a layer by aligning neighbours (:mod:`align`). Edges
that skip layers pass through points of their own, which all edges of a box share. Pure.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

from fxfuse.report.align import positions

#: distances between boxes of a layer, between points that edges pass, and between layers
GAP, LANE, LAYER_GAP = 26.0, 14.0, 34.0
#: rounds over all layers to find an order
ORDER_ROUNDS = 12
#: points that long edges may have in all; those of the longest edges beyond it are left out
MOST_POINTS = 30_000
Size = tuple[float, float]
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Layout:
    """``boxes``: left, top, width, height by name. ``edges``: the points of every edge, in the order given."""

    boxes: dict[str, tuple[float, float, float, float]]
    edges: list[list[Point]]
    width: float
    height: float


def layered(sizes: Mapping[str, Size], edges: Sequence[tuple[str, str]]) -> Layout:
    """Lay out boxes of ``sizes`` (width, height), given in topological order, and the ``edges`` between them."""
    if not sizes:
        return Layout({}, [], 0.0, 0.0)
    made = _Layered(sizes, edges)
    made.order()
    made.place()
    return made.layout()


class _Layered:
    def __init__(self, sizes: Mapping[str, Size], edges: Sequence[tuple[str, str]]) -> None:
        self.names, self.edges = list(sizes), edges
        self.width = [w for w, _ in sizes.values()]
        self.height = [h for _, h in sizes.values()]
        self.at = {name: i for i, name in enumerate(self.names)}
        self.boxes = len(self.names)
        self.layer = self._layers()
        self.up: list[list[int]] = [[] for _ in self.names]
        self.down: list[list[int]] = [[] for _ in self.names]
        self.through: dict[tuple[int, int], int] = {}  # (source, layer) -> the point there
        self._points()
        count = 1 + max(self.layer)
        self.rows: list[list[int]] = [[] for _ in range(count)]
        for i, layer in enumerate(self.layer):
            self.rows[layer].append(i)
        self.x = [0.0] * len(self.layer)

    def _layers(self) -> list[int]:
        layer = [0] * self.boxes
        readers: list[list[int]] = [[] for _ in self.names]
        given = [0] * self.boxes
        for a, b in self.edges:
            readers[self.at[a]].append(self.at[b])
            given[self.at[b]] += 1
        for i in range(self.boxes):
            for j in readers[i]:
                layer[j] = max(layer[j], layer[i] + 1)
        for i in reversed(range(self.boxes)):  # what nothing leads to comes right before its first reader
            if not given[i] and readers[i]:
                layer[i] = min(layer[j] for j in readers[i]) - 1
        return layer

    def _points(self) -> None:
        """Join neighbours; edges that skip layers by points in between."""
        spans = sorted((self.layer[self.at[b]] - self.layer[self.at[a]], a, b) for a, b in self.edges)
        for span, a, b in spans:
            last, target = self.at[a], self.at[b]
            if span > 1 and len(self.layer) - self.boxes + span > MOST_POINTS:
                continue
            for layer in range(self.layer[last] + 1, self.layer[target]):
                key = (self.at[a], layer)
                if key not in self.through:
                    self.through[key] = len(self.layer)
                    self.layer.append(layer)
                    self.width.append(0.0)
                    self.height.append(0.0)
                    self.up.append([])
                    self.down.append([])
                    self._join(last, self.through[key])
                last = self.through[key]
            self._join(last, target)

    def _join(self, a: int, b: int) -> None:
        self.down[a].append(b)
        self.up[b].append(a)

    # --- order ----------------------------------------------------------------------------------------
    def order(self) -> None:
        """Sort every layer by the barycentres of its neighbours, down and up in turns; keep the best."""
        place = [0.0] * len(self.layer)
        for row in self.rows:
            _place_row(row, place)
        best, fewest = [list(r) for r in self.rows], self._crossings(place)
        for turn in range(ORDER_ROUNDS):
            if not fewest:
                break
            down = turn % 2 == 0
            neighbours = self.up if down else self.down
            for row in self.rows if down else reversed(self.rows):
                # what has no neighbours there keeps its place
                key = {i: _mean([place[n] for n in neighbours[i]], place[i]) for i in row}
                row.sort(key=key.__getitem__)
                _place_row(row, place)
            crossings = self._crossings(place)
            if crossings < fewest:
                best, fewest = [list(r) for r in self.rows], crossings
        self.rows = best

    def _crossings(self, place: Sequence[float]) -> int:
        crossings = 0
        for row in self.rows:
            seen: list[float] = []
            for i in row:
                ends = [place[j] for j in self.down[i]]
                crossings += sum(len(seen) - bisect.bisect_right(seen, end) for end in ends)
                for end in ends:
                    bisect.insort(seen, end)
        return crossings

    # --- positions ------------------------------------------------------------------------------------
    def place(self) -> None:
        """Align neighbours, as far as the order and the distances allow."""
        self.x = positions(self.rows, self.up, self.down, self._distance, self.boxes)

    def _distance(self, left: int, right: int) -> float:
        """Between the centres of two neighbours in a layer."""
        gap = LANE if left >= self.boxes or right >= self.boxes else GAP
        return (self.width[left] + self.width[right]) / 2 + gap

    # --- the drawing ----------------------------------------------------------------------------------
    def layout(self) -> Layout:
        tops, heights, y = [], [], 0.0
        for row in self.rows:
            tops.append(y)
            heights.append(max(self.height[i] for i in row))
            y += heights[-1] + LAYER_GAP
        left = min(x - w / 2 for x, w in zip(self.x, self.width, strict=True))
        right = max(x + w / 2 for x, w in zip(self.x, self.width, strict=True))
        boxes = {}
        for i, name in enumerate(self.names):
            top = tops[self.layer[i]] + (heights[self.layer[i]] - self.height[i]) / 2
            boxes[name] = (self.x[i] - self.width[i] / 2 - left, top, self.width[i], self.height[i])
        paths = []
        for a, b in self.edges:
            source, target = boxes[a], boxes[b]
            points = [(source[0] + source[2] / 2, source[1] + source[3])]
            for layer in range(self.layer[self.at[a]] + 1, self.layer[self.at[b]]):
                point = self.through.get((self.at[a], layer))
                if point is not None:  # straight past the boxes of its layer
                    points += [
                        (self.x[point] - left, tops[layer]),
                        (self.x[point] - left, tops[layer] + heights[layer]),
                    ]
            paths.append([*points, (target[0] + target[2] / 2, target[1])])
        return Layout(boxes, paths, right - left, y - LAYER_GAP)


def _place_row(row: Sequence[int], place: list[float]) -> None:
    """Write down the places of a layer's boxes: their ranks, centred, so that layers compare."""
    for rank, i in enumerate(row):
        place[i] = rank - (len(row) - 1) / 2


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
