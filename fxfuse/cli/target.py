"""The model that a user names, and inputs for it. Whatever goes wrong on the way is a :class:`UserError`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import inspect
import logging
import os
import pathlib
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.cli.arguments import default_device
from fxfuse.cli.errors import UserError, first_line
from fxfuse.compare import fresh
from fxfuse.kernels.compilation import cache
from fxfuse.patterns import Legality, Settings
from fxfuse.state import State

log = logging.getLogger(__name__)


def load(spec: str) -> nn.Module:
    """The module that ``package.module:factory`` or ``file.py:factory`` makes."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise UserError(f"{spec!r} does not name a model; write module:factory or file.py:factory")
    found: Any = _from_file(where) if where.endswith(".py") or os.sep in where else _imported(where)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{where} has no {name!r}{_instead(part, found)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UserError(f"{spec} is a {type(found).__name__}, neither a factory nor an nn.Module")
    return _made(spec, found)


def _made(spec: str, factory: Any) -> nn.Module:
    torch.manual_seed(0)
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        log.debug("%s failed", spec, exc_info=True)
        required = _required(factory)
        hint = f"; a factory takes no arguments, this one asks for {', '.join(required)}" if required else ""
        raise UserError(f"{spec} fails with {first_line(error)}{hint}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{spec} returns a {type(model).__name__}, not an nn.Module")
    return model


def _required(factory: Any) -> list[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in positional]


def _instead(name: str, holder: Any) -> str:
    """What the user may have meant."""
    own = [n for n, v in vars(holder).items() if callable(v) and not n.startswith("_")] if _has_dict(holder) else []
    close = difflib.get_close_matches(name, own, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _has_dict(holder: Any) -> bool:
    return isinstance(holder, (types.ModuleType, type))


def _imported(name: str) -> types.ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(f"there is no module {error.name!r} in {os.getcwd()} or on Python's path") from error
        raise _not_importable(name, error) from error
    except (Exception, SystemExit) as error:
        raise _not_importable(name, error) from error


def _from_file(text: str) -> types.ModuleType:
    path = pathlib.Path(text)
    if not path.is_file():
        raise UserError(f"there is no file {text}")
    if str(path.parent.resolve()) not in sys.path:  # what it imports lies beside it
        sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{text} is no Python file")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses, pickles and torch's exports look it up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if before is None:
            del sys.modules[path.stem]
        else:
            sys.modules[path.stem] = before
        raise _not_importable(text, error) from error
    return module


def _not_importable(name: str, error: BaseException) -> UserError:
    log.debug("importing %s failed", name, exc_info=True)
    return UserError(f"importing {name} fails with {first_line(error)}")


# --- inputs ---------------------------------------------------------------------------------------
def prepared(given: argparse.Namespace) -> tuple[nn.Module, list[Tensor]]:
    """The model of ``given`` on its device, in its dtype and mode, and random inputs on which it was seen to run."""
    check_environment()
    device = given.device or default_device()
    model = load(given.model)
    try:
        model = model.to(device, given.dtype).train(given.train)
        inputs = random_inputs(given.shape, given.dtype, device)
        run_once(model, inputs)
    except (Exception, SystemExit) as error:
        log.debug("the trial call failed", exc_info=True)
        shapes = " and ".join("x".join(map(str, s)) for s in given.shape)
        raise UserError(
            f"{given.model} does not run on {shapes} of {str(given.dtype).removeprefix('torch.')} on {device}: "
            f"{first_line(error)}"
        ) from error
    return model, inputs


def random_inputs(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Normally distributed inputs, the same ones every time."""
    torch.manual_seed(0)
    return [torch.randn(*s, dtype=dtype, device=device) for s in shapes]


def run_once(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """A call that leaves nothing behind."""
    with State(model, inputs).kept(), torch.no_grad():
        model(*fresh(inputs))


def check_environment() -> None:
    """Complain about environment variables now, not from within the compiler."""
    try:
        Settings.from_environment(Legality.parse(None))
        cache.current()
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
