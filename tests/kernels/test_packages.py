"""The folders of ``fxfuse/kernels`` are steps of one way: imports point to those in front."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from fxfuse import kernels

ROOT = Path(kernels.__file__).parent
#: in the order of the package's docstring; modules beside the folders may import all of them, and are imported by none
ORDER = ("compilation", "codegen", "convolution", "stages", "planning", "runtime")
#: what a program costs by shapes alone needs no other module of these
FREE = {"cost"}


def imported(path: Path) -> Iterator[str]:
    """Names below ``fxfuse.kernels`` that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            names = [f"{node.module}.{a.name}" for a in node.names]
        yield from (n.removeprefix("fxfuse.kernels.") for n in names if n.startswith("fxfuse.kernels."))


def test_imports_point_to_folders_in_front() -> None:
    folders = {p.name for p in ROOT.iterdir() if (p / "__init__.py").exists()}
    assert folders == set(ORDER)
    found = 0
    for place, folder in enumerate(ORDER):
        allowed = {*ORDER[: place + 1], *FREE}
        for path in (ROOT / folder).glob("*.py"):
            targets = [name.split(".")[0] for name in imported(path)]
            assert set(targets) <= allowed, (path.name, set(targets) - allowed)
            found += len(targets)
    assert found > 500 and not [n for name in FREE for n in imported(ROOT / f"{name}.py")]


def test_every_folder_and_its_order_are_told() -> None:
    assert kernels.__doc__ is not None
    told = [kernels.__doc__.index(f"`{name}`") for name in ORDER]
    assert told == sorted(told)
