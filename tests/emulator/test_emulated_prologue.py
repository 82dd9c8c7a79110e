"""Pointwise chains in front of a convolution, in the kernels that read x: guesses, and mistakes that must show.

What they compute is in tests/gpu/test_in_front.py.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from emulator import device
from emulator.device import EmulationError, needs_compiler
from fronts import F32, FEW, FORMS, TWO, Behind, behind, of_places
from test_emulated_folds import LIMIT, assert_near, layer, run_prepared, samples
from torch import Tensor, nn

from fxfuse.kernels.convolution import kernels as convolution_kernels
from fxfuse.kernels.runtime.prepared import Prepared
from fxfuse.kernels.stages.steps import Map

pytestmark = needs_compiler


def absorbed(model: nn.Module, x: Tensor, **how: bool) -> tuple[Tensor, Tensor, Prepared]:
    """As of `run_prepared`; no kernel on x ran in front of the convolution's."""
    got, expected, made = run_prepared(model.eval(), x, **how)
    kernel = made.schedule.kernel
    assert kernel is not None and kernel.front is not None
    assert not any(isinstance(s, Map) for s in made.schedule.ahead)
    assert made.convolution is not None and not made.convolution.made.planar
    return got, expected, made


def check(name: str, front: Callable[..., Tensor]) -> None:
    torch.manual_seed(3)
    _, sizes, dtype, last, exact = FORMS[name]
    with mock.patch.object(convolution_kernels.planar, "as_planes", side_effect=convolution_kernels.Unsupported):
        got, expected, _ = absorbed(behind(name, front), samples(*sizes, dtype=dtype), last=last, exact=exact)
    assert_near(got, expected, 1e-6 if exact else LIMIT[dtype])


def test_samples_whose_scale_was_guessed_too_low() -> None:
    """The chain makes the largest value of one that few look at."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 4, 8, 8)
    x[1, 7, 2, 3, 3] = -30.0
    with mock.patch.multiple(convolution_kernels, SAMPLED_EACH=64, SAMPLED=64):
        got, expected, _ = absorbed(Behind(lambda x: x * x * x, layer(16, 16, 3, **TWO)), x)
    assert_near(got, expected, LIMIT[F32])


def scaled_by_channel(last: bool) -> None:
    """x itself is far from half's range, and so are most channels of what the chain makes."""
    torch.manual_seed(0)
    scales = 10.0 ** -torch.linspace(12, 0, 16).view(1, 16, 1, 1, 1)
    model = Behind(lambda x, g: x * g, layer(16, 16, 3, **TWO), scales)
    got, expected, _ = absorbed(model, torch.randn(2, 16, 4, 5, 8) * 1e7, last=last)
    assert_near(got, expected, LIMIT[F32])


@pytest.mark.parametrize("last", [False, True])
def test_the_scale_is_that_of_what_the_chain_makes(last: bool) -> None:
    scaled_by_channel(last)
    with (
        device.broken("measure.cuh", "along(g.stride_c, g.channels * g.groups)", "0"),
        pytest.raises((AssertionError, EmulationError)),
    ):
        scaled_by_channel(last)


#: header, text and what is there instead, form
BROKEN = {
    "another channel": (
        "prepare.cuh", "channel = group * channels + c + k, at", "channel = c, at", "four at once",
    ),
    "another position": (
        "prepare.cuh", "read[k].w, channel, at + 3)", "read[k].w, channel, at)", "four at once",
    ),
    "one by one": ("prepare.cuh", "to_float(source(channel)[at]), channel, at)", "0.f, channel, at)", "one by one"),
    "neighbours": (
        "prepare.cuh", "given(known[k], value, channel + k,", "given(known[k], value, channel,", "channels last",
    ),
    "a line": ("rows_beside.cuh", "before + channel, z, y, at);", "before + channel, d, h, w);", FEW),
    "octs": ("prepare.cuh", "const int position = at + i,", "const int position = at,", "eight at once"),
    "samples apart": ("conv_direct.cuh", "first + c, at_d, at_h, at_w);", "c, at_h, at_d, at_w);", "four at once"),
}  # fmt: skip


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_broken_shows(why: str) -> None:
    header, text, instead, form = BROKEN[why]
    with device.broken(header, text, instead), pytest.raises((AssertionError, EmulationError)):
        check(form, of_places)
