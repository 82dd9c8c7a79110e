"""``FXFUSE_DUMP=dir``: the plan and the CUDA C++ of every region, one folder each, for a person to read.

A folder holds ``region.txt`` (the chain as the model wrote it, and rewritten), ``plan.txt`` (what runs, step by
step, and what every kernel takes) and one ``.cu`` file per source, numbered in the order in which they run. Its
name tells the operators, the dtype and the sizes of the first input, and ends in a digest of all that
the plan depends on: the same in every process. Folders appear whole, by a rename. A folder that cannot be written
costs a warning, nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fxfuse.instr import DTYPE_NAMES
from fxfuse.kernels.compilation.jit import HEADERS, compile_cubin
from fxfuse.region import Region

_log = logging.getLogger(__name__)

#: characters that the operators take of a folder's name
_OPERATORS = 80
#: renames before other processes that write the same folder win
_ATTEMPTS = 10


def wanted() -> bool:
    """Whether ``FXFUSE_DUMP`` names a folder."""
    return bool(os.environ.get("FXFUSE_DUMP"))


class Plan(Protocol):
    """What runs; ``str()`` tells the steps, divided by "; "."""

    def sources(self) -> Sequence[tuple[str, str]]:
        """The name and the CUDA C++ of each of its kernels."""


def write(
    region: Region, strides: Sequence[Sequence[int]], device: str, plan: Callable[[], Plan], arch: str | None = None
) -> None:
    """Write a region's folder; one warning where that fails.

    Args:
        strides: of the inputs, in elements.
        device: what it was planned for, in words.
        plan: makes what there is to write.
        arch: what the kernels were compiled for ("sm_90a"); None where they were not.
    """
    root = Path(os.environ["FXFUSE_DUMP"]).expanduser()
    try:
        _publish(root / _name(region, strides, device), _files(region, strides, device, plan(), arch))
    except OSError as error:
        _warn(str(root), f"nothing is written to {root} ({error}); name a folder that can be written")
    except Exception as error:  # noqa: BLE001 - the model has to run
        told = f"{type(error).__name__}: {error}"
        _warn(told, f"a region has no folder (please report): {told}")


def _files(
    region: Region, strides: Sequence[Sequence[int]], device: str, plan: Plan, arch: str | None
) -> dict[str, str]:
    sources = {f"{i}-{name}.cu": text for i, (name, text) in enumerate(plan.sources(), 1)}
    lines = [f"for {device}", "", *(f"  {step}" for step in str(plan).split("; ")), "", "inputs"]
    kinds = region.rewritten.inputs
    lines += [f"  {name}: {kind}, strides {tuple(s)}" for (name, kind), s in zip(kinds, strides, strict=True)]
    if sources:
        lines += ["", "kernels", *(f"  {name}{_resources(text, arch)}" for name, text in sources.items())]
        lines += [f"  headers are in {HEADERS}"]
    return {"region.txt": str(region), "plan.txt": "\n".join([*lines, ""]), **sources}


def _name(region: Region, strides: Sequence[Sequence[int]], device: str) -> str:
    operators = "-".join(i.op for i in region.original.body)[:_OPERATORS].strip("-_")
    first = region.rewritten.inputs[0][1]
    sizes = "x".join("_" if s is None else str(s) for s in first.shape)
    told = repr((region.text, [tuple(s) for s in strides], device))
    return f"{operators}-{DTYPE_NAMES[first.dtype]}-{sizes}-{hashlib.sha256(told.encode()).hexdigest()[:10]}"


def _resources(source: str, arch: str | None) -> str:
    """What the kernels of a compiled source take."""
    if arch is None:
        return ""
    cubin = compile_cubin(source, arch)  # from memory: it has just been loaded
    told = [f": {arch}, cubin {cubin.key}"]
    for name, r in cubin.kernels.items():
        spills = f", {r.spills} bytes of spills" if r.spills else ""
        told.append(f"    {name}: {r.registers} registers, {r.shared} bytes of static shared memory{spills}")
    return "\n".join(told)


def _publish(place: Path, files: Mapping[str, str]) -> None:
    if _same(place, files):
        return
    draft = place.with_name(f".{place.name}-{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        for name, text in files.items():
            (draft / name).write_text(text, "utf-8")
        for _ in range(_ATTEMPTS):
            try:
                draft.rename(place)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if _same(place, files):  # another process was faster
                return
            old = draft.with_name(f"{draft.name}-old")  # of another version, or from before a measurement
            with contextlib.suppress(FileNotFoundError):
                place.rename(old)
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _same(place: Path, files: Mapping[str, str]) -> bool:
    try:
        there = {f.name: f.read_text("utf-8") for f in place.iterdir()}
    except (OSError, UnicodeDecodeError):
        return False
    return there == files


def _warn(about: str, message: str) -> None:
    """Once for everything that it is about."""
    if about not in _warned:
        _warned.add(about)
        _log.warning("FXFUSE_DUMP: %s", message)


_warned: set[str] = set()
