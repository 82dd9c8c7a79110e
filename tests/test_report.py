"""What a person reads: reports, refusals, and what becomes of defects."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import F64, Block, assert_same, data, optimized_block
from reports import without_estimates
from torch import Tensor, fx, nn

import fxfuse
from fxfuse.chain import Builder
from fxfuse.models import MaxMaxSum, ScaleNormPool
from fxfuse.module import OptimizedModule
from fxfuse.patterns import Legality, Match, P, X
from fxfuse.pipeline import Options


# --- text -----------------------------------------------------------------------------------------
class ADN(nn.Sequential):
    """Norm, dropout, activation, as MONAI's blocks have them."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.InstanceNorm3d(channels), nn.Dropout(0.1), nn.PReLU())


class UNet(nn.Module):
    """A small MONAI-like UNet: strided convolutions down, transposed ones up, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv3d(1, 2, 3, stride=2, padding=1), ADN(2))
        self.down2 = nn.Sequential(nn.Conv3d(2, 4, 3, stride=2, padding=1), ADN(4))
        self.up2 = nn.Sequential(nn.ConvTranspose3d(4, 2, 3, stride=2, padding=1, output_padding=1), ADN(2))
        self.up1 = nn.ConvTranspose3d(4, 2, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        return self.up1(torch.cat([skip, self.up2(self.down2(skip))], 1))


UNET_EVAL = """\
UNet: 2 regions of 8 operators, 3 rewrites
  note: captured with torch.fx.symbolic_trace; its result was compared with the model's

[1] up2.0: instance_norm > clone > prelu > conv_transpose > instance_norm > clone > prelu
    on an H100: torch's operators (6 launches), _ at best, 632 B of intermediates never written
    left to torch: the layer is small: _ by estimate, less than launches are worth
    rewritten: instance_norm > prelu > conv_transpose > instance_norm > prelu
    2x DropCopies
    CancelBiasBeforeStatistics
    ends at cat: torch.cat is not in the vocabulary

[2] up1: conv_transpose
    on an H100: torch's operators (1 launch), _ at best
    left to torch: the layer is small: _ by estimate, less than launches are worth
    ends at the output: its value is an output of the model

rewrites
"""

UNET_TRAIN = """\
UNet: 2 regions of 4 operators, 1 rewrite
  note: captured with torch.fx.symbolic_trace; its result was compared with the model's

[1] up2.0: prelu > conv_transpose > instance_norm
    on an H100: torch's operators (4 launches), _ at best
    left to torch: the layer is small: _ by estimate, less than launches are worth
    CancelBiasBeforeStatistics
    ends at up2.1.1: dropout is random in training mode

[2] up1: conv_transpose
    on an H100: torch's operators (1 launch), _ at best
    left to torch: the layer is small: _ by estimate, less than launches are worth
    ends at the output: its value is an output of the model

