"""Optimised models under torch.export: one operator per region, or the original operators; never something else."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse

X = (2, 3, 5, 5, 5)


@pytest.fixture
def model() -> nn.Module:
    up = nn.ConvTranspose3d(3, 4, 4, stride=2, padding=1)
    return nn.Sequential(up, nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2)).eval()


def targets(program: Any) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)]


def saved(program: Any) -> Any:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_region_is_one_operator(model: nn.Module, gradients: bool) -> None:
    x = torch.randn(X)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(fxfuse.optimize(model, x), (x,))
        again = saved(program)
        assert targets(again) == ["fxfuse.region.default"]
        assert list(again.state_dict) == list(model.state_dict())
        other = torch.randn(X)
        torch.testing.assert_close(again.module()(other), model(other))


def test_weights_of_the_exported_program_are_read_on_every_call(model: nn.Module) -> None:
    x = torch.randn(X)
    with torch.no_grad():
        module = saved(torch.export.export(fxfuse.optimize(model, x), (x,))).module()
        for tensor in (*module.state_dict().values(), *model.state_dict().values()):
            if tensor.is_floating_point():
                tensor.add_(0.5)
        torch.testing.assert_close(module(x), model(x))


def test_training_mode_updates_running_statistics(model: nn.Module) -> None:
    model.train()
    x = torch.randn(X)
    module = saved(torch.export.export(fxfuse.optimize(model, x), (x,))).module()
    torch.testing.assert_close(module(x), model(x))
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        torch.testing.assert_close(module.state_dict()[name], model.state_dict()[name])


def test_sizes_that_vary_export_the_original_operators(model: nn.Module) -> None:
    x = torch.randn(X)
    sizes = {"args": ({0: torch.export.Dim("batch", max=64)},)}
    fast = fxfuse.optimize(model, x)
    program = torch.export.export(fast, (x,), dynamic_shapes=sizes)
    assert not any("fxfuse" in target for target in targets(program))
    assert "with symbolic shapes the original operators are traced" in fast.fxfuse_report.notes
    other = torch.randn(5, *X[1:])
    torch.testing.assert_close(program.module()(other), model(other))


def test_a_model_that_was_never_run_exports_the_original_operators(model: nn.Module) -> None:
    program = torch.export.export(fxfuse.optimize(model), (torch.randn(X),))
    assert not any("fxfuse" in target for target in targets(program))


def test_strict_mode_names_the_remedy(model: nn.Module) -> None:
    x: Tensor = torch.randn(X)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.export\.export\(\.\.\., strict=False\)"):
        torch.export.export(fxfuse.optimize(model, x), (x,), strict=True)
