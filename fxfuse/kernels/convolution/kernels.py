"""The kernels of a convolution with its epilogue: what is emitted for a layer, its tiles, and how it is stored. Pure.

``convolution_engine.py`` compiles them and queues their launches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from fxfuse.instr import DTYPE_NAMES
from fxfuse.kernels.convolution import planar
from fxfuse.kernels.convolution.adapted import as_pingpong, with_more_room, with_more_rows, with_more_tiles, with_sets
from fxfuse.kernels.convolution.beside import fastest
from fxfuse.kernels.convolution.emit import Epilogue, emit
from fxfuse.kernels.convolution.entries import Prologue
from fxfuse.kernels.convolution.geometry import ONE
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.sets import may_be_wide
from fxfuse.kernels.convolution.specialisation import CONSUMERS, Specialisation, Unsupported
from fxfuse.kernels.convolution.specialise import specialise
from fxfuse.kernels.convolution.tiles import Extents, Tiling, has_joint_tiles
from fxfuse.kernels.convolution.tiling import Store, seconds, store_of, tile

#: entries that every source has
KERNELS = ("convolution", "direct")
#: threads of the convolution: two warpgroups that multiply, one that copies; and of the kernels around it, but `merge`
THREADS, BLOCK = 128 * (CONSUMERS + 1), 256
#: values of float32 x that `measure` looks at: of a sample, and of all of them
SAMPLED_EACH, SAMPLED = 2**14, 2**21
#: how much faster rows of several positions must be by estimate than others, where results are stored from registers:
#: read off seven layers on an H100
LEAD = 1.1
#: seconds of the launches around a convolution that looks at its 16-bit x; the look itself: tiling.LOOKING
WATCHING = 5e-6

#: a kernel for finite values, a position in a row
APART = functools.partial(specialise, finite=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Convolution:
    """A layer with its epilogue. Made by :meth:`of`, once per layer and epilogue."""

    made: Specialisation
    dtype: torch.dtype
    output: torch.dtype
    bias: torch.dtype
    epilogue: Epilogue
    layout: str
    prologue: Prologue | None = None

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(
        layer: Layer,
        dtype: torch.dtype,
        output: torch.dtype,
        bias: torch.dtype,
        epilogue: Epilogue,
        layout: str = "contiguous",
        exact: bool = False,
        extents: Extents | None = None,
        samples: int = 0,
        in_place: bool = False,
        planes: bool = False,
        prologue: Prologue | None = None,
    ) -> Convolution:
        """The kernels for a layer; Unsupported where there are none.

        ``layout``: "contiguous" or "channels_last". ``exact``: the accuracy of float32, not of TF32. ``extents``:
        sizes of the stored tensor, for a choice between a few kernels; any of them takes any size. ``samples``: so
        many of them, where that is known. ``in_place``: x, of 16-bit numbers, lies as rows of channels.
        ``planes``: x may be read as it lies. ``prologue``: what is made of x on the way.
        """
        before = epilogue.before != Epilogue.before
        summed = epilogue.combine == "Sum" and not before and epilogue.along is None
        last = layout == "channels_last"
        layout = layout if epilogue.keeps else "channels_last"  # tiles for a store that costs nothing
        row = extents[2] if extents is not None and layout == "contiguous" else 0

        def specialised(layer: Layer, choose: Callable[..., Specialisation]) -> Specialisation:
            made = choose(
                layer,
                pooled=bool(epilogue.combine),
                exact=exact,
                before=before,
                summed=summed,
                contiguous=layout == "contiguous",
                folded=epilogue.fold is not None,
                one=epilogue.fold is not None and not epilogue.fold.keeps,
                along=epilogue.along is not None,
                keeps=epilogue.keeps,
                stored=extents,
                itemsize=output.itemsize,
            )
            if extents is not None and samples and epilogue.fold is None:
                made = with_more_rows(made, samples, extents, row, output.itemsize, keeps=epilogue.keeps)
            if extents is not None and epilogue.keeps:
                made = with_more_room(made, extents, row, output.itemsize)
            return made

        def positions() -> Extents:
            """Of x, about."""
            assert extents is not None
            stride = layer.stride if epilogue.combine == "" else (1, 1, 1)
            d, h, w = (-(-e // s) for e, s in zip(extents, stride, strict=True))
            return d, h, w

        def time(made: Specialisation) -> float:
            assert extents is not None
            return seconds(
                made, samples, positions(), extents, row, output.itemsize, keeps=epilogue.keeps, in_place=in_place
            )

        def lead(made: Specialisation) -> float:
            """How much faster it must be than others by estimate."""
            if not (row and made.layer.beside):
                return 1.0
            tiling = tile(made, positions(), row, output.itemsize)
            return LEAD if store_of(made, tiling, positions(), row, output.itemsize)[0] is Store.DIRECT else 1.0

        if dtype is torch.float32:  # what is not finite is left to the kernel `direct`
            made = specialised(layer.join(), fastest)
        else:
            made = specialised(layer, specialise)
            if extents is not None and samples and not summed:
                finite, apart = (specialised(layer.join(), f) for f in (fastest, APART))
                if lead(finite) > 1 and time(finite) * lead(finite) > time(apart):
                    finite = apart
                watched = dataclasses.replace(finite, watched=True)
                if time(watched) + WATCHING < time(made):
                    made = watched
        if extents is not None and samples:
            divisible = epilogue.fold is None
            made = with_more_tiles(
                made, samples, extents, row, output.itemsize, keeps=epilogue.keeps, divisible=divisible
            )
            if epilogue.keeps and divisible and not (epilogue.combine or epilogue.gathers or epilogue.along):
                clean = dtype is torch.float32 or made.watched
                made = with_sets(made, samples, extents, row, output.itemsize, keeps=True, finite=clean)
        if planes and not (exact or epilogue.along) and extents is not None and samples:
            with contextlib.suppress(Unsupported):
                other = specialised(layer, APART)
                other = planar.as_planes(
                    other,
                    samples,
                    extents,
                    row,
                    output.itemsize,
                    keeps=epilogue.keeps,
                    step=epilogue.step,
                    of=dtype.itemsize,
                )
                slow = epilogue.fold is not None or epilogue.combine == "Maximum"
                worth_it = planar.WORTH_IT * (planar.REDUCING if slow else 1.0)
                if epilogue.step != ONE or time(other) * worth_it < time(made) * lead(made):
                    made = other
        if extents is not None and samples:
            made = as_pingpong(made, samples, extents, row, output.itemsize, keeps=epilogue.keeps)
        if last:
            most = 2 if made.planar or made.by_channel else 16 // output.itemsize
            made = dataclasses.replace(made, neighbours=math.gcd(most, made.layer.out_channels))
        if made.step != epilogue.step:
            raise Unsupported(f"no kernel makes one value of {epilogue.step} positions")
        return Convolution(made, dtype, output, bias, epilogue, layout, prologue)

    def tiling(self, stored: Extents) -> tuple[Tiling, Store]:
        """The tiles of an output of these sizes, and how they are stored. Raises Unsupported where there are none."""
        stride = (1, 1, 1) if self.made.pooled else self.made.layer.stride
        d, h, w = (-(-o // s) for o, s in zip(stored, stride, strict=True))
        row = 0 if self.layout == "channels_last" else stored[2]
        found = tile(self.made, (d, h, w), row, self.output.itemsize)
        return found, store_of(self.made, found, (d, h, w), row, self.output.itemsize)[0]

    def source(self, store: Store | None = None) -> str:
        """The kernels' text. ``store``: one of :attr:`stores`; by default the one for outputs of some size."""
        dtype, output, bias = (DTYPE_NAMES[d] for d in (self.dtype, self.output, self.bias))
        return emit(self.made, dtype, output, bias, self.epilogue, store or self.stores[0], self.prologue)

    def slots(self, stored: Extents) -> int:
        """Partial statistics of every channel of a sample, where they are gathered of an output of these sizes."""
        passes = 1 if self.epilogue.combine else len(self.made.passes)
        return math.prod(self.tiling(stored)[0].counts) * passes * self.made.sharing

    @property
    def stores(self) -> tuple[Store, ...]:
        """The ways to store that sizes may ask for."""
        if self.made.along:
            return (Store.ALONG,)
        if self.made.one:
            return (Store.ONE,)
        if self.layout == "channels_last":
            return (Store.CHANNELS,)
        if self.made.by_channel:
            return (Store.SECTORS, Store.STREAM)
        if self.made.samples > 1:
            return (Store.WIDE, Store.DIRECT) if may_be_wide(self.made) else (Store.DIRECT,)
        if self.made.pingpong or (self.made.pooled and not self.made.merged):
            return (Store.DIRECT,)
        _, h, w = (1, 1, 1) if self.made.pooled else self.made.layer.stride
        classes = self.made.stored_classes
        neighbours = ((Store.JOINT, h * w), (Store.PLANES, h * w), (Store.ROWS, w))
        runs = [k for k, n in neighbours if classes % n == 0 and (k is not Store.JOINT or has_joint_tiles(self.made))]
        return (*runs, Store.DIRECT)


def sampled(samples: int, each: int) -> int:
    """One of how many values of ``samples`` of ``each`` float32 values is looked at before they are scaled."""
    return max(1, min(each // SAMPLED_EACH, samples * each // SAMPLED, 64))
