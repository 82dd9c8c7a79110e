"""Products of float32's own accuracy: windows of every kind give float64's values, and each part of them is needed."""

from __future__ import annotations

import pytest
import torch
from emulator import device
from emulator.device import EmulationError, needs_compiler
from orientation import by_channel_always, by_channel_never, sets_always
from test_emulated_folds import run_prepared
from torch import Tensor, nn

from fxfuse.kernels.convolution.specialisation import Specialisation

pytestmark = needs_compiler

Up = nn.ConvTranspose3d
#: of the norm, in results
LIMIT = 2e-7
#: modules, sizes of x; whether rows are channels; steps whose products are made together, and windows
CASES: dict[str, tuple[list[nn.Module], tuple[int, ...], bool, int, int]] = {
    "four steps, and others": ([Up(16, 24, 3, bias=False)], (2, 16, 5, 6, 11), False, 4, 2),
    "a window for each tile of rows": ([Up(48, 40, 3, 1, 1)], (2, 48, 9, 12, 22), False, 4, 2),
    "two steps of more channels": ([Up(32, 64, (2, 3, 3), 1, 1)], (2, 32, 5, 6, 11), False, 4, 2),
    "two windows of a tile": ([Up(16, 92, 3, bias=False), nn.LogSoftmax(1)], (2, 16, 4, 5, 9), False, 2, 2),
    "runs of classes": ([Up(32, 32, 3, 2, 1), nn.ReLU()], (2, 32, 4, 7, 20), False, 1, 1),
    "every class by itself": ([Up(16, 32, (5, 3, 2), 2, 1)], (2, 16, 4, 5, 20), False, 1, 1),
    "a tile's only window": ([Up(16, 8, 3, 2, 1), nn.ReLU()], (2, 16, 4, 5, 7), False, 1, 2),
    "sums as many as there may be": ([Up(24, 240, 2), nn.Softmax(1)], (2, 24, 4, 5, 9), False, 1, 1),
    "a pool of classes": ([Up(16, 64, 3, 2, 1, 1), nn.SiLU(), nn.MaxPool3d(2)], (2, 16, 4, 8, 9), False, 4, 2),
    "channels as rows": ([Up(40, 64, 3)], (2, 40, 4, 5, 9), True, 4, 2),
    "channels as rows, tiles of channels": ([Up(32, 128, (3, 3, 2), padding=1)], (2, 32, 3, 4, 9), True, 4, 2),
    "channels as rows, of two classes": ([Up(16, 64, 4, (1, 1, 2))], (2, 16, 3, 4, 9), True, 2, 2),
    "groups": ([Up(96, 96, 3, groups=3)], (2, 96, 3, 4, 9), False, 4, 2),
    "few channels": ([Up(3, 40, 3, 2, 1)], (2, 3, 5, 6, 11), False, 2, 2),
}


def check(name: str) -> Specialisation:
    """Compare with float64, and say which kernel ran."""
    modules, sizes, channels, _, _ = CASES[name]
    torch.manual_seed(0)
    with by_channel_always() if channels else by_channel_never():
        return near(nn.Sequential(*modules).float(), torch.randn(*sizes) + 0.3)


def near(model: nn.Module, x: Tensor) -> Specialisation:
    got, expected, made = run_prepared(model.eval(), x, exact=True)
    assert made.convolution is not None and made.convolution.made.exact
    assert (got - expected).norm() <= LIMIT * expected.norm()
    return made.convolution.made


@pytest.mark.parametrize("name", CASES)
def test_windows_are_added_to_sums(name: str) -> None:
    made = check(name)
    assert (made.by_channel, made.together, made.windows) == CASES[name][2:]


@pytest.mark.parametrize("columns", [24, 160])
def test_windows_of_samples_side_by_side(columns: int) -> None:
    torch.manual_seed(0)
    with sets_always():
        assert near(nn.Sequential(Up(32, columns, 4, 2, 1)), torch.randn(9, 32, 2, 3, 3)).samples > 1


WINDOWS, WGMMA, PREPARE, PACK = "conv_windows.cuh", "conv_wgmma.cuh", "prepare.cuh", "pack_weights.cuh"
#: the case that should see it, header, text, what stands there instead
BROKEN: dict[str, tuple[str, str, str, str]] = {
    "no second part of x": ("groups", WINDOWS, "(which == 0 ? slices : 0)", "0"),
    "no second part of weights": ("groups", WINDOWS, "(which == 1 ? slices : 0)", "0"),
    "x of no second part": ("groups", PREPARE, "values[k] - to_float(v[k])", "0.f * values[k]"),
    "weights of no second part": ("groups", PACK, "v - to_float(values[i])", "0.f * v"),
    "second parts elsewhere": ("groups", PREPARE, "channel & -Problem::chunk_channels", "channel"),
    "added too early": ("groups", WINDOWS, "if (buffers > 1 && j <= all)", "if (buffers > 1)"),
    "added elsewhere": ("runs of classes", WINDOWS, "(j - buffers) % count", "j % count"),
    "added to another class": ("every class by itself", WINDOWS, "(by_channel ? 0 : first / 2)", "0"),
    "the first steps twice": ("groups", WINDOWS, "steps[j / count * count_steps + k]", "steps[k]"),
    "on top of the window before": ("groups", WINDOWS, "        if (k == 0)", "        if (false)"),
    "another tile's rows": ("a window for each tile of rows", WINDOWS, ": i / parts] + step.x", ": 0] + step.x"),
    "another tile's channels": ("channels as rows, of two classes", WINDOWS, "i / parts * 64 :", "0 :"),
}


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_broken_shows(why: str) -> None:
    name, *how = BROKEN[why]
    with device.broken(*how), pytest.raises((AssertionError, EmulationError)):
        check(name)


def test_steps_of_the_next_stage_are_not_taken() -> None:
    wrong = device.broken(WGMMA, "taken.weights & kFour", "true")
    with wrong, pytest.raises(EmulationError, match="nothing goes on"):
        check("groups")
