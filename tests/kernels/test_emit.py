"""Every kernel that is emitted compiles for Hopper, keeps its accumulators in registers, and multiplies in groups."""

from __future__ import annotations

import collections
import copy
import dataclasses
import re

import pytest
import torch
from along import rows_together
from many_chains import kernels_always, plan
from reports import explained
from torch import nn

from fxfuse.kernels import execute
from fxfuse.kernels.compilation.jit import compile_cubin
from fxfuse.kernels.compilation.sass import sass
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import KERNELS as KERNELS_OF_A_LAYER
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import Along
from fxfuse.kernels.convolution.tiling import RUNS, Store
from fxfuse.kernels.planning.observe import examples
from fxfuse.kernels.planning.schedule import schedule
from fxfuse.program import Program

pytest.importorskip("cuda.bindings.nvrtc")

CONVOLVE = "y = conv_transpose(x, w, b, stride={s}, padding={p}, output_padding=(0, 0, 0), dilation={e}, groups={g})"
MAX = "m = max_pool({x}, kernel={k}, stride={k}, padding=(0, 0, 0), dilation=(1, 1, 1), ceil_mode=False)"
AVG = (
    "m = avg_pool({x}, kernel={k}, stride={k}, padding=(0, 0, 0), ceil_mode=False, count_include_pad=True,"
    " divisor_override=None)"
)
SUMMED = "u = logsumexp(z, dims=(1,), keepdim=False)"
ONE, TWO, ZERO = (1, 1, 1), (2, 2, 2), (0, 0, 0)


def kernel(
    channels: tuple[int, int],
    size: tuple[int, int, int],
    *behind: str,
    s: tuple[int, int, int] = ONE,
    p: tuple[int, int, int] = ZERO,
    e: tuple[int, int, int] = ONE,
    groups: int = 1,
    dtype: str = "f32",
) -> Convolution:
    """A convolution of (in, out) ``channels`` and what is behind it, as a schedule has it, with large layers' tiles."""
    inputs = f"x: {dtype}[2, {channels[0]}, 12, 12, 12], w: {dtype}[{channels[0]}, {channels[1] // groups}, "
    inputs += f"{', '.join(map(str, size))}], b: {dtype}[{channels[1]}], g: {dtype}[{channels[1]}, 1, 1, 1]"
    lines = [CONVOLVE.format(s=s, p=p, e=e, g=groups), *behind]
    body = "".join(f"    {line}\n" for line in (*lines, f"return {lines[-1].split(' = ')[0]}"))
    made = Program.parse(f"def chain({inputs}):\n{body}")[1]
    found = schedule(made, examples(made))
    assert len(found.kernel.stages) == len(lines) or found.rest.body
    with kernels_always():
        return execute.convolution_of(found.kernel)


