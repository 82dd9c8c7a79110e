"""Measured choices on disk: which way of running a region was the fastest for certain inputs on a certain GPU.

One JSON file per region, forms of its inputs, precision, device and versions, in ``choices`` beside the compiled
kernels (see :mod:`fxfuse.kernels.compilation.cache`; where that keeps nothing, a choice lasts as long as the process).
A file is read when a region is prepared, never in a later call. It is replaced as a whole, so that any number of
processes may write; one that is damaged, of another version or not of this form is ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfuse.kernels.compilation import cache
from fxfuse.region import Region
from fxfuse.version import digest

_log = logging.getLogger(__name__)

#: part of every path: raise it when the form or the meaning of a file changes
SCHEMA = 1
#: files that are kept; the ones used longest ago go first
MOST = 4096

#: what a choice was made for, in words: everything that its timings depend on
Identity = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The way that was the fastest, the one that the plan's estimate prefers, and seconds of a call of each."""

    chosen: str
    estimated: str
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        return ", ".join(f"{name} {s * 1e3:.3f} ms" for name, s in self.seconds.items())


def identity(region: Region, inputs: Sequence[Tensor], *, exact: bool, device: str) -> Identity:
    """What a choice for these inputs depends on. ``exact``: without TF32; ``device``: the name of the GPU."""
    cudnn = torch.backends.cudnn
    return {
        "region": dataclasses.replace(region, tune=False, precision=None).text,
        "inputs": [[list(t.shape), list(t.stride())] for t in inputs],
        "exact": exact,
        "device": device,
        "cudnn": [cudnn.version(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic],
        "torch": torch.__version__,
        "fxfuse": digest(),
    }


_memory: dict[str, Choice] = {}


def load(of: Identity) -> Choice | None:
    """The choice that was kept for ``of``, or None."""
    key = _key(of)
    found = _memory.get(key)
    if found is not None:
        return found
    folder = _folder()
    if folder is None:
        return None
    place = folder / f"{key}.json"
    try:
        found = _read(place.read_text("utf-8"), of)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    with contextlib.suppress(OSError):  # a folder that is only readable
        os.utime(place)
    _memory[key] = found
    return found


def save(of: Identity, choice: Choice) -> None:
    """Keep a choice: in this process at least, and on disk where that can be written."""
    key = _key(of)
    _memory[key] = choice
    folder = _folder()
    if folder is None:
        return
    facts = {"identity": of, "choice": dataclasses.asdict(choice)}
    draft = folder / f".{key}-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(json.dumps({**facts, "checksum": _checksum(facts)}, indent=1), "utf-8")
            draft.replace(folder / f"{key}.json")
        finally:
            draft.unlink(missing_ok=True)
        _evict(folder)
    except OSError as error:
        _warn(str(folder), str(error))


def forget() -> None:
    """Empty the memory of this process; what is on disk stays."""
    _memory.clear()


def clear() -> int:
    """Remove every choice, in memory and on disk; how many lay there. Raises OSError where they cannot be removed."""
    forget()
    places = list(_places())
    for place in places:
        place.unlink(missing_ok=True)
    return len(places)


def count() -> int:
    """How many choices lie on disk."""
    return sum(1 for _ in _places())


def _read(text: str, of: Identity) -> Choice:
    """Raises ValueError, KeyError or TypeError for anything that was not written for ``of`` by :func:`save`."""
    facts = json.loads(text)
    checksum = facts.pop("checksum")
    if checksum != _checksum(facts) or facts["identity"] != of:
        raise ValueError("damaged, or of something else")
    choice = Choice(**facts["choice"])
    if choice.chosen not in choice.seconds or not all(math.isfinite(s) for s in choice.seconds.values()):
        raise ValueError("not a choice")
    return choice


def _key(of: Identity) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:40]


def _checksum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _folder() -> Path | None:
    kernels = cache.current()
    return None if kernels.root is None or kernels.limit <= 0 else kernels.root / "choices" / f"v{SCHEMA}"


def _places() -> Iterator[Path]:
    folder = _folder()
    if folder is not None and folder.is_dir():
        yield from (p for p in folder.iterdir() if p.suffix == ".json")


def _evict(folder: Path) -> None:
    places = list(_places())
    if len(places) <= MOST:
        return
    used = {}
    for place in places:
        with contextlib.suppress(OSError):  # another process may evict as well
            used[place] = place.stat().st_mtime
    for place in sorted(used, key=lambda p: used[p])[: len(used) - MOST]:
        with contextlib.suppress(OSError):
            place.unlink()


@functools.cache
def _warn(folder: str, error: str) -> None:
    _log.warning(
        "measured choices cannot be kept in %s (%s): they last as long as this process; set FXFUSE_CACHE_DIR to a "
        "folder that can be written",
        folder,
        error,
    )
