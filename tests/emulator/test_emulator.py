"""The emulated GPU itself: it computes, and what a kernel must not do is an error or shows as a wrong value."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from emulator import device
from emulator.device import Device, EmulationError, emulated, needs_compiler
from orientation import chosen_anew
from torch import Tensor

from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.runtime.convolution_engine import Calls
from fxfuse.kernels.runtime.launch import Chain, Launch

pytestmark = needs_compiler

REVERSED = """#include "ptx.cuh"
extern "C" __global__ void __launch_bounds__(64)
turn(float* out, const float* x, int count) {
  __shared__ float kept[64];
  if (threadIdx.x < count) kept[threadIdx.x] = x[blockIdx.x * count + threadIdx.x];
  __syncthreads();
  if (threadIdx.x < count) out[blockIdx.x * count + threadIdx.x] = kept[count - 1 - threadIdx.x];
}
"""


def launch(
    given: Device, source: str, name: str, grid: int, block: int, *arguments: object, follows: bool = False
) -> None:
    kernel = device._module(source, [name]).kernels[name]
    Chain([Launch(kernel, grid, block, arguments)], follows=follows)(0)


def pointer(t: Tensor) -> ctypes.c_int64:
    return ctypes.c_int64(t.data_ptr())


def reverse(count: int, room: int = 0, source: str = REVERSED) -> Tensor:
    with emulated() as given:
        x, out = torch.arange(3.0 * count), given.empty((3 * count - room,), (1,), torch.float32)
        launch(given, source, "turn", 3, 64, pointer(out), pointer(x), ctypes.c_int(count))
        assert given.launches == ["turn"]
        assert torch.equal(out.view(3, count), x.view(3, count).flip(1))
        return out


def test_an_overlapping_kernel_waits_in_every_thread() -> None:
    always = REVERSED.replace("  __shared__", "  fxfuse::begin_dependent();\n  __shared__")
    some = REVERSED.replace("  __shared__", "  if (threadIdx.x < count) fxfuse::begin_dependent();\n  __shared__")
    with emulated() as given:
        x, out = torch.arange(120.0), given.empty((120,), (1,), torch.float32)
        arguments = pointer(out), pointer(x), ctypes.c_int(40)
        launch(given, some, "turn", 3, 64, *arguments)
        launch(given, always, "turn", 3, 64, *arguments, follows=True)
        with pytest.raises(EmulationError, match="turn: a thread ends without begin_dependent"):
            launch(given, some, "turn", 3, 64, *arguments, follows=True)


def test_threads_share_memory() -> None:
    reverse(40)


@pytest.mark.parametrize("missing", ["  __syncthreads();\n", " = x[blockIdx.x * count + threadIdx.x]"])
def test_what_is_not_there_yet_is_nan(missing: str) -> None:
    with pytest.raises(AssertionError):
        reverse(40, source=REVERSED.replace(missing, ""))


def test_a_write_behind_what_is_given_is_an_error() -> None:
    with pytest.raises(EmulationError, match=r"turn wrote behind 512 bytes"):
        reverse(50, room=22)


def test_who_waits_for_ever_is_an_error() -> None:
    early = REVERSED.replace("  __syncthreads", "  if (threadIdx.x == 7) named_barrier(1, 64);\n  __syncthreads")
    with pytest.raises(EmulationError, match=r"nothing goes on: .*bar.sync"):
        reverse(40, source=early.replace("named", "fxfuse::named"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_torchs(dtype: torch.dtype) -> None:
    name = {torch.float16: "Half", torch.bfloat16: "BFloat"}[dtype]
    source = f"""#include "ptx.cuh"
extern "C" __global__ void __launch_bounds__(256)
narrow(fxfuse::{name}* to, float* back, const float* x) {{
  const int i = blockIdx.x * 256 + threadIdx.x;
  to[i] = fxfuse::from_float<fxfuse::{name}>(x[i]), back[i] = fxfuse::to_float(to[i]);
}}
"""
    bits = torch.randint(-(2**31), 2**31 - 1, (2**16,), dtype=torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.randn(2**16) * 10.0 ** torch.randint(-9, 6, (2**16,))])
    with emulated() as given:
        to, back = (given.empty(tuple(x.shape), (1,), d) for d in (dtype, torch.float32))
        launch(given, source, "narrow", x.numel() // 256, 256, pointer(to), pointer(back), pointer(x))
    torch.testing.assert_close(to, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


# --- the convolution, and what goes wrong when it does not wait ----------------------------------------
LAYER = Layer(32, 48, 1, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1))
#: its kernel has several runs of residue classes in every pass, of which each begins as the one before ends
STRIDED = dataclasses.replace(LAYER, stride=(2, 2, 2), kernel=(9, 3, 3), padding=(4, 1, 1))
#: the same of one run in every pass
ALIKE = dataclasses.replace(LAYER, kernel=(4, 2, 2), stride=(2, 2, 2), padding=(1, 0, 0))


def convolve(seed: int, dtype: torch.dtype = torch.float16, layer: Layer = LAYER) -> tuple[Tensor, Tensor]:
    """A result and what it should be."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g).to(dtype) for s in ((2, 32, 6, 7, 9), (32, 48, *layer.kernel)))
    expected = torch.nn.functional.conv_transpose3d(x.float(), w.float(), stride=layer.stride, padding=layer.padding)
    made = Convolution.of.__wrapped__(layer, dtype, dtype, dtype, Epilogue())
    assert made.made.turns == (layer is STRIDED) and made.made.in_turn == (layer is not LAYER)
    with emulated(seed) as given:
        out = given.empty(tuple(expected.shape), expected.stride(), dtype)
        Calls(made, tuple(expected.shape[2:])).run(x, w, None, out)
    return out.float(), expected


