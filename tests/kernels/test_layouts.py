"""Memory formats: strides as torch has them, and tensors that have both or none."""

from __future__ import annotations

import pytest
import torch

from fxfuse.forms import Form
from fxfuse.kernels.codegen.chains import dense, layout_of, layouts_of

LAST = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize(
    "shape", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6), (2, 0, 4, 5, 6), (0, 3, 4, 0), (1, 1, 1, 1)]
)
def test_strides_are_torchs(shape: tuple[int, ...]) -> None:
    assert dense(shape, "contiguous") == torch.empty(shape).stride()
    if len(shape) > 3 and all(shape):
        assert dense(shape, "channels_last") == torch.empty(shape, memory_format=LAST[len(shape)]).stride()
    elif len(shape) == 3:
        assert dense(shape, "channels_last") == torch.empty(2, 4, 3).transpose(1, 2).stride()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (2, 3, 4, 5), (3, 2, 1, 1, 7)])
def test_one_format(shape: tuple[int, ...]) -> None:
    assert layouts_of(shape, torch.empty(shape).stride()) == ["contiguous"]
    assert layouts_of(shape, torch.empty(shape, memory_format=LAST[len(shape)]).stride()) == ["channels_last"]


@pytest.mark.parametrize("shape", [(2, 1, 4, 5, 6), (2, 3, 1, 1, 1), (1, 1, 1, 1)])
def test_both_where_dims_of_size_one_may_have_any_stride(shape: tuple[int, ...]) -> None:
    both = ["contiguous", "channels_last"]
    for memory_format in (torch.contiguous_format, LAST[len(shape)]):
        strides = torch.empty(shape, memory_format=memory_format).stride()
        assert layouts_of(shape, strides) == both
        odd = [7 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
        assert layouts_of(shape, odd) == both and layout_of(shape, odd) == "contiguous"


def test_none() -> None:
    x = torch.empty(2, 3, 4, 5, 6)
    for view in (x.transpose(2, 4), x[..., 1:], x[:, :2], x[:, :, :1].expand(-1, -1, 4, -1, -1), x[::2, :, 1:]):
        assert layouts_of(view.shape, view.stride()) == [] and layout_of(view.shape, view.stride()) is None
    assert layouts_of(x.shape, x[1:].stride()) == ["contiguous"]


def test_strides_of_one_element_say_nothing() -> None:
    x, last = torch.empty(1, 3, 4, 5), torch.empty(1, 3, 4, 5, memory_format=torch.channels_last)
    form = Form.of(last)
    assert form.lies_as(Form.of(last.as_strided((1, 3, 4, 5), (3, *last.stride()[1:]))))
    for other in (x, last.half(), last[:, :2], last[0], last.to("meta"), torch.empty(1, 3, 4, 5, 1)):
        assert not form.lies_as(Form.of(other))