KERNELS = {
    "plain": lambda: kernel((32, 64), (3, 5, 5)),
    "nine_positions_in_a_row": lambda: kernel((1, 32), (3, 3, 3), p=ONE),
    "five_positions_in_a_row": lambda: kernel((3, 32), (5, 5, 5), p=TWO),
    "relu": lambda: kernel((64, 128), (3, 3, 3), "z = relu(y)"),
    "clamp_div": lambda: kernel((64, 128), (3, 3, 3), "z = clamp(y, -1.0, None)", "u = div(z, 2)", s=TWO, p=ONE),
    "pools": lambda: kernel((32, 64), (5, 5, 5), MAX.format(x="y", k=(6, 6, 6)), s=TWO, p=TWO),
    "gelu_max_scale": lambda: kernel(
        (32, 64), (3, 3, 3), "z = gelu(y, approximate='none')", MAX.format(x="z", k=TWO), "u = mul(m, g)", s=TWO
    ),
    "mean": lambda: kernel((16, 24), (4, 4, 4), "z = mul(y, g)", AVG.format(x="z", k=TWO), "u = silu(m)", s=TWO, p=ONE),
    "f16": lambda: kernel((64, 64), (3, 3, 3), "z = silu(y)", MAX.format(x="z", k=TWO), s=TWO, dtype="f16"),
    "bf16": lambda: kernel((64, 64), (3, 3, 3), "z = mish(y)", s=TWO, dtype="bf16"),
    "one_channel": lambda: kernel((1, 1), (3, 3, 3), "z = tanh(y)", s=TWO),
    "odd_channels": lambda: kernel((20, 70), (2, 3, 4), "z = softplus(y, beta=1.0, threshold=20.0)", s=(1, 2, 3)),
    "groups": lambda: kernel((48, 96), (3, 3, 3), "z = sigmoid(y)", e=(1, 2, 3), groups=3),
    "softmax": lambda: kernel((32, 64), (3, 3, 3), "u = softmax(y, dim=1)", "v = sigmoid(u)", s=TWO, p=ONE),
    "log_softmax_of_many": lambda: kernel((16, 250), (2, 2, 2), "u = log_softmax(y, dim=1)", dtype="f16"),
    "a_pool_and_a_logsumexp": lambda: kernel(
        (32, 40), (3, 3, 3), MAX.format(x="y", k=TWO), "z = silu(m)", SUMMED, "v = mul(u, 2.0)", s=TWO
    ),
    "a_mean_of_sums": lambda: kernel((12, 16), (3, 3, 3), AVG.format(x="y", k=TWO), "u = mul(m, g)", s=TWO, p=ONE),
    "a_mean_from_planes": lambda: kernel((3, 16), (3, 3, 3), AVG.format(x="y", k=TWO), "u = mul(m, g)", s=TWO, p=ONE),
    "a_mean_of_many_positions": lambda: kernel((3, 16), (3, 3, 3), AVG.format(x="y", k=(4, 4, 4)), s=TWO, p=ONE),
    "f16_a_mean_of_sums": lambda: kernel((3, 100), (3, 3, 3), AVG.format(x="y", k=TWO), s=TWO, dtype="f16"),
    "a_softmax_of_sums": lambda: kernel(
        (32, 64), (4, 4, 4), AVG.format(x="y", k=TWO), "z = softmax(m, dim=1)", s=TWO, p=ONE
    ),
    "a_norm_along_w": lambda: along("normalise(y, dims=(4,), eps=1e-05, centred=True, last=False)", Along.HELD),
    "a_softmax_along_w": lambda: along("softmax(y, dim=4)", Along.HELD, dtype="f16"),
    "rows_in_shared_memory": lambda: along("log_softmax(y, dim=4)", Along.SHARED),
    "a_mean_of_rows": lambda: along("softmax(y, dim=4)", Along.HELD, AVG.format(x="n", k=TWO)),
    "a_mean_of_rows_in_shared_memory": lambda: along("softmax(y, dim=4)", Along.SHARED, AVG.format(x="n", k=TWO)),
    "a_stride_beyond_the_kernel": lambda: kernel((32, 32), (1, 1, 2), "z = relu(y)", s=(3, 3, 3)),
}


def along(reduction: str, way: Along, *behind: str, dtype: str = "f32") -> Convolution:
    """A convolution whose rows come together in this ``way``."""
    more = {"s": TWO, "p": ONE, "dtype": dtype}
    last = "u = mul(m, g)" if behind else "u = mul(n, g)"
    with rows_together(way):
        made = kernel((32, 48), (4, 4, 4), f"n = {reduction}", *behind, last, **more)  # type: ignore[arg-type]
    assert made.made.along is way
    return made


