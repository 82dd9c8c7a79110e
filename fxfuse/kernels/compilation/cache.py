"""Compiled kernels on disk: one folder per entry, published by a rename, checked when read.

``FXFUSE_CACHE_DIR`` names the folder (default: ``fxfuse`` under ``XDG_CACHE_HOME`` or ``~/.cache``),
``FXFUSE_CACHE_SIZE`` the most that it holds ("512M", "2G", bytes; default 1 GiB; 0 keeps nothing): the
entries that were used longest ago go first. A folder that cannot be written costs a warning, nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

_log = logging.getLogger(__name__)

#: part of every key and path: raise it when an entry's form or meaning changes
SCHEMA = 1
DEFAULT_SIZE = 1 << 30
#: what eviction leaves of the limit, so that it does not run at every entry
_LEAVE = 0.9
#: seconds after which what a killed process was writing is swept away
_ABANDONED = 3600.0
#: locks are files that are never deleted (deleting a lock races); keys share this many
_LOCKS = 256

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Stored:
    """What an entry holds: the cubin, the text it was made of, NVRTC's log, and words for whoever lists it."""

    code: bytes
    source: str
    log: str
    about: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry as listed: its key, bytes on disk, seconds since the epoch of its last use, and its words."""

    key: str
    size: int
    used: float
    about: dict[str, str]


class Cache:
    """A folder of compiled kernels, shared by any number of threads and processes."""

    def __init__(self, root: Path | None, limit: int = DEFAULT_SIZE) -> None:
        """``root`` None keeps nothing on disk; ``limit`` in bytes."""
        self.root = root
        self.limit = limit
        self._warned = False

    @property
    def folder(self) -> Path | None:
        """Where the entries lie; None without a folder."""
        return None if self.root is None else self.root / f"v{SCHEMA}"

    def load(self, key: str) -> Stored | None:
        """The entry, or None where it is absent, damaged or unreadable. Counts as a use."""
        if self.folder is None:
            return None
        place = self.folder / key
        try:
            facts = json.loads((place / "entry.json").read_bytes())
            code, source = (place / "kernel.cubin").read_bytes(), (place / "kernel.cu").read_bytes().decode()
            stored = Stored(code, source, facts["log"], facts["about"])
            if facts["checksum"] != _checksum(key, stored):
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        with contextlib.suppress(OSError):  # a cache that is only readable
            os.utime(place)
        return stored

    def get(self, key: str, make: Callable[[], Stored]) -> tuple[Stored, bool]:
        """The entry and True, or what ``make`` returns and False; one caller at a time makes it."""
        stored = self.load(key)
        if stored is not None:
            return stored, True
        with self._locked(key) as writable:
            stored = self.load(key) if writable else None  # another may have made it while this one waited
            if stored is not None:
                return stored, True
            stored = make()
            if writable:
                try:
                    self._publish(key, stored)
                except OSError as error:
                    self._warn(error)
        return stored, False

    def entries(self) -> list[Entry]:
        """Every entry, the one used last first."""
        found = []
        for place in self._places():
            try:
                used, size = place.stat().st_mtime, _size(place)
                about = json.loads((place / "entry.json").read_bytes())["about"]
            except OSError:
                continue  # evicted meanwhile
            except (ValueError, KeyError, TypeError):
                about = {"kernels": "(damaged)"}
            found.append(Entry(place.name, size, used, about))
        return sorted(found, key=lambda e: e.used, reverse=True)

    def clear(self) -> int:
        """Remove every entry; their number. Raises OSError where they cannot be removed."""
        places = list(self._places())
        for place in places:
            _remove(place)
        return len(places)

    def _publish(self, key: str, stored: Stored) -> None:
        if self.folder is None or self.limit <= 0:
            return
        place, draft = self.folder / key, self.folder / f".{key}-{uuid.uuid4().hex}"
        draft.mkdir(parents=True)
        try:
            (draft / "kernel.cubin").write_bytes(stored.code)
            (draft / "kernel.cu").write_bytes(stored.source.encode())
            facts = {"checksum": _checksum(key, stored), "log": stored.log, "about": stored.about}
            (draft / "entry.json").write_text(json.dumps(facts, indent=1), "utf-8")
            if place.exists():  # damaged
                _remove(place)
            draft.rename(place)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        self._evict(key)

    def _evict(self, newest: str) -> None:
        """Bring the folder under its limit. ``newest`` stays: its maker is about to be served from it."""
        if self.folder is None:
            return
        for left in self.folder.glob(".*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(left)
        entries = self.entries()
        total = sum(e.size for e in entries)
        if total <= self.limit:
            return
        for entry in reversed(entries):
            if total <= _LEAVE * self.limit:
                break
            if entry.key != newest:
                with contextlib.suppress(OSError):  # two processes may evict at once
                    _remove(self.folder / entry.key)
                total -= entry.size

    def _places(self) -> Iterator[Path]:
        if self.folder is not None and self.folder.is_dir():
            yield from (p for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[bool]:
        """Alone with this key, threads and processes alike; False where the folder takes no lock."""
        with contextlib.ExitStack() as stack:
            writable = False
            if self.root is not None and self.limit > 0:
                try:
                    locks = self.root / "locks"
                    locks.mkdir(parents=True, exist_ok=True)
                    slot = int(hashlib.sha256(key.encode()).hexdigest(), 16) % _LOCKS
                    stack.enter_context(filelock.FileLock(locks / f"{slot:02x}.lock"))
                    writable = True
                except (OSError, NotImplementedError) as error:
                    self._warn(error)
            yield writable

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "the kernel cache %s cannot be written (%s): kernels are compiled anew in every process; "
                "set FXFUSE_CACHE_DIR to a folder that can",
                self.root,
                error,
            )


def current() -> Cache:
    """The cache that the environment names now. Raises ValueError where FXFUSE_CACHE_SIZE is no size."""
    return _open(_root(), os.environ.get("FXFUSE_CACHE_SIZE", ""))


@functools.lru_cache(maxsize=64)
def _open(root: Path | None, limit: str) -> Cache:
    return Cache(root, parse_size(limit) if limit else DEFAULT_SIZE)


def _root() -> Path | None:
    named = os.environ.get("FXFUSE_CACHE_DIR")
    if named:
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the standard says to ignore a relative one
        return Path(base) / "fxfuse"
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "fxfuse" if os.path.isabs(home) else None


def parse_size(text: str) -> int:
    """Bytes of "1073741824", "512M", "1.5 GiB". Raises ValueError for anything else."""
    word = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = word[-1:] if word[-1:] in _UNITS else ""
    try:
        size = float(word.removesuffix(unit)) * _UNITS[unit]
        if size < 0:
            raise ValueError(size)
        return int(size)
    except (ValueError, OverflowError):
        raise ValueError(f'FXFUSE_CACHE_SIZE is "{text}": give bytes, or a number with K, M, G or T') from None


def _checksum(key: str, stored: Stored) -> str:
    """Over all that an entry holds, and its key: a folder that was renamed is damaged too."""
    digest = hashlib.sha256()
    about = json.dumps(stored.about, sort_keys=True)
    for part in (key.encode(), stored.code, stored.source.encode(), stored.log.encode(), about.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _size(place: Path) -> int:
    return sum(f.stat().st_size for f in place.iterdir())


def _remove(place: Path) -> None:
    """Gone at once for readers, then deleted."""
    trash = place.with_name(f".{place.name}-{uuid.uuid4().hex}")
    try:
        place.rename(trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash, ignore_errors=True)
