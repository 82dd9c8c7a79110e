"""The report as data, as code, as a Graphviz file, and on a terminal."""

from __future__ import annotations

import copy
import functools
import io
import json
from typing import Any

import pytest
import torch
from reports import explained
from torch import Tensor, nn

import fxfuse
from fxfuse import dynamo
from fxfuse.kernels.compilation import jit
from fxfuse.models import CASES
from fxfuse.report import Report
from fxfuse.report.document import SCHEMA
from fxfuse.report.words import duration


def first() -> Report:
    return explained(CASES[0].make().eval(), CASES[0].shape)


class Twice(nn.Module):
    """Two regions with the same weights, of the same sizes: equal in everything but their place."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(2, 2, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.up(x).relu(), self.up(y).relu()


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(2, 2, 2)
        self.norm = nn.BatchNorm3d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


# --- JSON -----------------------------------------------------------------------------------------
def test_the_document() -> None:
    data = json.loads(first().to_json())
    assert (data["schema"], data["fxfuse"], data["model"]) == (SCHEMA, fxfuse.__version__, "MaxMaxSum")
    (region,) = data["regions"]
    assert region["anchor"] == "up" and region["chain"] == ["conv_transpose", "max_pool", "max_pool", "sum"]
    account = region["account"]
    assert region["sentence"] == (
        f"conv_transpose > max_pool > max_pool > sum: 2 kernels (6 launches), {duration(account['seconds'])} est., "
        "1.01 GB of intermediates never written"
    )
    assert [p["by"] for p in account["parts"]] == ["kernel", "kernel"]
    assert account["saved"] == account["before"]["read"] + account["before"]["written"] - account["bytes"]
    assert all("extern" in part["source"] for part in account["parts"])
    assert {"name": "results", "value": "f32[16, 64, 30, 30, 30], contiguous"} in account["parts"][0]["facts"]
    before, after = data["nodes"]["before"], data["nodes"]["after"]
    assert [n["kind"] for n in before] == ["input", "weight", "weight", *["operator"] * 4, "output"]
    assert [n["region"] for n in before] == [None, None, None, 0, 0, 0, 0, None]
    assert before[3]["value"] == "f32[16, 64, 63, 63, 63]" and before[3]["bytes"] == 4 * 16 * 64 * 63**3
    assert before[3]["weights"] == [["weight", "f32[32, 64, 5, 5, 5]"], ["bias", "f32[64]"]]
    assert [n["kind"] for n in after] == ["input", "weight", "weight", "region", "output"]
    assert after[-1]["reads"] == [after[3]["name"]]
    assert {r["rule"] for r in data["rules"]} == {"ComposeMaxPools", "DropDeadOutputs"}
    assert data["staying"] == {} and data["parts"] == {}


def test_regions_of_the_same_text_are_told_apart() -> None:
    report = fxfuse.explain(Twice().eval(), torch.ones(1, 2, 3, 3, 3), torch.ones(1, 2, 3, 3, 3))
    assert report.regions[0].region == report.regions[1].region
    data = json.loads(report.to_json())
    fused = [n for n in data["nodes"]["after"] if n["kind"] == "region"]
    assert [n["region"] for n in fused] == [0, 1]
    assert "input_0" in fused[0]["reads"] and "input_1" in fused[1]["reads"]
    assert "y1 = region_1(" in report.code_after and "y2 = region_2(" in report.code_after


def test_a_copied_report_says_the_same() -> None:
    report = fxfuse.explain(Trained().eval(), torch.ones(1, 2, 3, 3, 3))
    assert copy.deepcopy(report).to_json() == report.to_json()


def test_what_the_compiler_added_is_there() -> None:
    data = json.loads(explained(Trained().train(), (2, 2, 4, 4, 4)).to_json())
    added = [n for n in data["nodes"]["after"] if n["spelling"] == "update_running_statistics"]
    assert len(added) == 1 and any("region" in r for r in added[0]["reads"])


def test_why_a_node_stays() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv3d(1, 1, 1), nn.ConvTranspose3d(1, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(self.conv(x.relu()))
            return torch.cat([y, y], 1) + y

    report = explained(Mixed(), (1, 1, 4, 4, 4))
    reasons = {n.label: n.reason for n in report.nodes}
    assert reasons["conv"] == "a convolution is in the vocabulary only where it reads one position per sample"
    assert reasons["cat"] == "torch.cat is not in the vocabulary"
    assert reasons["add"] == "it also needs cat, which comes after the region"
    assert reasons["relu"] == "no transposed convolution is in front of it"
    assert reasons["up"] == reasons["input_0"] == ""
    assert report.staying == {"relu": 1, "Conv3d": 1, "cat": 1, "add": 1}
    assert str(report).splitlines()[-4:-2] == ["stays in torch", "  1 Conv3d, 1 add, 1 cat, 1 relu"]


def test_parts_of_a_model() -> None:
    holder = nn.ModuleDict(
        {"a": nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.ReLU()), "b": nn.ConvTranspose3d(2, 2, 2)}
    )

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = holder

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["b"](self.inner["a"](x))

    optimized: Any = fxfuse.optimize(Whole(), torch.ones(1, 2, 4, 4, 4), submodules=["inner.*"])
    data = json.loads(optimized.fxfuse_report.to_json())
    assert len(data["regions"]) == 2 and not data["captured"] and not data["nodes"]["before"]
    assert [len(p["regions"]) for p in data["parts"].values()] == [1, 1]
    assert list(data["parts"]) == ["inner.a", "inner.b"] and data["parts"]["inner.a"]["nodes"]["before"]


def test_registers(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """They are told where a cache has the cubin, and nothing is compiled for them unless asked."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    jit.forget()
    model = nn.Sequential(nn.ConvTranspose3d(64, 16, 1), nn.ReLU()).eval()  # torch convolves
    report = explained(model, (8, 64, 32, 32, 32))
    (kernel,) = [p for p in report.regions[0].account.parts if p.source]  # type: ignore[union-attr]

    def resources() -> Any:
        return json.loads(report.to_json())["regions"][0]["account"]["parts"][-1]["resources"]

    assert resources() == {}
    cubin = jit.compile_cubin(kernel.source)
    jit.forget()
    found = resources()
    assert set(found) == set(cubin.kernels) == {"whole", "any"}
    assert found["whole"]["registers"] == cubin.kernels["whole"].registers > 0