def norm(name: str, *behind: str, monkeypatch: pytest.MonkeyPatch, **more: object) -> Convolution:
    """A convolution that gathers statistics of what it makes, for tensors of any size."""
    for module in ("stages.tail", "planning.schedule"):
        monkeypatch.setattr(f"fxfuse.kernels.{module}.LEAST_ELEMENTS", 1)
    return kernel((64, 32), (2, 2, 2), *behind, f"n = {name}", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("stride", [ONE, TWO], ids=str)
@pytest.mark.parametrize("last", ["instance_norm(z, None, None, eps=1e-5)", "mean(z, dims=(2, 3, 4), keepdim=True)"])
def test_statistics_do_not_disturb_the_products(
    last: str, stride: tuple[int, int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = norm(last, "z = silu(y)", s=stride, dtype=dtype, monkeypatch=monkeypatch)
    assert made.epilogue.gathers and made.epilogue.keeps == last.startswith("instance_norm")
    cubin = compile_cubin(made.source())
    lines = sass(cubin, "convolution").splitlines()
    products = [i for i, line in enumerate(lines) if "HGMMA" in line]
    assert not [line for line in lines[products[0] : products[-1]] if "STL" in line or "LDL" in line]
    assert not [w for w in cubin.warnings if "C751" in w or "serialized" in w]


def sources(made: Convolution) -> list[str]:
    return [made.source(store) for store in made.stores]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_without_spills(name: str) -> None:
    for text in dict.fromkeys(sources(KERNELS[name]())):
        cubin = compile_cubin(text)
        assert set(KERNELS_OF_A_LAYER) <= set(cubin.kernels)
        # a reduction of a pool, of samples that half precision cannot hold, keeps all three loops' places
        most = {"direct": 16} if KERNELS[name]().epilogue.fold is not None else {}
        spilt = {kernel: used.spills for kernel, used in cubin.kernels.items() if used.spills > most.get(kernel, 0)}
        assert not spilt
        # C7510, C7511: ptxas could not keep the accumulators in place, and waits behind every instruction
        assert not [w for w in cubin.warnings if "C751" in w or "serialized" in w]


@pytest.mark.parametrize("name", ["relu", "clamp_div", "groups", "a_mean_of_sums", "a_mean_from_planes"])
def test_nothing_is_divided_by_sizes(name: str) -> None:
    """Every warp finds its tile, and where that is stored, by multiplications: few warps hide no division."""
    made = KERNELS[name]()
    for store in made.stores:
        assert not [line for line in instructions(made, store) if "I2F" in line]


@pytest.mark.parametrize("exact", [False, True], ids=["tf32", "float32"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_twice_the_rows_are_kept_in_registers(dtype: str, exact: bool) -> None:
    """Of as many accumulators as :func:`with_more_rows` allows, through all that a store may be."""
    usual = kernel((3, 16), (3, 3, 3), AVG.format(x="y", k=TWO), "u = mul(m, g)", "v = silu(u)", s=TWO, dtype=dtype)
    larger = dataclasses.replace(usual.made, m_tiles=8, stages=3, exact=exact)
    for text in sources(dataclasses.replace(usual, made=larger)):
        cubin = compile_cubin(text)
        assert not cubin.kernels["convolution"].spills
        assert not [w for w in cubin.warnings if "C751" in w or "serialized" in w]


def test_an_epilogue_finds_its_rows_in_few_instructions() -> None:
    """Of 64 results in 16 rows of a thread: what rows have in common is not computed for each of them."""
    usual = KERNELS["a_mean_of_sums"]()
    lines = instructions(dataclasses.replace(usual, made=dataclasses.replace(usual.made, m_tiles=8)), Store.PLANES)
    last = max(i for i, line in enumerate(lines) if "HGMMA" in line)
    assert next(i for i, line in enumerate(lines[last:]) if "EXIT" in line) <= 1020


@pytest.mark.parametrize("name", ["a_mean_of_sums", "f16_a_mean_of_sums", "a_softmax_of_sums"])
def test_a_mean_is_made_by_the_matrix_units(name: str) -> None:
    """All accumulators are of one class: behind the products there is nothing to add."""
    made = KERNELS[name]()
    assert made.made.merged and made.made.residues == 1
    for text in dict.fromkeys(sources(made)):
        lines = sass(compile_cubin(text), "convolution").splitlines()
        products = [i for i, line in enumerate(lines) if "HGMMA" in line]
        assert not [line for line in lines[products[-1] :] if "FADD" in line] or made.epilogue.fold is not None
        assert f"HGMMA.64x{made.made.columns}x16" in lines[products[0]]


@pytest.mark.parametrize(("name", "wide"), [("relu", 128), ("softmax", 128), ("log_softmax_of_many", 256)])
def test_the_matrix_units_are_used(name: str, wide: int) -> None:
    text = sources(KERNELS[name]())[0]
    assert f"HGMMA.64x{wide}x16" in sass(compile_cubin(text), "convolution")


def instructions(made: Convolution, store: Store) -> list[str]:
    """The machine code of the convolution."""
    lines = sass(compile_cubin(made.source(store)), "convolution").splitlines()
    return [line for line in lines if re.search(r"/\*[0-9a-f]{4,}\*/", line)]


def test_a_reduction_over_channels_is_made_in_registers() -> None:
    """Between the products and the stores: shuffles of two steps, and nothing in local memory."""
    made = KERNELS["softmax"]()
    assert made.epilogue.fold is not None and made.made.column_tiles == 1
    lines = instructions(made, Store.DIRECT)
    last = max(i for i, line in enumerate(lines) if "HGMMA" in line)
    # for a maximum and a sum, of two positions at a time
    shuffles = [i for i, line in enumerate(lines) if "SHFL.BFLY" in line]
    assert len(shuffles) == 4 * 2
    assert min(shuffles) > last and not [line for line in lines if "STL" in line or "LDL" in line]


FOLDS = [name for name in KERNELS if KERNELS[name]().epilogue.fold is not None]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", FOLDS)
def test_reductions_over_channels_are_short(name: str, last: bool) -> None:
    """A loop over a thread's positions: in line they are more than 100 KiB, for which an epilogue waits."""
    made = KERNELS[name]()
    if last:
        made = dataclasses.replace(made, layout="channels_last")
    # runs through shared memory are staged behind the loop, in line
    for store in made.stores:
        assert len(instructions(made, store)) * 16 <= (104 if store in RUNS else 50) * 1024
        assert compile_cubin(made.source(store)).kernels["convolution"].stack == 0


def test_sources_do_not_change_from_call_to_call() -> None:
    made = KERNELS["mean"]
    assert sources(made()) == sources(made())


def test_sizes_are_not_compiled_in() -> None:
    """One kernel for all sizes: what depends on them are arguments."""
    made = [
        Program.parse(
            f"def chain(x: f32[{n}, 8, {d}, 9, 9], w: f32[8, 16, 3, 3, 3], r: f32[{n}, 16, {d + 2}, 11, 11]):\n"
            f"    {CONVOLVE.format(s=ONE, p=ZERO, e=ONE, g=1).replace('b,', 'None,')}\n"
            "    z = add(y, r)\n    return z\n"
        )[1]
        for n, d in ((2, 9), (3, 17))
    ]
    found = [execute.convolution_of(schedule(m, examples(m)).kernel) for m in made]
    assert sources(found[0]) == sources(found[1])


@pytest.mark.parametrize(
    "tail",
    [
        [nn.BatchNorm3d(16), nn.ReLU()],
        [nn.BatchNorm3d(16).eval(), nn.ReLU()],
        [nn.BatchNorm3d(16).eval(), nn.AdaptiveAvgPool3d(1), nn.Flatten()],
        [nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Sigmoid()],
        [nn.InstanceNorm3d(16), nn.LeakyReLU(), nn.AvgPool3d(2)],
        [nn.GroupNorm(4, 16), nn.SiLU()],
        [nn.Softmax(1), nn.AdaptiveMaxPool3d(2)],
    ],
    ids=lambda tail: " > ".join(type(m).__name__ for m in tail),
)
def test_sizes_are_not_compiled_in_around_convolutions(tail: list[nn.Module]) -> None:
    def texts(*shape: int) -> set[str]:
        model = nn.Sequential(nn.ConvTranspose3d(8, 16, 3, stride=2), *copy.deepcopy(tail))
        (region,) = (r.region for r in explained(model, shape).regions)
        with kernels_always():
            made = plan(region, examples(region.rewritten), exact=False)
        return {text for name, text in made.sources() if name not in ("measuring", "convolution")}

    assert texts(5, 8, 12, 12, 12) == texts(6, 8, 13, 12, 14)


def test_steps_in_turn() -> None:
    """Every pass of a tile multiplies every run, once, and all of it: not by chunks of channels, nor slab by slab."""
    ways = {
        "strided": kernel((32, 64), (3, 3, 3), s=TWO, p=ONE),
        "chunks": kernel((128, 32), (3, 3, 3), s=TWO, p=ONE),
        "slabs": kernel((64, 128), (5, 5, 5), s=TWO, p=TWO),
        "a class without taps": kernel((16, 32), (1, 1, 1), s=TWO),
    }
    assert ways["slabs"].made.resident and ways["slabs"].made.slabs > 1
    found = {name: re.search(r"bool in_turn = (\w+)", made.source())[1] for name, made in ways.items()}
    assert found == {"strided": "true", "chunks": "false", "slabs": "false", "a class without taps": "false"}


@pytest.mark.parametrize(
    ("dtype", "channels", "stores"),
    [
        (torch.float16, 24, {".64": 16, "": 16}), (torch.float16, 32, {".128": 8}),
        (torch.bfloat16, 48, {".128": 8, ".64": 8}), (torch.float16, 96, {".128": 8, ".64": 8}),
        (torch.float32, 16, {".128": 32}), (torch.float32, 24, {".128": 16, ".64": 16}),
    ],
    ids=str,
)  # fmt: skip
def test_neighbouring_channels_are_stored_at_once(dtype: torch.dtype, channels: int, stores: dict[str, int]) -> None:
    """A position's in as few instructions as there can be: four times as many took twice the time of a convolution."""
    layer = Layer(32, channels, 1, (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
    given = dtype, dtype, dtype, Epilogue(), "channels_last", False, (32, 96, 96), 8
    made = Convolution.of(layer, *given, in_place=dtype.itemsize == 2)
    text = sass(compile_cubin(made.source(made.tiling((32, 96, 96))[1])), "convolution")
    found = collections.Counter(re.findall(r"STG\.E(\.\d+)?\b", text))
    assert found == stores
