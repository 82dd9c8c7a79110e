"""Positions along the layers of a drawing: straight lines where the orders allow (Brandes and Koepf, 2002).

Boxes are aligned with the median of their neighbours, in four ways: with those above or below, from the left or from
the right. Each way makes columns that are pushed together; a box comes to lie between the middle two of its four
places. Pushing together is by longest paths, twice, as in dagre: boxes have widths, for which the paper's way fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

Rows = list[list[int]]
Neighbours = Sequence[Sequence[int]]
Distance = Callable[[int, int], float]


def positions(rows: Rows, up: Neighbours, down: Neighbours, distance: Distance, boxes: int) -> list[float]:
    """The centre of every vertex, by its number; those from ``boxes`` on are points that long edges pass.

    ``rows``: the vertices of each layer in their order. ``distance``: the least one between two neighbours in a row.
    """
    conflicts = _conflicts(rows, up, boxes)
    found: list[list[float]] = []
    for above in (True, False):
        for left in (True, False):
            layers = rows if above else rows[::-1]
            layers = layers if left else [row[::-1] for row in layers]
            column = _columns(layers, up if above else down, conflicts)
            between = distance if left else (lambda a, b: distance(b, a))
            x = _compact(layers, column, between)
            found.append(x if left else [-v for v in x])
    _bring_together(found)
    return [sum(sorted(four)[1:3]) / 2 for four in zip(*found, strict=True)]


def _conflicts(rows: Rows, up: Neighbours, boxes: int) -> set[tuple[int, int]]:
    """Edges, as (upper, lower), that cross one between two points: that one shall be straight."""
    found = set()
    for above, row in itertools.pairwise(rows):
        place = {v: i for i, v in enumerate(above)}
        left, start = 0, 0
        for i, v in enumerate(row):
            point = next((u for u in up[v] if u >= boxes), None) if v >= boxes else None
            if point is None and i < len(row) - 1:
                continue
            right = place[point] if point is not None else len(above)
            for w in row[start : i + 1]:
                for u in up[w]:
                    if not left <= place[u] <= right and not (u >= boxes and w >= boxes):
                        found.add((u, w))
            left, start = right, i + 1
    return found


def _columns(layers: Rows, neighbours: Neighbours, conflicts: set[tuple[int, int]]) -> list[int]:
    """The first vertex of the column that each vertex is in: it is aligned with a median of its neighbours."""
    count = sum(map(len, layers))
    root, taken = list(range(count)), [False] * count
    for above, row in itertools.pairwise(layers):
        place = {v: i for i, v in enumerate(above)}
        last = -1
        for v in row:
            near = sorted((u for u in neighbours[v] if u in place), key=place.__getitem__)
            middle = (len(near) - 1) // 2, len(near) // 2
            for u in dict.fromkeys(near[m] for m in middle if near):
                free = not taken[u] and place[u] > last
                if free and (u, v) not in conflicts and (v, u) not in conflicts:
                    root[v], taken[u] = root[u], True
                    last = place[u]
                    break
    return root


def _compact(layers: Rows, column: Sequence[int], distance: Distance) -> list[float]:
    """Every column as far left as its neighbours let it, then as far right as those on its right do."""
    after: dict[int, dict[int, float]] = {c: {} for c in column}
    before: dict[int, dict[int, float]] = {c: {} for c in column}
    for row in layers:
        for v, w in itertools.pairwise(row):
            a, b = column[v], column[w]
            after[a][b] = before[b][a] = max(after[a].get(b, 0.0), distance(v, w))
    order = _topological(after, before)
    x: dict[int, float] = {}
    for c in order:
        x[c] = max((x[p] + gap for p, gap in before[c].items()), default=0.0)
    for c in reversed(order):
        x[c] = max(x[c], min((x[n] - gap for n, gap in after[c].items()), default=x[c]))
    return [x[c] for c in column]


def _topological(after: dict[int, dict[int, float]], before: dict[int, dict[int, float]]) -> list[int]:
    missing = {c: len(p) for c, p in before.items()}
    order = [c for c, count in missing.items() if not count]
    for c in order:  # grows on the way
        for following in after[c]:
            missing[following] -= 1
            if not missing[following]:
                order.append(following)
    return order


def _bring_together(found: list[list[float]]) -> None:
    """Move the four drawings to where the narrowest of them is: by their left ends, or by their right ones."""
    narrow = min(found, key=lambda x: max(x) - min(x))
    left, right = min(narrow), max(narrow)
    for i, x in enumerate(found):
        shift = left - min(x) if i % 2 == 0 else right - max(x)
        found[i] = [v + shift for v in x]
