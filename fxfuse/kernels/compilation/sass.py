"""The machine code of a cubin as text, for tests that look for an instruction."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from fxfuse.kernels.compilation.jit import Cubin, MissingPackage


def sass(cubin: Cubin, kernel: str | None = None) -> str:
    """The SASS of all kernels, or of one. Raises KeyError for a kernel that is not there, MissingPackage without
    nvdisasm, RuntimeError where it fails."""
    text = _disassemble(cubin.code)
    if kernel is None:
        return text
    parts = re.split(r"^//-+ \.text\.(\S+) +-+$", text, flags=re.MULTILINE)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    if kernel not in bodies:
        raise KeyError(f"no kernel {kernel}; there are {', '.join(bodies) or 'none'}")
    return bodies[kernel]


@functools.lru_cache(maxsize=8)
def _disassemble(code: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(code)
        done = subprocess.run([_nvdisasm(), "-c", str(file)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def _nvdisasm() -> str:
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.stem == "nvdisasm":
            return str(file.locate())
    found = shutil.which("nvdisasm")
    if found is None:
        raise MissingPackage("reading machine code needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return found