rewrites
"""


@pytest.mark.parametrize(("training", "text"), [(False, UNET_EVAL), (True, UNET_TRAIN)])
def test_text(training: bool, text: str) -> None:
    report = fxfuse.explain(UNet().train(training), data(1, 1, 8, 8, 8))
    assert without_estimates(str(report)).startswith(text)
    assert all(len(line) <= 100 and line == line.rstrip() for line in str(report).splitlines())
    assert str(fxfuse.explain(UNet().train(training), data(1, 1, 8, 8, 8))) == str(report)


def test_fields() -> None:
    report = fxfuse.explain(MaxMaxSum(), data(1, 32, 8, 8, 8))
    (region,) = report.regions
    assert region.anchor == "up"
    assert region.operators == ("up", "pool1", "pool2", "sum_1")
    assert region.stages == ("conv_transpose", "max_pool", "sum") == region.visible_stages
    assert region.ended == (("the output", "its value is an output of the model"),)
    assert [(a.rule, a.node) for a in region.rules] == [(a.rule, a.node) for a in report.rules]
    assert all(a.identity and "=" in a.identity for a in report.rules)
    before, after = ([n.op for n in g.nodes] for g in (report.graph_before, report.graph_after))
    assert before.count("call_module") == 3 and after.count("call_module") == 0
    assert report.headline == "MaxMaxSum: 1 region of 4 operators, 2 rewrites"
    assert report.headline in repr(fxfuse.optimize(MaxMaxSum(), data(1, 32, 8, 8, 8)))


def test_near_misses() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(1, 2, 3), nn.MaxPool3d(2, stride=3), nn.MaxPool3d(2))
    report = fxfuse.explain(model, data(1, 1, 8, 8, 8))
    (miss,) = [r for r in report.rejected if r.rule == "ComposeMaxPools"]
    assert (miss.node, miss.reason) == ("0" if miss.node == "0" else "1", miss.reason)
    assert miss.reason == "stride 3 > kernel 2 leaves gaps between the inner windows"
    assert "near misses\n  ComposeMaxPools at 1: stride 3 > kernel 2 leaves gaps" in str(report)


def test_the_environment_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_DISABLE", "ComposeMaxPools")
    report = fxfuse.explain(MaxMaxSum(), data(1, 32, 8, 8, 8))
    assert "ComposeMaxPools" not in {r.rule for r in report.rules}
    assert any(r.reason == "switched off by FXFUSE_DISABLE" for r in report.rejected)
    monkeypatch.setenv("FXFUSE_FUEL", "-1")
    optimized = fxfuse.optimize(MaxMaxSum())
    with pytest.raises(ValueError, match="FXFUSE_FUEL='-1' must be a whole number"):
        optimized(data(1, 32, 8, 8, 8))


class Everything(nn.Module):
    """Many ways for a region to end."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(1, 4, 2)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose3d(4, 4, 2))
        self.other = nn.ConvTranspose3d(4, 4, 2)
        self.hooked = nn.ConvTranspose3d(4, 4, 2)
        self.hooked.register_forward_hook(lambda m, i, o: None)
        self.norm = nn.BatchNorm3d(4)
        self.drop = nn.Dropout3d(0.2)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.up(x)
        return (
            self.norm(self.drop(y)),
            self.spectral(y),
            self.hooked(y),
            F.max_pool3d(self.other(y), 2, return_indices=True),
            torch.fft.fftn(y).real,
            y.topk(2, 1),
            F.interpolate(y, scale_factor=2),
            y.to(torch.int32),
            y.sum(dtype=F64),
            y.std() * y.new_zeros(3).sum(),
            torch.div(y, 2, rounding_mode="floor"),
            torch.add(y, y, alpha=2),
            y[:, :2],
            y.view(torch.int32),
            torch.stack([y, y]),
            y.add_(1, alpha=3) if x.shape[0] is None else y,
            y * 1j,
        )


def test_refusals_are_sentences() -> None:
    report = fxfuse.explain(Everything(), data(1, 1, 4, 4, 4))
    reasons = [reason for r in report.regions for _, reason in r.ended] + [r.reason for r in report.rejected]
    assert len(report.regions) == 2 and len(reasons) > 12
    for reason in reasons:
        assert "\n" not in reason and 3 <= len(reason.split()) <= 30, reason
        assert not any(mark in reason for mark in ("<", "Traceback", "FakeTensor", "%", "Error")), reason
        assert not reason.endswith("."), reason
    nodes = {node for r in report.regions for node, _ in r.ended}
    assert {"spectral", "hooked", "drop", "topk"} <= nodes
    assert {r.node for r in report.rejected if r.rule == "the region"} == {"spectral", "hooked"}


# --- when there is nothing to say -----------------------------------------------------------------
def test_before_the_first_call() -> None:
    optimized = fxfuse.optimize(Block())
    report = optimized.fxfuse_report
    assert not report.regions and report.graph_before is None
    assert str(report) == "Block: runs as it is\n  note: nothing is captured yet: the first call decides"
    parts = fxfuse.optimize(nn.Sequential(Block()), submodules=["0"])
    assert parts.fxfuse_report.notes == ["0: nothing is captured yet: the first call decides"]