def difference(seed: int, layer: Layer = LAYER) -> float:
    # of float32, which is finite, classes of other shapes share accumulators
    got, expected = convolve(seed, torch.float32 if layer is STRIDED else torch.float16, layer)
    return float((got - expected).norm() / expected.norm())


def test_a_convolution() -> None:
    for dtype, limit in ((torch.float32, 5e-4), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        got, expected = convolve(0, dtype)
        assert (got - expected).norm() < limit * expected.norm()


def test_the_same_coins_are_the_same_bits() -> None:
    assert torch.equal(convolve(3)[0], convolve(3)[0]) and torch.equal(convolve(3)[0], convolve(4)[0])


BROKEN: Sequence[tuple[str, str, str]] = (
    (
        "conv_wgmma.cuh",
        "if (!Problem::by_slab && (!Problem::resident || pass == 0)) "
        "barrier_wait(&barriers.x_full[xs.slot], xs.phase);",
        "x is not waited for",
    ),
    ("conv_wgmma.cuh", "barrier_wait(&barriers.full[ring.slot], ring.phase);", "weights are not waited for"),
    ("conv_copies.cuh", "barrier_wait(&barriers.empty[ws.slot], ws.phase ^ 1);", "stages are overwritten"),
    ("conv_wgmma.cuh", "wgmma_wait<0>();\n  if (before", "products are not waited for"),
    ("conv_outbox.cuh", "barrier_wait(full, outbox.ring.phase);", "sent too early"),
    (
        "conv_outbox.cuh",
        "barrier_wait(&outbox.shared.empty[outbox.ring.slot], outbox.ring.phase ^ 1);",
        "put too early",
    ),
    ("conv_outbox.cuh", "stored_bytes_read<pending>();", "taken for read"),
)


def is_wrong(seed: int, layer: Layer = LAYER) -> bool:
    try:
        return not difference(seed, layer) < 1e-2
    except EmulationError:
        return True


@pytest.mark.parametrize(("header", "text", "why"), BROKEN, ids=[b[2] for b in BROKEN])
def test_what_does_not_wait_shows(header: str, text: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait of the convolution left out: some order of events, of a few, gives a wrong value or an error."""
    rest = "if (before" if "if (before" in text else ";"
    monkeypatch.setattr("fxfuse.kernels.convolution.tiles.MOST_BLOCKS", 2)  # or they need not wait for each other
    with device.broken(header, text, rest):
        assert any(is_wrong(seed) for seed in range(12))


@pytest.mark.parametrize(
    ("layer", "text", "other"),
    [
        (ALIKE, "next = {s, step};", ""),
        (ALIKE, "NextStep next{0, steps[0]};", "NextStep next{1, steps[1]};"),
        (ALIKE, "(s.last & 2 ? kLast : 0)", "0"),
        (STRIDED, "(s.last & 2 ? kLast : 0)", "0"),
        (STRIDED, "next.step = step;", ""),
        (STRIDED, "NextStep next{0, steps[0]};", "NextStep next{1, steps[1]};"),
        (STRIDED, "if (r > 0) leave_stage();", ""),
        (STRIDED, "if (r > 0) wgmma_wait<Problem::m_tiles - 1>(), wgmma_fence();", ""),
        (STRIDED, "if (!Problem::pingpong) wgmma_wait<Problem::m_tiles>();", ""),
    ],
    ids=[
        "each begins as the first",
        "the first step is left out",
        "none ends",
        "no run ends",
        "each run begins as the first",
        "the first step of runs is left out",
        "weights of the run before",
        "rows whose products are not done",
        "weights are overwritten",
    ],
)
def test_steps_in_turn(layer: Layer, text: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a tile whose steps follow each other begin where the one before has ended, or ends."""
    # more than products with padding
    monkeypatch.setattr("fxfuse.kernels.convolution.specialisation.RUN_CYCLES", 10**9)
    with chosen_anew():
        assert not is_wrong(0, layer)
        with device.broken("conv_wgmma.cuh", text, other):
            assert any(is_wrong(seed, layer) for seed in range(12))
