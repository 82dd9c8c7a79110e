"""Real networks pass through unharmed: MONAI's, and nnU-Net's plain U-Net (extra ``networks``)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxfuse
from fxfuse import ops
from fxfuse.compare import relative_error

nets = pytest.importorskip("monai.networks.nets", reason="needs the extra `networks`")
pytestmark = pytest.mark.filterwarnings("ignore")


def _plain_conv_unet() -> nn.Module:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    network: nn.Module = unet.PlainConvUNet(
        1, 3, (4, 8, 16), nn.Conv3d, 3, (1, 2, 2), 2, 2, 2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )  # fmt: skip
    return network


def _unet(**more: object) -> nn.Module:
    return nets.UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), **more)


def _dynunet(**more: object) -> nn.Module:
    return nets.DynUNet(3, 1, 2, [3, 3, 3, 3], [1, 2, 2, 2], [2, 2, 2], filters=(4, 8, 16, 16), **more)


#: name -> (how to make it, how it is captured, how many regions it has)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "UNet": (lambda: _unet(num_res_units=1), "torch.fx.symbolic_trace", 2),
    "UNet, BatchNorm": (lambda: _unet(norm="BATCH", dropout=0.1), "torch.fx.symbolic_trace", 2),
    "BasicUNet": (lambda: nets.BasicUNet(3, 1, 2, features=(4, 4, 8, 8, 8, 4)), "torch.export", 4),
    "BasicUNetPlusPlus": (lambda: nets.BasicUNetPlusPlus(3, 1, 2, features=(4, 4, 8, 8, 8, 4)), "torch.export", 10),
    "DynUNet": (_dynunet, "torch.fx.symbolic_trace", 3),
    "PlainConvUNet": (_plain_conv_unet, "torch.fx.symbolic_trace", 2),
    "SegResNet, deconv": (
        lambda: nets.SegResNet(3, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1), upsample_mode="deconv"),
        "torch.fx.symbolic_trace",
        2,
    ),
    "AttentionUnet": (lambda: nets.AttentionUnet(3, 1, 2, (4, 8, 16), (2, 2)), "torch.fx.symbolic_trace", 2),
    "AutoEncoder": (lambda: nets.AutoEncoder(3, 1, 1, (4, 8), (2, 2)), "torch.fx.symbolic_trace", 2),
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_unharmed(name: str, train: bool) -> None:
    make, how, regions = NETWORKS[name]
    torch.manual_seed(0)
    eager = make().train(train)
    model = copy.deepcopy(eager)
    x = torch.randn(2 if train else 1, 1, 32, 32, 32)
    fast = fxfuse.optimize(model, (x,))
    report = fast.fxfuse_report
    assert any(f"captured with {how}" in note for note in report.notes), report.notes
    assert len(report.regions) == regions
    assert list(fast.state_dict()) == list(eager.state_dict())

    with ops.watch() as runs, torch.no_grad():
        torch.manual_seed(1)  # dropout draws the same numbers
        got = fast(x)
    assert len(runs) == regions
    with torch.no_grad():
        torch.manual_seed(1)
        _same(got, eager(x))
    for (path, a), (_, b) in zip(model.named_buffers(), eager.named_buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), path


def test_network_that_keeps_activations_is_left_alone() -> None:
    """DynUNet with deep supervision assigns its heads to an attribute on every call, as a graph would not."""
    torch.manual_seed(0)
    model = _dynunet(deep_supervision=True, deep_supr_num=1).eval()
    x = torch.randn(1, 1, 32, 32, 32)
    fast = fxfuse.optimize(model, (x,))
    assert fast.fxfuse_report.regions == []
    assert any("left alone" in note and "heads" in note for note in fast.fxfuse_report.notes)
    with torch.no_grad():
        _same(fast(x), model(x))


@pytest.mark.parametrize("name", ["UNet", "BasicUNet", "DynUNet", "PlainConvUNet"])
def test_gradients_of_a_network(name: str) -> None:
    torch.manual_seed(0)
    eager = NETWORKS[name][0]()
    model = copy.deepcopy(eager)
    x = torch.randn(2, 1, 32, 32, 32)
    fast = fxfuse.optimize(model, (x,))
    for network in (eager, fast):
        _loss(network(x)).backward()
    for (path, a), (_, b) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), path
        if a.grad is not None and b.grad is not None:
            assert relative_error(a.grad, b.grad) < 1e-4 or float((a.grad - b.grad).abs().max()) < 1e-6, path


@pytest.mark.parametrize("name", ["UNet", "BasicUNet", "DynUNet", "PlainConvUNet"])
def test_network_as_a_backend(name: str) -> None:
    torch.manual_seed(0)
    eager = NETWORKS[name][0]().eval()
    x = torch.randn(1, 1, 32, 32, 32)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(eager), backend="fxfuse", options={"remainder": "eager"})
    with ops.watch() as runs, torch.no_grad():
        _same(compiled(x), eager(x))
    assert runs


def test_explain_is_quick() -> None:
    network, x = _unet(num_res_units=2).eval(), torch.randn(1, 1, 16, 16, 16)
    fxfuse.explain(network, x)  # imports
    started = time.perf_counter()
    report = fxfuse.explain(network, x)
    seconds = time.perf_counter() - started
    assert report.graph_before is not None and len(report.graph_before.nodes) > 60
    assert seconds < 2.0


def _loss(result: object) -> Tensor:
    return torch.stack([leaf.square().mean() for leaf in pytree.tree_leaves(result)]).sum()


def _same(got: object, expected: object) -> None:
    leaves, wanted = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(leaves) == len(wanted) > 0
    for a, b in zip(leaves, wanted, strict=True):
        assert relative_error(a, b) < 1e-5