# --- sizes that are not known ---------------------------------------------------------------------
def test_symbolic_sizes() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.ConvTranspose3d(2, 3, 2), nn.ReLU()).eval()
    with torch.no_grad():
        backend = functools.partial(dynamo.backend, options={"remainder": "eager"})
        compiled = torch.compile(model, backend=backend, dynamic=True)
        compiled(torch.randn(2, 2, 4, 4, 4))
    report = dynamo.reports()[-1]
    (region,) = json.loads(report.to_json())["regions"]
    assert region["account"] is None and region["summary"] == "torch's operators: sizes are not known before the call"
    values = {n.kind: n.value for n in report.nodes if n.value}
    assert " + 1, s" in values["operator"] and all(n.bytes is None for n in report.nodes if n.kind == "operator")
    kinds = {n.name: n.kind for n in report.nodes}
    assert [k for n, k in kinds.items() if "weight" in n or "bias" in n] == ["weight", "weight"]
    assert "sizes are not known before the call" in str(report)


# --- code -----------------------------------------------------------------------------------------
def test_code() -> None:
    report = first()
    assert report.code_before == (
        "def forward(self, input_0: f32[16, 32, 32, 32, 32]):\n"
        "    up = self.up(input_0)  # f32[16, 64, 63, 63, 63]\n"
        "    pool1 = self.pool1(up)  # f32[16, 64, 31, 31, 31]\n"
        "    pool2 = self.pool2(pool1)  # f32[16, 64, 10, 10, 10]\n"
        "    sum_1 = torch.sum(pool2, dim=1, keepdim=True)  # f32[16, 1, 10, 10, 10]\n"
        "    return [sum_1]\n"
    )
    program, function = report.code_after.split("\n\n\n")
    assert program == report.regions[0].region.rewritten.text("region_1").rstrip()
    assert function.splitlines()[-2:] == ["    y1 = region_1(input_0, p_up_weight, p_up_bias)", "    return [y1]"]


def test_code_of_every_kind_of_node() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1)])
            self.up = nn.ConvTranspose3d(1, 1, 2)

        def forward(self, x: Tensor) -> Any:
            a, b = self.blocks[0](x), self.blocks[1](x)
            y = self.up(a + b)
            return {"y": y.view(x.shape[0], -1)[:, 1:3], "pair": (y.relu(), torch.stack([a, b], dim=0))}

    before = explained(Kinds(), (1, 1, 4, 4, 4)).code_before
    for line in (
        "blocks_0 = self.blocks.0(input_0)  # f32[1, 1, 4, 4, 4]",
        "blocks_1 = self.blocks.1(input_0)",
        "add = blocks_0 + blocks_1",
        "view = up.view(getitem, -1)",
        "= view[(slice(None, None, None), slice(1, 3, None))]",
        "stack = torch.stack([blocks_0, blocks_1], dim=0)",
    ):
        assert line in before, before


# --- Graphviz -------------------------------------------------------------------------------------
def test_dot() -> None:
    text = first().to_dot()
    assert text.startswith("digraph fxfuse {") and text.count("{") == text.count("}")
    assert text.count(" -> ") == 5 + 2
    assert '"before model_up" -> "before model_pool1";' in text
    assert '"after input_0" -> "after run_region";' in text
    assert text.count("fillcolor") == 4 + 1
    assert "p_up_weight" not in text


def test_dot_quotes() -> None:
    model = nn.Sequential()
    model.add_module('a"b\\c<d>', nn.ConvTranspose3d(1, 1, 2))
    text = explained(model, (1, 1, 2, 2, 2)).to_dot()
    assert 'a\\"b\\\\c<d>' in text


# --- the terminal ---------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_show_is_plain_in_a_file() -> None:
    report, out = first(), io.StringIO()
    report.show(out)
    assert out.getvalue() == f"{report}\n"


def test_show_is_plain_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report, out = first(), Terminal()
    report.show(out)
    assert out.getvalue() == f"{report}\n"


def test_show_by_rich() -> None:
    pytest.importorskip("rich", reason="needs the extra `rich`")
    report, out = first(), Terminal()
    report.show(out)
    shown = out.getvalue()
    assert shown != f"{report}\n" and "\x1b[" in shown
    for words in ("MaxMaxSum", "2 kernels", "ComposeMaxPools", "1.01 GB"):
        assert words in shown
    from rich.console import Console

    plain = io.StringIO()
    Console(file=plain, width=100).print(report)  # rich's own protocol
    assert "conv_transpose > max_pool" in plain.getvalue() and "\x1b[" not in plain.getvalue()
