"""Every kernel of the chains that run on a GPU, compiled for Hopper: registers, shared memory, matrix instructions.

The chains are those of tests/drawn.py and fxfuse/bench/chains.py. A few of them by default;
``FXFUSE_CHAINS=320 pytest tests/kernels/test_every_kernel.py`` compiles what ``tests/many_chains.py`` runs, and all
of the benchmark's.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
from collections.abc import Iterator, Sequence
from unittest import mock

import many_chains
import pytest
import torch
from drawn import CLASSES, draw
from many_chains import kernels_always, kinds_of
from torch import Tensor, nn

import fxfuse
from fxfuse.bench import chains, idioms
from fxfuse.kernels.codegen.statistics import KINDS
from fxfuse.kernels.compilation.jit import Cubin, compile_cubin
from fxfuse.kernels.compilation.sass import sass
from fxfuse.kernels.convolution.kernels import BLOCK, THREADS, Convolution
from fxfuse.kernels.convolution.specialisation import SHARED_BYTES
from fxfuse.kernels.runtime.tail_engine import FINISH_BLOCK
from fxfuse.kernels.stages.merge import MERGE_BLOCK
from fxfuse.models import Case
from fxfuse.region import Region

pytest.importorskip("cuda.bindings.nvrtc")

ALL = os.environ.get("FXFUSE_CHAINS")
COUNT = int(ALL or "16")
#: registers of a multiprocessor, and how many of a kernel's blocks it shall hold
REGISTERS = 65536
THREADS_OF = {"convolution": (THREADS, 1), "direct": (BLOCK, 4), "merge": (MERGE_BLOCK, 2)}
THREADS_OF |= {f"finish_{kind}": (FINISH_BLOCK, 1) for kind in KINDS}
#: static shared memory that a block has
STATIC_BYTES = 48 * 1024
#: bytes that kernels may spill, the others none: a convolution that gathers, behind its products; those that make
#: the samples that half precision cannot hold; a reduction of 64 channels per thread
MOST_SPILLED = {"convolution": 448, "direct": 64, "merge": 128, "fold": 96}
#: instructions that read or write global memory, or end a thread; those that read it through the read-only path, where
#: what the kernel in front writes need not be seen; and those that go to a label
TOO_EARLY = re.compile(r"\b(LDG?|STG?|LDGSTS|ATOMG?|REDG?|UTMALDG|UBLKCP|EXIT|RET)\b")
READ_ONLY = re.compile(r"\bLDG\S*\.CONSTANT\b")
GOES = re.compile(r"\b(?:BRA|JMP)\b.*?(\.L_x_\d+)")


@dataclasses.dataclass(frozen=True)
class Source:
    """The text of some kernels; of a convolution, what it was made of."""

    text: str
    kinds: tuple[str, ...]
    convolution: Convolution | None = None


def sources_of(model: nn.Module, inputs: Sequence[Tensor], *, exact: bool) -> Iterator[Source]:
    """What a Hopper GPU would compile for these calls."""
    calls: list[tuple[Region, list[Tensor]]] = []

    def spy(region: Region, given: Sequence[Tensor], _key: object) -> None:
        calls.append((region, [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in given]))

    fast = fxfuse.optimize(model)
    with torch.no_grad(), mock.patch("fxfuse.kernels.execute.run", spy):
        fast(inputs[0])
        for x in inputs:
            fast(x)
    for region, given in calls:
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in given]
        made = many_chains.plan(region, fakes, exact=exact)
        kinds = () if made.schedule is None else tuple(kinds_of(made.schedule))
        for name, text in made.sources():
            yield Source(text, kinds, {"measuring": made.measuring, "convolution": made.convolution}.get(name))


def check(source: Source, *, disassemble: bool) -> None:
    """Compile it for Hopper, and hold it to its plan."""
    cubin = compile_cubin(source.text)
    assert cubin.kernels
    for name, used in cubin.kernels.items():
        threads, blocks = THREADS_OF.get(name, (BLOCK, 1))
        assert used.registers <= REGISTERS // (threads * blocks) // 8 * 8, (name, used, source.kinds)
        assert used.shared <= STATIC_BYTES, (name, used, source.kinds)
        assert used.spills <= MOST_SPILLED.get(name, 0), (name, used, source.kinds)
    # C7510, C7511: ptxas waits behind every matrix instruction
    assert not [w for w in cubin.warnings if "C751" in w or "serialized" in w], source.kinds
    for name in cubin.kernels if disassemble else ():
        check_wait(name, sass(cubin, name))
    if source.convolution is not None:
        assert cubin.kernels["convolution"].shared + source.convolution.made.dynamic_bytes <= SHARED_BYTES
        assert ("merge" in cubin.kernels) == bool(source.convolution.epilogue.gathers)
        if disassemble or cubin.kernels["convolution"].spills:
            check_products(cubin, source)


def check_wait(name: str, text: str) -> None:
    """Whichever way a thread goes, it waits for the kernels in front before it touches global memory: a launch may
    begin while they run."""
    assert text.count("ACQBULK") == 1, f"{name} does not call fxfuse::begin_dependent(), or not once"
    lines = [line for line in (re.sub(r"/\*.*?\*/", "", line).strip() for line in text.splitlines()) if line]
    (wait,) = (i for i, line in enumerate(lines) if "ACQBULK" in line)
    assert not lines[wait].startswith("@"), lines[wait]
    if name != "prepare":  # which reads tables of the module
        assert not READ_ONLY.search(text), name
    for line in lines[:wait]:
        assert not TOO_EARLY.search(line), line
        goes = GOES.search(line)
        assert goes is None or lines.index(f"{goes[1]}:") <= wait, line


def check_products(cubin: Cubin, source: Source) -> None:
    """The matrix units multiply, undisturbed. Statistics may spill a little behind the products, and nothing else."""
    assert source.convolution is not None
    instruction = "HMMA.1688.F32.TF32" if source.convolution.made.planar else "HGMMA.64x"
    spills, epilogue = cubin.kernels["convolution"].spills, source.convolution.epilogue
    assert epilogue.gathers or not spills, (spills, source.kinds)
    lines = sass(cubin, "convolution").splitlines()
    products = [i for i, line in enumerate(lines) if instruction in line]
    assert bool(products) == any(one.steps for one in source.convolution.made.passes)
    if products:
        assert not [line for line in lines[products[0] : products[-1]] if "STL" in line or "LDL" in line], source.kinds


def check_all(model: nn.Module, inputs: Sequence[Tensor], *, exact: bool, disassemble: bool) -> None:
    try:
        found = list(sources_of(model, inputs, exact=exact))
    except NotImplementedError:
        pytest.skip("eager mode on a CPU has not all operators in 16 bits")
    for source in {s.text: s for s in found}.values():
        check(source, disassemble=disassemble)


@pytest.mark.parametrize("seed", range(COUNT))
def test_random_chains(seed: int) -> None:
    drawn = draw(seed)
    inputs = list(drawn.inputs("cpu"))[:: 2 if ALL else 3]  # of both memory formats, or of one
    how = {"twice": seed % 2 == 1, "spread": seed % 3 == 1, "gathered": seed % 4 < 2}
    with kernels_always(drawn.anchored, **how):
        check_all(drawn.model("cpu"), inputs, exact=not drawn.allow_tf32, disassemble=bool(ALL) or seed % 4 == 0)


@pytest.mark.parametrize("case", chains.CHAINS, ids=lambda case: case.name)
def test_chains_of_the_benchmark(case: Case) -> None:
    """In one numerics class each, the convolution run once or twice; or in all, and both."""
    names, number = ("tf32", "float16", "ieee"), chains.CHAINS.index(case)
    ways = [(n, twice) for n in names for twice in (False, True)] if ALL else [(names[number % 3], number % 2 == 1)]
    for numerics, twice in ways:
        dtype, allow_tf32 = CLASSES[numerics]
        torch.manual_seed(0)
        model = case.make().to(dtype).train(case.name in chains.TRAINED)
        with kernels_always(twice=twice, spread=number % 2 == 0):  # small shapes: tiles of small layers, too
            x = torch.randn(case.small).to(dtype)
            check_all(model, [x], exact=not allow_tf32, disassemble=True)


#: input channels, output channels, stride: accumulators of two classes, channels as rows, x as it lies
LAYERS = {"two classes": (32, 64, 2), "channels as rows": (64, 128, 1), "planes": (3, 16, 2)}


@pytest.mark.parametrize("numerics", ["tf32", "float16", "ieee"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_gathered_over_space(name: str, numerics: str) -> None:
    """Sums of exponentials, and maxima beside means; beside the values, and alone."""
    dtype, allow_tf32 = CLASSES[numerics]
    cin, cout, stride = LAYERS[name]
    layer = nn.ConvTranspose3d(cin, cout, 3, stride, 1)
    softmax = idioms.Then(layer, idioms.softmax_of_space, torch.ones(1, cout, 1, 1, 1))
    for model in (softmax, idioms.Then(layer, idioms.attended)):
        for twice in (False, True):
            with kernels_always(twice=twice, gathered=True):
                x = torch.randn(2, cin, 3, 9, 16).to(dtype)
                check_all(model.to(dtype).eval(), [x], exact=not allow_tf32, disassemble=False)


@pytest.mark.skipif(not ALL, reason="FXFUSE_CHAINS asks for them")
@pytest.mark.parametrize("number", range(40))
def test_random_chains_of_the_benchmark(number: int) -> None:
    pick = random.Random(0)
    case = [chains.draw(pick) for _ in range(number + 1)][-1]
    with kernels_always():
        check_all(case.make().eval(), [torch.randn(case.small)], exact=False, disassemble=True)
