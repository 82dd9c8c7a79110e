"""Every example runs as it stands, the notebook's cells included."""

from __future__ import annotations

import json
import pathlib
import runpy
import sys

import pytest
import torch

from fxfuse import dynamo

FOLDER = pathlib.Path(__file__).parent.parent / "examples"

#: what each example prints, among other things
PRINTS = {
    "compile_backend": "largest difference from eager mode",
    "exporting": "operators of the exported program: fxfuse.region.default, ",
    "one_call": "Sequential: 1 region of 5 operators, 3 rewrites",
    "own_rule": "UseSilu: x * sigmoid(x) = silu(x)",
    "reading_a_report": "it ends at cat: torch.cat is not in the vocabulary",
    "training": "parameters and running statistics equal eager mode's",
}


@pytest.fixture(autouse=True)
def by_name() -> None:
    """The backend's name, where the distribution and its entry points are not installed."""
    if "fxfuse" not in torch._dynamo.list_backends(None):
        torch._dynamo.register_backend(dynamo.backend, "fxfuse")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.stem)
def test_example(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capfd.readouterr().out
    assert PRINTS[path.stem] in printed
    if path.stem == "exporting":
        assert "a fresh process runs the exported program" in printed


def test_notebook() -> None:
    """Its cells, one after the other in one namespace; no outputs are committed, which would go stale."""
    notebook = json.loads((FOLDER / "notebook.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 4 and not any(cell["outputs"] for cell in cells)
    namespace: dict[str, object] = {}
    for number, cell in enumerate(cells, 1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)  # noqa: S102 - that is the test
    assert "fast" in namespace
