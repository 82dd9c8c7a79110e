"""Boxes and groups: every node is somewhere, no line leads back, and regions stay visible."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from reports import explained
from torch import Tensor, nn

import fxfuse
from fxfuse.report.drawing import MOST_CHARACTERS, _boxes, _collapsed, _depths, _hulls, drawings, shortened
from fxfuse.report.nodes import NodeReport


class Decoder(nn.Module):
    """Convolutions down, two regions up, a skip by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 2, stride=2), nn.ReLU())
        self.up1 = nn.Sequential(nn.ConvTranspose3d(4, 4, 2, stride=2), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv3d(8, 4, 3, padding=1), nn.ReLU())
        self.up2 = nn.ConvTranspose3d(4, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down[1](self.down[0](x))
        low = self.down[3](self.down[2](skip))
        return self.up2(self.mix(torch.cat([skip, self.up1(low)], 1))).sigmoid()


def test_the_drawing_of_a_decoder() -> None:
    found = drawings(explained(Decoder().eval(), (1, 1, 8, 8, 8)))
    whole, collapsed = found["before"]["whole"], found["before"]["collapsed"]
    assert [b["title"] for b in whole["boxes"]][:3] == ["input_0", "Conv3d", "ReLU"]
    assert whole["boxes"][1]["lines"] == ("down.0", "f32[1, 4, 8, 8, 8]")
    assert [b["region"] for b in whole["boxes"] if b["region"] is not None] == [0, 0, 0, 1, 1, 1]
    assert {h["region"] for h in whole["hulls"]} == {0, 1}
    groups = [b for b in collapsed["boxes"] if b["kind"] == "group"]
    assert [b["title"] for b in groups] == ["3 operators", "2 operators"]
    assert groups[0]["lines"] == ("2 Conv3d", "ReLU")
    after = found["after"]["collapsed"]["boxes"]
    assert [b["kind"] for b in after] == ["input", "group", "region", "group", "region", "output"]
    assert after[2]["title"] == "[1] up1.0" and after[2]["region"] == 0
    assert any(line.startswith("\N{WHITE SQUARE} relu > conv_transpose > relu") for line in after[2]["lines"])
    names = {b["name"] for b in after}
    assert all(line["from"] in names and line["to"] in names for line in found["after"]["collapsed"]["lines"])


class Named(nn.Module):
    """An export calls its input as it calls parameters; the branch is too much for symbolic_trace."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(2, 2, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.ones(1))

    def forward(self, p_up_input: Tensor) -> Tensor:
        y: Tensor = self.up(p_up_input) * self.scale
        return y + self.offset if p_up_input.shape[0] < 9 else y


def test_weights_are_not_drawn() -> None:
    report = fxfuse.explain(Named(), p_up_input=torch.randn(1, 2, 4, 4, 4))
    assert "captured with torch.export" in report.notes[-1]
    kinds = {n.name: n.kind for n in report.nodes if n.kind in ("weight", "input")}
    assert list(kinds.values()).count("weight") == 4 and kinds["p_up_input"] == "input"
    for drawing in drawings(report).values():
        assert [b["kind"] for b in drawing["whole"]["boxes"]].count("input") == 1


def test_a_region_that_does_not_lie_together_has_no_hull() -> None:
    def box(x: float, y: float, region: int | None) -> dict[str, object]:
        return {"x": x, "y": y, "width": 10.0, "height": 10.0, "region": region}

    apart = [box(0, 0, 0), box(0, 50, 0), box(40, 20, None), box(80, 0, 1)]
    assert _hulls(apart) == [{"region": 0, "x": 0, "y": 0, "width": 10.0, "height": 60.0}]
    assert _hulls([*apart, box(5, 25, None)]) == []


def test_long_names_keep_their_ends() -> None:
    assert shortened("model.up") == "model.up"
    long = "model." + "submodule." * 9 + "conv"
    assert len(shortened(long)) == MOST_CHARACTERS
    assert shortened(long).endswith(".submodule.conv") and shortened(long).startswith("\N{HORIZONTAL ELLIPSIS}")


# --- groups ---------------------------------------------------------------------------------------
@st.composite
def graphs(draw: st.DrawFn) -> list[NodeReport]:
    """Nodes in topological order; a region is an interval of it, which nothing leaves and enters again."""
    count = draw(st.integers(1, 20))
    cuts = sorted(draw(st.sets(st.integers(0, count), max_size=6)))
    region_of: dict[int, int] = {}
    for number, (first, last) in enumerate(zip(cuts[::2], cuts[1::2], strict=False)):
        region_of.update(dict.fromkeys(range(first, last), number))
    nodes = []
    for i in range(count):
        reads = draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []
        kind = "operator" if reads or i in region_of else "input"
        names = tuple(f"n{r}" for r in reads)
        nodes.append(NodeReport(f"n{i}", kind, f"n{i}", "op", "f32[1]", 4, names, region=region_of.get(i)))
    return nodes


@given(graphs())
def test_groups_make_no_cycle_and_lose_nothing(nodes: list[NodeReport]) -> None:
    boxes, edges = _boxes(nodes, [])
    groups, lines = _collapsed(boxes, edges, nodes)  # it asserts that the result can be sorted
    assert sorted(m for g in groups for m in g.members) == sorted(n.name for n in nodes)
    owner = {m: g.name for g in groups for m in g.members}
    assert set(lines) == {(owner[a], owner[b]) for a, b in edges if owner[a] != owner[b]}
    place = {g.name: i for i, g in enumerate(groups)}
    assert all(place[a] < place[b] for a, b in lines)
    for group in groups:
        if group.kind == "group":
            assert len(group.members) > 1 and group.region is None


@given(graphs())
def test_depths_grow_along_lines(nodes: list[NodeReport]) -> None:
    boxes, edges = _boxes(nodes, [])
    reads = {b.name: [a for a, c in edges if c == b.name] for b in boxes}
    depth, region = _depths(boxes, reads), {b.name: b.region for b in boxes}
    for a, b in edges:
        left = region[a] is not None and region[a] != region[b]
        assert depth[b] >= depth[a] + left
    for number in {r for r in region.values() if r is not None}:
        assert len({depth[n] for n, r in region.items() if r == number}) == 1


def test_neighbours_are_grouped() -> None:
    chain = [
        NodeReport(f"n{i}", "operator", f"n{i}", "relu", "f32[1]", 4, (f"n{i - 1}",) if i else ()) for i in range(9)
    ]
    boxes, edges = _boxes(chain, [])
    groups, lines = _collapsed(boxes, edges, chain)
    assert [(g.title, g.lines) for g in groups] == [("9 operators", ("9 relu",))] and not lines
    assert list(itertools.chain(*(g.members for g in groups))) == [n.name for n in chain]
