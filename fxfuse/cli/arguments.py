"""Arguments that several commands share, each checked before any work begins."""

from __future__ import annotations

import argparse
import pathlib
import re
from typing import Any

import torch

DTYPES = ("float32", "float16", "bfloat16", "float64")


def shape(text: str) -> tuple[int, ...]:
    """``2x16x8x16x16`` as a tuple of sizes."""
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write sizes with x between them: 2x16x8x16x16")
    sizes = tuple(map(int, text.split("x")))
    if 0 in sizes:
        raise argparse.ArgumentTypeError(f"{text!r} has a size of 0; all sizes must be 1 or more")
    return sizes


def dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DTYPES)}")
    return getattr(torch, text)  # type: ignore[no-any-return]


def device(text: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``; refuses one that is not there."""
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda, cuda:1, ...")
    if text == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} {why}; leave --device out to use the CPU")
    index, count = int(match[1] or torch.cuda.current_device()), torch.cuda.device_count()
    if index >= count:
        raise argparse.ArgumentTypeError(f"there is no {text}; GPUs here are cuda:0 to cuda:{count - 1}")
    return torch.device(f"cuda:{index}")


def default_device() -> torch.device:
    return device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def output_path(text: str) -> pathlib.Path:
    """A file that can be written: asked before minutes of work, not after."""
    path = pathlib.Path(text)
    folder = path.parent
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text}: there is no folder {folder}")
    there = path.exists()
    try:
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from error
    return path


def add_model(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The model and its inputs."""
    model: dict[str, Any] = {"nargs": "?"} if optional else {}
    parser.add_argument(
        "model",
        metavar="module:factory",
        help="where the model is: package.module:factory or file.py:factory; the factory is a function or class "
        "that is called without arguments, or a module itself",
        **model,
    )
    parser.add_argument(
        "--shape",
        type=shape,
        action="append",
        required=not optional,
        help="shape of an input, such as 2x16x8x16x16; once per input, in order",
    )
    add_numerics(parser)


def add_numerics(parser: argparse.ArgumentParser) -> None:
    """Where and in which dtype and mode a model runs."""
    parser.add_argument("--dtype", type=dtype, default=torch.float32, help=f"{', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--train", action="store_true", help="in train mode (default: eval mode)")
