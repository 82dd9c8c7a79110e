"""A transposed convolution as kernels see it: three spatial dims, groups, and how channels lie in a row of x. Pure."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

from fxfuse.kernels.convolution.geometry import Residue, deltas_of, reach, residues_of

#: channels of groups that are multiplied together: as many as an instruction has products
JOINED = 16


@dataclasses.dataclass(frozen=True)
class Layer:
    """A transposed convolution, channels per group; three spatial dims.

    ``joined``: how many groups of the model one of these is; between their channels weights are zero.
    ``beside``: dims along which a row of x holds the channels of all positions that taps read, side by side; deltas
    along them are zero then, and an ``in_channels`` is one of the model's at one of the ``offsets``.
    """

    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]
    joined: int = 1
    beside: tuple[int, ...] = ()

    def join(self) -> Layer:
        """The same with fewer groups, as far as the channels of one leave the least matrix instruction idle. For
        values that are finite: others times zero are not zero."""
        most = JOINED // max(self.in_channels, self.out_channels)
        many = max((f for f in range(1, most + 1) if self.groups % f == 0), default=1)
        return dataclasses.replace(
            self,
            in_channels=self.in_channels * many,
            out_channels=self.out_channels * many,
            groups=self.groups // many,
            joined=self.joined * many,
        )

    def side_by_side(self, dims: tuple[int, ...]) -> Layer:
        """The same with the positions along ``dims`` that taps read in one row: one product for taps that differ in
        nothing else. Of classes that read some of them the weights of the others are zero, as in :meth:`join`.
        """
        made = dataclasses.replace(self, beside=dims)
        return dataclasses.replace(made, in_channels=self.in_channels * len(made.offsets))

    @property
    def apart(self) -> Layer:
        """The same with one position in a row."""
        return dataclasses.replace(self, in_channels=self.in_channels // len(self.offsets), beside=())

    @property
    def channels(self) -> int:
        """Input channels of one of the model's groups."""
        return self.in_channels // (self.joined * len(self.offsets))

    @functools.cached_property
    def residues(self) -> tuple[Residue, ...]:
        return residues_of(self.kernel, self.stride, self.padding, self.dilation, beside=self.beside)

    @functools.cached_property
    def offset_of(self) -> tuple[int, ...]:
        """Of every tap the one of the ``offsets`` that it reads."""
        return tuple(map({o: i for i, o in enumerate(self.offsets)}.__getitem__, self._read))

    @functools.cached_property
    def offsets(self) -> tuple[tuple[int, int, int], ...]:
        """Positions that a row holds, relative to its own: the first one is the least along every dim."""
        return tuple(sorted({*self._read}))

    @functools.cached_property
    def _read(self) -> tuple[tuple[int, int, int], ...]:
        """Of every tap the position of a row that it reads, relative to the row's own."""
        along = deltas_of(self.kernel, self.stride, self.padding, self.dilation)
        d, h, w = (by if dim in self.beside else [0] * len(by) for dim, by in enumerate(along))
        return tuple(itertools.product(d, h, w))

    def row_sizes(self, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
        """How many positions per dim have a row, of an x of these ``sizes``: those behind them would hold zeros."""
        d, h, w = (max(1, n - low) for n, low in zip(sizes, self.offsets[0], strict=True))
        return d, h, w

    @functools.cached_property
    def reach(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """The least and the greatest delta per dim."""
        return reach(self.residues)

    def planes_read(self, planes: int) -> int:
        """Planes of x of which an output has so many planes of positions, about."""
        kernel, stride, padding, dilation = (of[0] for of in (self.kernel, self.stride, self.padding, self.dilation))
        return (stride * planes + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1

    @property
    def volume(self) -> int:
        return math.prod(self.kernel)