def test_left_alone() -> None:
    class Decides(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) if x.sum() > 0 else x

    report = fxfuse.explain(Decides(), data())
    assert report.headline == "Decides: runs as it is"
    assert report.notes[-1] == "left alone: the model runs as it is; submodules=[...] can optimise parts of it"
    assert fxfuse.explain(nn.Conv3d(2, 2, 1), data()).headline == "Conv3d: nothing to fuse"


def test_explain_changes_nothing() -> None:
    model = Block()
    before, x = copy.deepcopy(model.state_dict()), data()
    kept = x.clone()
    report = fxfuse.explain(model, x)
    assert report.regions and torch.equal(x, kept)
    assert_same(dict(model.state_dict()), dict(before))


def test_explain_takes_what_the_model_takes() -> None:
    class Named(Block):
        def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
            return self.up(x) * (2 if twice else 1)

    assert len(fxfuse.explain(Named(), data()).regions[0].operators) == 2
    assert fxfuse.explain(Named(), data(), twice=True).rules
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        fxfuse.explain(Named())
    with pytest.raises(TypeError, match=r"takes an nn.Module, not function"):
        fxfuse.explain(F.relu, data())


def test_explain_follows_the_options_of_an_optimized_module() -> None:
    model = ScaleNormPool().eval()
    x = data(1, 64, 2, 2, 2)
    optimized = fxfuse.optimize(model, x, allow={"bitwise"})
    assert not fxfuse.explain(optimized, x).rules
    assert not optimized.fxfuse_report.rules
    assert fxfuse.explain(model, x).rules
    assert any("it is reassociating: pass allow={" in r.reason for r in fxfuse.explain(optimized, x).rejected)


def test_merged_report() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.ReLU()), "b": nn.Conv3d(2, 2, 1)})

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["b"](self.parts["a"](x))

    optimized = fxfuse.optimize(Holder(), data(), submodules=["parts.*"])
    report = optimized.fxfuse_report
    assert report.headline == "Holder: 1 region of 2 operators, 0 rewrites"
    assert [n.split(":")[0] for n in report.notes] == ["parts.a", "parts.b"]


# --- defects --------------------------------------------------------------------------------------
@pytest.mark.defective
def test_a_defect_of_the_compiler_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(fxfuse.Rule):
        """It raises"""

        legality = Legality.BITWISE
        pattern = P("relu", X)

        def rewrite(self, match: Match, build: Builder) -> fx.Node:
            raise RuntimeError("broken")

    model = Block().eval()
    optimized = OptimizedModule(model, Options(rules=(Broken(),)))
    x = data()
    with caplog.at_level(logging.WARNING, logger="fxfuse"):
        for _ in range(2):
            assert_same(optimized(x).detach(), model(x).detach())
    assert "the rule Broken is defective at" in caplog.text
    assert any("defective" in r.reason for r in optimized.fxfuse_report.rejected)


def test_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fxfuse"):
        optimized_block()
    assert "fxfuse.pipeline" in {r.name for r in caplog.records}
    assert "1 region" in caplog.text and "fired at" in caplog.text


def test_a_region_shows_its_plan_and_its_source() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(32, 64, 3, stride=2), nn.ReLU(), nn.InstanceNorm3d(64), nn.SiLU())
    region = fxfuse.explain(model, torch.randn(2, 32, 24, 24, 24)).regions[0]
    assert without_estimates(region.plan) == (
        "one kernel: conv_transpose > relu -> f32[2, 64, 49, 49, 49] and statistics; "
        "then statistics of v1, gathered on the way; then one kernel: sub > mul > silu -> f32[2, 64, 49, 49, 49] "
        "(by estimate _ with one run of the convolution, _ with two)"
    )
    assert region.source.count("__global__") == 6 + 1 + 2
    small = fxfuse.explain(nn.ConvTranspose3d(2, 3, 2, stride=3), torch.randn(1, 2, 4, 4, 4)).regions[0]
    assert small.plan.startswith("torch's operators: the layer is small") and small.source == ""
