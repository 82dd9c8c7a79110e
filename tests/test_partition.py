"""Regions in whole graphs: where they grow, where they end and why, what must stay in order."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from agreement import assert_agree, assert_same
from grown import CONV, SAME, Lines, agree, chain, chains_of, ended
from strategies import POINTWISE, Chain
from torch import Tensor, fx, nn

import fxfuse
from fxfuse import ops
from fxfuse.kernels.plan import Path

OUTPUT = "its value is an output of the model"


# --- growing --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "regions", "reasons"),
    [
        # values that are used outside become outputs
        (
            chain("v1 = v0.relu()", "v2 = v0 + v1", "return v1, v2"),
            ["conv_transpose > relu > add"],
            {"the output": OUTPUT},
        ),
        (
            chain("v1 = v0.relu()", "v2 = v0.cumsum(0)", "v3 = v1 * 2", "return v2, v3"),
            ["conv_transpose > relu > mul"],
            {"cumsum": "Tensor.cumsum is not in the vocabulary", "the output": OUTPUT},
        ),
        # a value used twice, and a number that is read from it
        (
            chain("v1 = v0 * v0", "v2 = v1 * v0.shape[1]", "return v2"),
            ["conv_transpose > mul > mul"],
            {"the output": OUTPUT},
        ),
        # a residual from before the convolution
        (
            chain("v1 = v0 + x.tanh()", "return v1", modules=(SAME,)),
            ["conv_transpose > add"],
            {"the output": OUTPUT},
        ),
        # two anchors and one sum, which belongs to the first
        (
            chain("v1 = self.m1(x)", "v2 = v0.relu() + v1.sigmoid()", "return v2", modules=(CONV, CONV)),
            ["conv_transpose > relu > add", "conv_transpose > sigmoid"],
            {"add": "it belongs to another region", "the output": OUTPUT},
        ),
        # one anchor behind another
        (
            chain("v1 = self.m1(v0.relu())", "return v1.relu()", modules=(SAME, CONV)),
            ["conv_transpose > relu", "conv_transpose > relu"],
            {"m1": "it is the anchor of a region of its own", "the output": OUTPUT},
        ),
        # what needs a value that comes after the region
        (
            chain("v1 = v0.cumsum(0)", "v2 = v0.relu()", "v3 = v2 + v1", "return v3"),
            ["conv_transpose > relu"],
            {
                "cumsum": "Tensor.cumsum is not in the vocabulary",
                "add": "it also needs cumsum, which comes after the region",
            },
        ),
        # a value outside between two regions: neither may wait for the other
        (
            chain(
                *("v1 = self.m1(x)", "v2 = v0.cumsum(0)", "v3 = v1 + v2", "v4 = v0 + v1", "return v3, v4"),
                modules=(CONV, CONV),
            ),
            ["conv_transpose > add", "conv_transpose"],
            {
                "cumsum": "Tensor.cumsum is not in the vocabulary",
                "add": "it also needs cumsum, which comes after the region",
                "add_1": "it belongs to another region",
                "the output": OUTPUT,
            },
        ),
        # an operator that writes to memory of its own while it runs
        (
            chain("v1 = F.rms_norm(v0, (4, 5))", "v2 = self.m1(v1)", "return v2", modules=(CONV, "nn.RMSNorm(5)")),
            ["conv_transpose > rms_norm > rms_norm"],
            {"the output": OUTPUT},
        ),
        # shapes that go and come back
        (
            chain("v1 = v0.flatten(2).softmax(-1).view(v0.shape)", "return v1"),
            ["conv_transpose > reshape > softmax > reshape"],
            {"the output": OUTPUT},
        ),
        (
            chain("v1 = v0.permute(0, 2, 3, 1).contiguous().view(2, -1)", "return v1"),
            ["conv_transpose > permute > contiguous > reshape"],
            {"the output": OUTPUT},
        ),
        # values of a maximum whose indices nobody reads
        (
            chain("v1 = v0.max(1)[0] + v0.min(1).values", "return v1"),
            ["conv_transpose > max > min > add"],
            {"the output": OUTPUT},
        ),
        (
            chain("v1, i = v0.max(1)", "return v1, i"),
            ["conv_transpose"],
            {"max_1": "a max that also returns indices"},
        ),
        # a view in one region that another one would look through
        (
            chain("v1 = v0.detach()", "v2 = v1 * self.m1(v1.relu())", "return v2", modules=(SAME, SAME)),
            ["conv_transpose > detach > relu", "conv_transpose > mul"],
            {
                "m1": "it is the anchor of a region of its own",
                "mul": "it also needs m1, which comes after the region",
                "the output": OUTPUT,
            },
        ),
        (
            chain("v1 = self.m1(x)", "v2 = v0 * v1.detach()", "return v2", modules=(SAME, SAME)),
            ["conv_transpose > detach > mul", "conv_transpose > detach"],
            {"mul": "it belongs to another region", "the output": OUTPUT},
        ),
        # what nothing reads is not computed
        (chain("v1 = v0.exp() + x.sum()", "return v0"), ["conv_transpose"], {"the output": OUTPUT}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("export", [False, True])
def test_growing(model: Chain, regions: list[str], reasons: dict[str, str], export: bool) -> None:
    if export:  # nodes have other names there
        report = agree(Chain(**{**vars(model), "export": True}).make()[0])
        assert chains_of(report) == regions
        return
    report = agree(model.make()[0])
    assert chains_of(report) == regions
    assert ended(report) == reasons


def test_a_pool_that_lays_out_its_own_result_goes_on() -> None:
    """torch changes the strides of what it has just made; nobody has seen them before."""
    model = nn.Sequential(nn.ConvTranspose3d(2, 3, 2), nn.AdaptiveAvgPool3d(1), nn.Conv3d(3, 2, 1), nn.Sigmoid())
    x = torch.randn(2, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    fast = fxfuse.optimize(model.to(memory_format=torch.channels_last_3d), x)
    assert ended(fast.fxfuse_report) == {"the output": OUTPUT}, fast.fxfuse_report


def test_an_anchor_that_nothing_reads() -> None:
    report = fxfuse.explain(
        chain("v1 = v0.relu()", "v2 = x + 1", "return v2").make()[0], torch.ones(2, 2, 4, 5).double()
    )
    assert not report.regions
    assert [(r.node, r.reason) for r in report.rejected] == [("m0", "nothing reads what follows it")]


# --- writing in place -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "regions", "reasons"),
    [
        (chain("v1 = v0.relu_()", "return v0, v1"), ["conv_transpose > relu"], {}),
        (chain("v0.relu_()", "v0.mul_(2)", "return v0"), ["conv_transpose > relu > mul"], {}),
        (chain("v0 += 1", "v0 *= v0", "return v0"), ["conv_transpose > add > mul"], {}),
        (chain("v1 = F.relu(v0, inplace=True)", "v2 = v0 + v1", "return v2"), ["conv_transpose > relu > add"], {}),
        (chain("v1 = v0 * 2", "v0.relu_()", "return v0, v1"), ["conv_transpose > mul > relu"], {}),
        (chain("v1 = v0.clamp_(v0.mean(), None)", "return v1"), ["conv_transpose > mean > clamp"], {}),
        # an earlier reader outside: it must see the old value
        (
            chain("v1 = v0.cumsum(0)", "v0.relu_()", "return v0, v1"),
            ["conv_transpose"],
            {
                "cumsum": "Tensor.cumsum is not in the vocabulary",
                "relu_": "it also needs cumsum, which comes after the region",
            },
        ),
        # a later reader outside
        (
            chain("v0.relu_()", "v1 = v0.cumsum(0)", "return v1"),
            ["conv_transpose > relu"],
            {"cumsum": "Tensor.cumsum is not in the vocabulary"},
        ),
        # to a value from outside, read before and after
        (
            chain("s = x.atan()", "v1 = v0 + s", "s.mul_(2)", "v2 = v1 + s", "return v2", modules=(SAME,)),
            ["conv_transpose > add"],
            {"add_1": "it also needs mul_, which comes after the region"},
        ),
        (chain("s = x.atan()", "s.mul_(2)", "v1 = v0 + s", "return v1", modules=(SAME,)), ["conv_transpose > add"], {}),
        (
            chain("s = x.atan()", "s += v0", "return s", modules=(SAME,)),
            ["conv_transpose"],
            {"iadd": "it writes in place to a value from outside the region"},
        ),
        # by an operator that is not in the vocabulary
        (
            chain("v1 = v0.relu()", "v1.cumsum_(0)", "v2 = v1 * 2", "v3 = v0 * 3", "return v2, v3"),
            ["conv_transpose > relu > mul"],
            {
                "cumsum_": "Tensor.cumsum_ is not in the vocabulary",
                "mul": "it also needs cumsum_, which comes after the region",
            },
        ),
        (
            chain("v0[:, 0] = 0", "return v0 * 2"),
            ["conv_transpose"],
            {
                "setitem": "setitem is not in the vocabulary",
                "mul": "it also needs setitem, which comes after the region",
            },
        ),
        # to a view of a value that is read later, and the other way round
        (
            chain("v1 = v0.view(2, -1)", "v1.relu_()", "return v0"),
            ["conv_transpose"],
            {"view": "it shares memory that relu_ writes to and that is read later as m0"},
        ),
        (
            chain("v1 = v0.view(2, -1)", "v0.relu_()", "return v1"),
            ["conv_transpose"],
            {
                "view": "it shares memory that relu_ writes to and that is read later as view",
                "relu_": "it also needs view, which comes after the region",
            },
        ),
        (
            chain("v1 = self.m1(v0)", "v0.cumsum_(0)", "return v1", modules=(CONV, "nn.Identity()")),
            ["conv_transpose"],
            {
                "m1": "it shares memory that cumsum_ writes to and that is read later as m1",
                "cumsum_": "Tensor.cumsum_ is not in the vocabulary",
            },
        ),
        (
            chain("v1 = v0.detach()", "v1[:, 0] = 0", "return v0 * 2"),
            ["conv_transpose"],
            {
                "detach": "it shares memory that setitem writes to and that is read later as m0",
                "mul": "it also needs setitem, which comes after the region",
            },
        ),
        # to a view that alone is read later
        (chain("v1 = v0.view(2, -1)", "v1.relu_()", "return v1"), ["conv_transpose > reshape > relu"], {}),
        (
            chain("v1 = self.m2(self.m1(v0))", "return v1", modules=(CONV, "nn.Dropout(0.5)", "nn.ReLU(inplace=True)")),
            ["conv_transpose > clone > relu"],
            {},
        ),
        (
            chain("v1 = v0.view(2, -1)", "v1.cumsum_(0)", "return v1"),
            ["conv_transpose > reshape"],
            {"cumsum_": "Tensor.cumsum_ is not in the vocabulary"},
        ),
        # of the shape itself
        (
            chain("v1 = v0.relu()", "v1.transpose_(0, 1)", "v2 = v1 * 2", "return v2"),
            ["conv_transpose > relu"],
            {
                "transpose_": "it changes its operand in place in a way that is not pointwise",
                "mul": "an operand of it is not known before the call",
            },
        ),
        (
            chain(
                *("s = x.detach() - 1", "v1 = v0 + s", "s.transpose_(0, 1)", "v2 = v1 + s", "return v2"),
                modules=(SAME,),
            ),
            ["conv_transpose > add"],
            {"add_1": "an operand of it is not known before the call"},
        ),
        (
            chain("v1 = v0 + 1", "v2 = v0.cumsum(0)", "v2.transpose_(2, 3)", "v3 = v2 * 2", "return v1, v3"),
            ["conv_transpose > add"],
            {"cumsum": "Tensor.cumsum is not in the vocabulary"},
        ),
        # of another dtype
        (
            chain("v1 = v0 > 0", "v1.logical_and_(v0)", "return v1"),
            ["conv_transpose > gt > logical_and"],
            {},
        ),
        (
            chain("v0.lt_(1)", "return v0"),
            ["conv_transpose"],
            {"lt_": "its meaning could not be built"},
        ),
    ],
)  # fmt: skip
def test_in_place(model: Chain, regions: list[str], reasons: dict[str, str]) -> None:
    report = agree(model.make()[0])
    assert chains_of(report) == regions
    found = {node: reason for node, reason in ended(report).items() if node != "the output"}
    assert found.keys() == reasons.keys()
    for node, reason in reasons.items():
        assert found[node].startswith(reason)


# --- running statistics ---------------------------------------------------------------------------
def norm(arguments: str = "3", **more: Any) -> Chain:
    lines = more.pop("lines", ("v1 = self.m1(v0)", "return v1"))
    return chain(*lines, modules=(CONV, f"nn.BatchNorm2d({arguments})"), **more)


@pytest.mark.parametrize("export", [False, True])
@pytest.mark.parametrize(
    ("arguments", "op"),
    [
        ("3", "batch_norm_train"),
        ("3, momentum=None", "batch_norm_train"),
        ("3, momentum=0.0", "batch_norm_train"),
        ("3, affine=False", "batch_norm_train"),
        ("3, track_running_stats=False", "batch_norm_batch"),
    ],
)
def test_training_mode_updates_the_statistics(arguments: str, op: str, export: bool) -> None:
    if export and "momentum=None" in arguments:
        pytest.skip("an export takes the count for a constant, and the capture is refused")
    report = agree(norm(arguments, train=True, export=export).make()[0])
    (region,) = report.regions
    assert [i.op for i in region.region.original.body] == ["conv_transpose", op]
    assert region.region.statistics == ((1, 2) if op == "batch_norm_train" else ())


@pytest.mark.parametrize("momentum", ["0.1", "None"])
@pytest.mark.parametrize("pool", [False, True])
def test_an_empty_value_is_left_to_torch(pool: bool, momentum: str) -> None:
    """It has rules of its own: BatchNorm counts an empty batch, and leaves the statistics."""
    lines = ("v1 = self.m1(F.adaptive_avg_pool2d(v0, 0))" if pool else "v1 = self.m1(v0)", "return v1")
    report = agree(norm(f"3, momentum={momentum}", train=True, lines=lines).make()[0], (2 * pool, 2, 4, 5), fused=pool)
    assert chains_of(report) == ["conv_transpose"] * pool
    (told,) = ended(report).values() if pool else (r.reason for r in report.rejected)
    assert told == "its value is empty: there is nothing to compute"


def test_statistics_of_a_norm_whose_result_nobody_reads() -> None:
    report = agree(norm(lines=("v1 = self.m1(v0)", "return v0"), train=True).make()[0])
    assert chains_of(report) == ["conv_transpose > batch_norm_train"]
    assert report.regions[0].region.statistics == (1, 2)


def test_a_norm_without_a_count_and_without_momentum() -> None:
    model = norm("3, momentum=None", train=True).make()[0]
    model.m1.num_batches_tracked = None
    report = agree(model)
    assert chains_of(report) == ["conv_transpose > batch_norm_train"]


def test_a_norm_that_is_called_twice() -> None:
    """The second call must see what the first one left; both stay in order."""
    lines = ("v1 = self.m1(v0)", "v2 = self.m1(v1 * 2)", "return v2")
    report = agree(norm(lines=lines, train=True).make()[0])
    assert chains_of(report) == ["conv_transpose"]
    assert ended(report)["m1"] == "its running statistics are also used by m1"
    report = agree(norm(lines=lines).make()[0])
    assert chains_of(report) == ["conv_transpose > batch_norm > mul > batch_norm"]


@pytest.mark.parametrize(
    "lines",
    [
        ("v1 = self.m1(v0)", "v2 = v1 * self.m1.running_var.sum()", "return v2"),
        ("s = self.m1.running_mean.sum()", "v1 = self.m1(v0) + s", "return v1"),
        ("v1 = self.m1(v0)", "self.m1.running_mean.zero_()", "return v1"),
        ("v1 = self.m1(v0)", "v2 = v1 + self.m1.num_batches_tracked", "return v2"),
    ],
)
def test_statistics_that_others_read(lines: Lines) -> None:
    report = agree(norm(lines=lines, train=True).make()[0])
    assert chains_of(report)[0] == "conv_transpose"
    assert ended(report)["m1"].startswith("its running statistics are also used by ")


class _Stateful(nn.InstanceNorm2d):
    """A leaf module outside the vocabulary, which changes its buffers."""

    __module__ = "torch.nn.modules"


class _Scribble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 1)
        self.norm = _Stateful(3, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        before = y * self.norm.running_var.sum()
        z = self.norm(y)
        return before + y * self.norm.running_var.sum() + z.mean()


def test_buffers_of_other_modules_stay_in_order() -> None:
    report = agree(_Scribble().double().train())
    assert chains_of(report) == ["conv_transpose > mul"]
    assert ended(report)["mul_1"] == "it also needs sum_2, which comes after the region"


def test_a_hooked_norm_stays_outside() -> None:
    model = norm(lines=("v1 = self.m1(v0).relu()", "return v1"), train=True).make()[0]
    model.m1.register_forward_hook(lambda m, i, o: o * 2)
    report = agree(model)
    assert chains_of(report) == ["conv_transpose"]
    assert ended(report) == {"m1": "the module has hooks, which must see its input and output"}


# --- what cannot be known before the call ---------------------------------------------------------
def _picky(x: Tensor) -> Tensor:
    """Writes to its argument, and cannot be run on fake tensors."""
    return x.add_(1) if float(x.detach().sum()) > -1e9 else x


def _alias(x: Tensor) -> Tensor:
    return x[:] if float(x.detach().sum()) > -1e9 else x


fx.wrap("_picky")
fx.wrap("_alias")


class _Unknown(nn.Module):
    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.ConvTranspose2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = x.atan()
        y = self.up(x)
        if self.kind == 0:  # the region's own value is written to
            a = y * 2
            z = _picky(y)
            return a + y * 3 + z
        if self.kind == 1:  # a side input is written to, between two readers
            a = y + s
            _picky(s)
            return a + s
        if self.kind == 2:  # through an alias that nobody knows of
            z = _alias(y)
            z.add_(1)
            return y * 2
        z = _alias(s)
        a = y + s
        z.mul_(3)
        return a + s


@pytest.mark.parametrize("kind", range(4))
def test_nodes_of_unknown_effect(kind: int) -> None:
    report = agree(_Unknown(kind).double())
    expected = ["conv_transpose > mul", "conv_transpose > add", "conv_transpose", "conv_transpose > add"][kind]
    assert chains_of(report) == [expected]
    assert any("comes after the region" in reason for reason in ended(report).values())


def test_random_operators_keep_their_order() -> None:
    model = chain(
        *("a = self.m1(v0)", "b = torch.rand_like(x)", "v1 = v0.relu()", "c = self.m1(v1)", "r = a + c + b.mean()"),
        "return r",
        modules=(CONV, "nn.Dropout(0.4)"),
        train=True,
    )
    report = agree(model.make()[0])  # compares the generator, too
    assert chains_of(report) == ["conv_transpose > relu"]
    assert ended(report)["m1"] == "dropout is random in training mode"


# --- autocast -------------------------------------------------------------------------------------
_OTHERS = (
    *("F.max_pool2d({v}, 2)", "F.avg_pool2d({v}, 2)", "F.adaptive_avg_pool2d({v}, 2)", "F.adaptive_max_pool2d({v}, 2)"),
    *("{v}.mean((2, 3))", "{v}.sum(1)", "{v}.amax(1)", "{v}.amin(1)", "{v}.prod(1)", "{v}.logsumexp(1)", "{v}.var(1)"),
    *("{v}.std(1)", "{v}.norm(2, 1)", "{v}.softmax(1)", "{v}.log_softmax(1)", "{v}.max(1).values", "{v}.min(1)[0]"),
    *("{v}.flatten(1)", "{v}.permute(0, 2, 3, 1)", "F.layer_norm({v}, ({v}.shape[-1],))", "F.group_norm({v}, 1)"),
    *("F.rms_norm({v}, ({v}.shape[-1],))", "F.instance_norm({v})", "nn.BatchNorm2d(3)", "nn.PReLU()"),
    *("nn.GroupNorm(3, 3)", "nn.InstanceNorm2d(3, affine=True)", "F.batch_norm({v}, None, None, training=True)"),
    *("{v} * self.scale", "torch.where({v} > 0, {v}, self.scale)", "torch.lerp({v}.float(), self.scale, 0.5)"),
)


def _chunks(size: int) -> list[tuple[str, ...]]:
    avoided = ("_(", "nplace", ", True", "double", "float64", "{a}")
    pointwise = [t for templates in POINTWISE.values() for t in templates if not any(a in t for a in avoided)]
    chosen = (*pointwise, *_OTHERS)
    return [tuple(chosen[i : i + size]) for i in range(0, len(chosen), size)]


def _autocast_model(templates: tuple[str, ...]) -> nn.Module:
    """All templates on the result of one convolution, and on that of a softmax, which autocast leaves in float32."""
    modules, lines, outputs = [CONV], ["f = torch.softmax(v0.float(), 1)"], []
    for number, template in enumerate(t for each in templates for t in (each, each)):
        filled = template.replace("{lo}", "-0.5").replace("{hi}", "0.75").replace("{s}", "0.5").replace("{p}", "1.5")
        v = "f" if number % 2 else "v0"
        if filled.startswith("nn."):
            modules.append(filled)
            filled = f"self.m{len(modules) - 1}({v})"
        w = v if "erp" in filled else "v0" if number % 4 else "f"  # which takes no mixed dtypes
        lines.append(f"r{number} = {filled.replace('{v}', v).replace('{w}', w)}")
        outputs.append(f"r{number}")
    named = tuple((f"m{i}", text) for i, text in enumerate(modules))
    made = Chain((2, 2, 4, 5), named, (("scale", (3, 1, 1)),), ("v0 = self.m0(x)", *lines), tuple(outputs))
    return made.make(torch.float32)[0]


@pytest.mark.parametrize("templates", _chunks(8), ids=lambda t: t[0])
def test_dtypes_under_autocast(templates: Lines) -> None:
    """Every operator of the vocabulary in bfloat16 and float32, as the policy of autocast has it."""
    torch.manual_seed(0)
    model, x = _autocast_model(templates), torch.randn(2, 2, 4, 5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(x)
        optimized = fxfuse.optimize(model, (x,))
        with ops.watch() as runs:
            got = optimized(x)
    assert runs, optimized.fxfuse_report
    members = optimized.fxfuse_report.regions[0].operators
    assert len(members) >= 2 * len(templates)
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype is b.dtype, templates[number // 2]
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2, equal_nan=True)


# --- inputs that share memory ---------------------------------------------------------------------
class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 2, 1)

    def forward(self, x: Tensor, part: Tensor) -> Tensor:
        y = self.up(x)
        a = y + part
        x.mul_(2)
        return a + part


def test_an_input_that_is_a_view_of_another() -> None:
    model = _Shared().double()
    base = torch.randn(2, 2, 4, 5, dtype=torch.float64)

    def make() -> tuple[Tensor, Tensor]:
        x = base.clone()
        return x, x[:, :1]

    with torch.no_grad():
        assert_agree(model, make, fused=False)  # runs as it is: which values a write reaches depends on the call
        assert_agree(model, lambda: (base.clone(), base[:, :1].clone()))


def test_a_view_made_in_the_model() -> None:
    model = chain("s = x[:, :1]", "v1 = v0 + s", "x.mul_(2)", "v2 = v1 + s", "return v2, s", modules=(SAME,)).make()[0]
    with torch.no_grad():
        optimized, _ = assert_agree(model, lambda: (torch.randn(2, 2, 4, 5, dtype=torch.float64),))
    assert chains_of(optimized.fxfuse_report) == ["conv_transpose > add"]
    reasons = {node: reason for node, reason in ended(optimized.fxfuse_report).items() if node != "the output"}
    assert reasons == {"add_1": "it also needs mul_, which comes after the region"}


# --- gradients that stop --------------------------------------------------------------------------
@pytest.mark.parametrize("path", [Path.ORIGINAL, Path.RECOMPUTE])
def test_what_needs_gradients_and_what_does_not(path: Path) -> None:
    """requires_grad of every output, and None for what a gradient does not reach."""
    lines = ("v0 = self.m0(x)", "a = v0.detach() * self.p0", "b = v0 > self.p1", "c = v0.detach()", "d = v0.relu()")
    parameters = (("p0", (3, 1, 1)), ("p1", (3, 1, 1)))
    model, x = Chain((2, 2, 4, 5), (("m0", CONV),), parameters, lines, ("a", "b", "c", "d")).make()
    optimized = fxfuse.optimize(model, (x,))
    for frozen in ((), ("m0.weight", "m0.bias"), ("p0",)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for used in range(4):
            results = []
            for run in (model, optimized):
                model.zero_grad()
                with mock.patch("fxfuse.ops.choose", return_value=path):
                    outputs = run(x)
                if outputs[used].requires_grad:
                    outputs[used].sum().backward()
                results.append(([o.requires_grad for o in outputs], [p.grad for p in model.parameters()]))
            (flags, gradients), (own_flags, own_gradients) = results
            assert own_flags == flags
            assert_same(own_gradients, gradients)


def test_an_input_that_is_written_to_later_is_kept_for_the_backward() -> None:
    report = agree(chain("s = x.atan()", "v1 = v0 + s", "s.mul_(2)", "return v1, s", modules=(SAME,)).make()[0])
    assert report.graph_after is not None
    assert [n.target for n in report.graph_after.nodes].count(torch.clone) == 1


def test_many_regions_come_out_sorted() -> None:
    lines = [f"v{i + 1} = self.m{i + 1}(v{i}).relu() + v{i}" for i in range(12)]
    report = agree(chain(*lines, "return v12, v5", modules=(SAME,) * 13).make()[0])
    assert len(chains_of(report)) == 13
    assert chains_of(report)[-1] == "conv_transpose > relu > add"


def test_a_dtype_that_no_program_holds() -> None:
    model = chain("v1 = v0.to(torch.float8_e4m3fn).to(torch.float64)", "v2 = v0 + v1", "return v2").make()[0]
    report = agree(model)
    assert chains_of(report) == ["conv_transpose"]
    assert ended(report)["to"] == "its argument dtype is torch.float8_e4m3fn"
