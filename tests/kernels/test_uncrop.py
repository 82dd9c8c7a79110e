"""Cropped convolutions made whole again: the same values, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from harness import avg_pool, conv, max_pool, program

from fxfuse.kernels.planning.observe import examples, observe
from fxfuse.kernels.planning.uncrop import uncropped
from fxfuse.program import Program

#: the convolution has 9 and 11 outputs
INPUTS = "x: f64[2, 4, 4, 5], w: f64[4, 6, 3, 3], b: f64[6], s: f64[6, 1, 1], p: f64[6]"
CROPPED = f"y = {conv(stride=2, dims=2, extent=(8, 9))}"
WHOLE = {
    "a_pool": f"m = {avg_pool('y', (4, 3), (4, 3), dims=2)}\nm",
    "maps_before_it": f"u = relu(y)\nv = mul(u, s)\nt = prelu(v, p)\nm = {max_pool('t', (2, 3), (2, 3), dims=2)}\nm",
    "two_pools": (
        f"m = {avg_pool('y', (4, 3), (4, 3), dims=2)}\nn = {max_pool('y', 2, (2, 5), dilation=(1, 3), dims=2)}\nm, n"
    ),
    "padding_in_front": f"m = {max_pool('y', (3, 5), (3, 5), (1, 1), dims=2)}\nm",
    "a_mean_behind": f"m = {avg_pool('y', (4, 3), (4, 3), dims=2)}\nr = mean(m, dims=(2, 3), keepdim=False)\nr",
}
LEFT = {
    "a_whole_one": f"y = {conv(stride=2, dims=2)}\nm = {avg_pool('y', 3, 3, dims=2)}\nm",
    "one_that_torch_has_cropped_before": (
        f"y = {conv(stride=3, dims=2, extent=(12, 12))}\nm = {avg_pool('y', (3, 12), (3, 12), dims=2)}\nm"
    ),
    "much_more": f"{CROPPED.replace('(8, 9)', '(8, 6)')}\nm = {max_pool('y', (2, 6), (2, 6), dims=2)}\nm",
    "an_output": f"{CROPPED}\nm = {avg_pool('y', (4, 3), (4, 3), dims=2)}\nm, y",
    "a_mean": f"{CROPPED}\nr = mean(y, dims=(2, 3), keepdim=True)\nr",
    "a_pool_and_a_mean": f"{CROPPED}\nm = {max_pool('y', 2, 2, dims=2)}\nr = mean(y, dims=(2, 3), keepdim=True)\nm, r",
    "what_varies_over_space": f"{CROPPED}\nv = add(y, z)\nm = {max_pool('v', (2, 3), (2, 3), dims=2)}\nm",
    "an_adaptive_pool": f"{CROPPED}\nm = adaptive_avg_pool(y, size=(2, 3))\nm",
    "padding_behind": f"{CROPPED}\nm = {max_pool('y', (2, 4), (2, 4), (0, 2), dims=2)}\nm",
    "a_window_that_begins_inside": f"{CROPPED}\nm = {max_pool('y', 2, (2, 3), ceil_mode=True, dims=2)}\nm",
    "another_window_behind": f"{CROPPED}\nm = {max_pool('y', 1, 2, dims=2)}\nr = mean(m, dims=(2, 3), keepdim=True)\nr",
}  # fmt: skip


def forms(made: Program) -> dict[str, torch.Size]:
    return {name: form.shape for name, form in observe(made, examples(made)).items()}


def whole(original: Program) -> Program:
    inputs = examples(original)
    return uncropped(original, observe(original, inputs), inputs)


@pytest.mark.parametrize("name", WHOLE)
def test_values_stay(name: str) -> None:
    original = program(INPUTS, f"{CROPPED}\n{WHOLE[name]}")
    after = whole(original)
    after.verify()
    assert "extent" in str(original) and forms(original)["y"] == (2, 6, 8, 9) and forms(after)["y"] == (2, 6, 9, 11)
    torch.manual_seed(0)
    values = [torch.randn([s or 0 for s in k.shape], dtype=k.dtype) for _, k in original.inputs]
    for a, b in zip(after.run(values), original.run(values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert whole(after) == after


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name: str) -> None:
    original = program(f"{INPUTS}, z: f64[8, 9]", LEFT[name])
    assert whole(original) == original
