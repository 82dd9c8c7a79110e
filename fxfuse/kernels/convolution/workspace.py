"""Where in memory the kernels of a convolution leave what others of them read. Pure.

Two blocks: what a second run of the convolution uses as well, which is handed on to it, and what is a run's own. A
first run's own lies behind what it hands on: it is small beside that, and one allocation costs half as much as two.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from fxfuse.kernels.convolution.specialisation import Shared

#: bytes to a multiple of which a section begins: copies into shared memory ask for 16
ALIGNMENT = 128


@dataclasses.dataclass(frozen=True)
class Workspace:
    """``handed``, ``own``: bytes of the two blocks. ``offsets``: of all sections, of which the first ``common`` lie in
    the block that is handed on.
    """

    handed: int
    own: int
    offsets: tuple[int, ...]
    common: int

    @staticmethod
    def of(x: Sequence[int], weights: Sequence[int], statistics: Sequence[int], shares: Shared) -> Workspace:
        """For sections of these sizes in bytes: what is made of x, of the weights, and of the output."""
        sizes = [-(-size // ALIGNMENT) * ALIGNMENT for size in (*x, *weights, *statistics)]
        common = {Shared.NOTHING: 0, Shared.ROWS: len(x), Shared.ALL: len(x) + len(weights)}[shares]
        (*first, handed), (*second, own) = (
            itertools.accumulate(some, initial=0) for some in (sizes[:common], sizes[common:])
        )
        return Workspace(handed, own, (*first, *second), common)

    def addresses(self, handed: int, own: int) -> list[int]:
        """Of the sections, for blocks at these addresses."""
        return [(handed if i < self.common else own) + at for i, at in enumerate(self.offsets)]
