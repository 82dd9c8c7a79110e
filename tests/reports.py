"""Reports of models at their real sizes, without the memory: captured and compiled on fake tensors. And their text."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse.capture import CallForm, symbolic_trace
from fxfuse.pipeline import Options, fuse
from fxfuse.report import Report


def explained(
    model: nn.Module, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, precision: str | None = None
) -> Report:
    """What ``fxfuse.explain`` says of ``model`` for inputs of these shapes; nothing is run."""
    model = model.to(dtype)
    form, _ = CallForm.of(tuple(torch.zeros(1) for _ in shapes), {})
    capture = symbolic_trace(model, form)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [torch.empty(shape, dtype=dtype) for shape in shapes]
        inputs += [mode.from_tensor(lifted.fetch()) for lifted in capture.lifted]
    for node in capture.graph.find_nodes(op="placeholder")[len(shapes) :]:
        node.meta["fxfuse_lifted"] = True
    report = fuse(capture.graph, capture.modules, inputs, Options.make(precision, None))
    report.model = type(model).__name__
    return report


def without_estimates(text: str) -> str:
    """``text`` with "_" for every time that the cost model gives: these change whenever it is tuned."""
    return re.sub(r"\d[\d.]* (?:s|ms|us)(?=\s+(?:est\.|at\s+best|by\s+estimate|with\s+(?:one|two|stat)))", "_", text)
