"""What fxfuse runs on: versions, devices, and what is missing for kernels of its own."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import torch

from fxfuse.version import __version__

#: distributions that the generated kernels need, and the one that newer CUDA wheels call NVRTC's
_KERNELS = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")
_NVRTC = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")
#: the oldest GPUs that kernels are compiled for (Ampere), and those that the convolution's kernel needs (Hopper)
LEAST_CAPABILITY, CONVOLUTION_CAPABILITY = (8, 0), (9, 0)


def versions() -> dict[str, str | None]:
    """Versions of what takes part; None for what is not installed."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    found: dict[str, str | None] = {
        "fxfuse": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA (torch's)": torch.version.cuda,
        "cuDNN (torch's)": None if cudnn is None else str(cudnn),
    }
    found.update((name, _installed(name)) for name in _KERNELS)
    found["nvidia-cuda-nvrtc"] = next(filter(None, map(_installed, _NVRTC)), None)
    return found


@functools.cache
def build() -> str:
    """Twelve hexadecimal digits of this package's source: versions stay the same while an engine is worked on."""
    root, digest = pathlib.Path(__file__).parent, hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cuh")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    """The CPU and every GPU, each in a line."""
    threads = torch.get_num_threads()
    found = [f"cpu: {processor()}, {threads} thread{'' if threads == 1 else 's'}"]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {facts.name}, capability {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
        )
    return found


def missing() -> list[str]:
    """What keeps generated kernels from running, each as a sentence with the remedy."""
    found = []
    absent = [name for name, version in versions().items() if name in _KERNELS and version is None]
    if absent:
        found.append(f'not installed: {", ".join(absent)}; get it with: pip install "fxfuse[cuda]"')
    if torch.version.cuda is None:
        found.append(
            f"torch {torch.__version__} is built without CUDA: models run through torch's operators on the CPU; "
            "https://pytorch.org/get-started has builds with CUDA"
        )
    elif not torch.cuda.is_available():
        found.append("torch finds no GPU: is there one, and its driver? `nvidia-smi` tells")
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < LEAST_CAPABILITY:
            found.append(f"cuda:{index} is older than Ampere: no kernels are compiled for it")
        elif capability != CONVOLUTION_CAPABILITY:
            found.append(
                f"cuda:{index} is no Hopper GPU: convolutions run through cuDNN, what is behind them in kernels"
            )
    if os.environ.get("FXFUSE_KERNELS") == "0":
        found.append("FXFUSE_KERNELS=0 switches the generated kernels off")
    return found


def variables() -> dict[str, str]:
    """The environment variables that are meant for fxfuse."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("FXFUSE_")}


def described(device: torch.device) -> dict[str, Any]:
    """Facts to keep beside results that were measured on ``device``."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "torch": torch.__version__,
        "fxfuse": __version__,
    }
    if device.type == "cuda":
        return {**found, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {**found, "threads": torch.get_num_threads(), "python": platform.python_version()}


def processor() -> str:
    """The processor's name, as far as the system tells."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
