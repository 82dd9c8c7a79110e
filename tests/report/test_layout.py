"""Drawings: nothing overlaps, lines lead downwards and past the boxes, chains are straight."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.report.align import positions
from fxfuse.report.layout import GAP, LAYER_GAP, Layout, layered

SIZE = (100.0, 40.0)


def laid_out(edges: list[tuple[str, str]], **sizes: tuple[float, float]) -> Layout:
    names = dict.fromkeys(n for edge in edges for n in edge)
    return layered({n: sizes.get(n, SIZE) for n in names}, edges)


def centre(layout: Layout, name: str) -> float:
    x, _, width, _ = layout.boxes[name]
    return x + width / 2


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, tuple[float, float]], list[tuple[str, str]]]:
    count = draw(st.integers(1, 24))
    names = [f"n{i}" for i in range(count)]
    sizes = {n: (draw(st.floats(30, 240)), draw(st.floats(20, 120))) for n in names}
    pairs = [(a, b) for a, b in itertools.combinations(names, 2)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=40, unique=True)) if pairs else []
    return sizes, edges


@given(graphs())
def test_drawings_are_in_order(graph: tuple[dict[str, tuple[float, float]], list[tuple[str, str]]]) -> None:
    sizes, edges = graph
    layout = layered(sizes, edges)
    assert list(layout.boxes) == list(sizes) and len(layout.edges) == len(edges)
    for name, (x, y, width, height) in layout.boxes.items():
        assert (width, height) == sizes[name]
        assert x >= -1e-6 and y >= 0 and x + width <= layout.width + 1e-6 and y + height <= layout.height + 1e-6
    for a, b in itertools.combinations(layout.boxes.values(), 2):
        assert _apart(a, b), "boxes overlap"
    for (a, b), points in zip(edges, layout.edges, strict=True):
        first, last = layout.boxes[a], layout.boxes[b]
        assert points[0] == (pytest.approx(first[0] + first[2] / 2), pytest.approx(first[1] + first[3]))
        assert points[-1] == (pytest.approx(last[0] + last[2] / 2), pytest.approx(last[1]))
        assert all(p[1] <= q[1] for p, q in itertools.pairwise(points))
        for (x, top), (also_x, bottom) in itertools.pairwise(points[1:-1]):
            if x == also_x:  # past the boxes of a layer
                assert all(_apart(box, (x, top, 0.0, bottom - top)) for box in layout.boxes.values())


def _apart(a: tuple[float, ...], b: tuple[float, ...], within: float = 1e-6) -> bool:
    return (
        a[0] + a[2] <= b[0] + within
        or b[0] + b[2] <= a[0] + within
        or a[1] + a[3] <= b[1] + within
        or b[1] + b[3] <= a[1] + within
    )


def test_a_chain_is_straight() -> None:
    layout = laid_out([("a", "b"), ("b", "c"), ("c", "d")], b=(220.0, 60.0), d=(30.0, 20.0))
    assert len({round(centre(layout, n), 6) for n in "abcd"}) == 1
    tops = [layout.boxes[n][1] for n in "abcd"]
    assert tops == [0, 40 + LAYER_GAP, 40 + 60 + 2 * LAYER_GAP, 140 + 3 * LAYER_GAP]
    assert (layout.width, layout.height) == (220, tops[-1] + 20)


def test_chains_beside_each_other_are_straight() -> None:
    """A network with long skips: the chain between them does not wander."""
    chain = [f"n{i}" for i in range(12)]
    edges = [*itertools.pairwise(chain), ("n1", "n10"), ("n3", "n8"), ("n4", "n7")]
    layout = laid_out(edges)
    for inner in (chain[2:4], chain[5:7]):
        assert len({round(centre(layout, n), 3) for n in inner}) == 1, inner
    for (a, b), points in zip(edges, layout.edges, strict=True):
        if len(points) > 2:
            assert len({round(x, 3) for x, _ in points[1:-1]}) == 1, (a, b)


def test_crossings_are_undone() -> None:
    """a1 .. a4 lead to b4 .. b1, given in the other order."""
    edges = [("r", f"a{i}") for i in range(4)] + [(f"a{i}", f"b{3 - i}") for i in range(4)]
    names = ["r", *(f"a{i}" for i in range(4)), *(f"b{i}" for i in range(4))]
    layout = layered(dict.fromkeys(names, SIZE), edges)
    order_a = sorted(range(4), key=lambda i: centre(layout, f"a{i}"))
    order_b = sorted(range(4), key=lambda i: centre(layout, f"b{i}"))
    assert order_a == [3 - i for i in order_b]


def test_neighbours_keep_their_distance() -> None:
    layout = laid_out([("a", "b"), ("a", "c")])
    (left, *_), (right, *_) = sorted((layout.boxes["b"], layout.boxes["c"]))
    assert right - left - SIZE[0] == pytest.approx(GAP)
    assert centre(layout, "a") == pytest.approx((centre(layout, "b") + centre(layout, "c")) / 2)


def test_a_source_comes_right_before_its_reader() -> None:
    layout = laid_out([("a", "b"), ("b", "c"), ("mask", "c")])
    assert layout.boxes["mask"][1] == layout.boxes["b"][1]


def test_lines_of_one_box_share_their_way() -> None:
    chain = [f"n{i}" for i in range(8)]
    edges = [*itertools.pairwise(chain), ("n0", "n5"), ("n0", "n7")]
    layout = laid_out(edges)
    shorter, longer = layout.edges[-2], layout.edges[-1]
    assert longer[: len(shorter) - 1] == shorter[:-1]


def test_nothing() -> None:
    assert layered({}, []) == Layout({}, [], 0.0, 0.0)


def test_many_boxes_take_seconds() -> None:
    """A long network with a skip over three layers everywhere, and one over everything."""
    names = [f"n{i}" for i in range(4000)]
    edges = [*itertools.pairwise(names), *zip(names, names[3:], strict=False), (names[0], names[-1])]
    started = time.perf_counter()
    layout = layered(dict.fromkeys(names, SIZE), edges)
    assert time.perf_counter() - started < 20
    assert len({box[1] for box in layout.boxes.values()}) == 4000


def test_too_many_points_are_left_out() -> None:
    names = [f"n{i}" for i in range(400)]
    skips = [(a, names[-1]) for a in names[:-2]]  # 80 thousand layers in between
    layout = layered(dict.fromkeys(names, SIZE), [*itertools.pairwise(names), *skips])
    drawn = [len(points) for points in layout.edges[-len(skips) :]]
    assert min(drawn) == 2 and max(drawn) > 100


def test_a_long_line_is_straight_where_another_one_crosses_it() -> None:
    """Boxes 0 and 1, points 2 and 3: the lines from 0 to 1 and from 2 to 3 cross."""
    up, down = [[], [0], [], [2]], [[1], [], [3], []]
    x = positions([[0, 2], [3, 1]], up, down, lambda a, b: 10.0, boxes=2)
    assert x[2] == x[3] and x[0] + 10 <= x[2] and x[3] + 10 <= x[1]
