"""What holds for every test: a seeded torch, and no defect that the compiler swallows and logs."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from unittest import mock

import hypothesis
import pytest
import torch

from fxfuse.kernels.account import account
from fxfuse.kernels.plan import Path

with contextlib.suppress(ImportError):  # it loads a hypothesis profile of its own, when torch's test tools import it
    importlib.import_module("torch.testing._internal.common_utils")

hypothesis.settings.register_profile(
    "fxfuse", deadline=None, derandomize=True, max_examples=50, suppress_health_check=list(hypothesis.HealthCheck)
)
#: for a longer search by hand: pytest --hypothesis-profile=deep
hypothesis.settings.register_profile(
    "deep", deadline=None, max_examples=1000, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("fxfuse")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
        torch.set_num_threads(1)
    config.addinivalue_line("markers", "defective: the test makes a defect on purpose")


class _Defects(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "is defective" in record.getMessage() or "please report" in record.getMessage():
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_defects(request: pytest.FixtureRequest) -> Iterator[None]:
    """The compiler swallows its own failures and logs them: here they fail the test."""
    torch.manual_seed(0)
    handler, log = _Defects(), logging.getLogger("fxfuse")
    log.addHandler(handler)
    yield
    log.removeHandler(handler)
    if request.node.get_closest_marker("defective") is None:
        assert not handler.messages


@pytest.fixture(autouse=True)
def no_patches_left() -> Iterator[None]:
    """A test leaves the compiler as it found it, and does not find what another one's patches made of a region."""
    account.cache_clear()
    before = {name: dict(vars(sys.modules[name])) for name in _own_modules()}
    yield
    left = [
        f"{name}.{key}"
        for name in _own_modules()
        for key, value in before.get(name, {}).items()
        if not key.startswith("__") and getattr(sys.modules[name], key, None) is not value  # Dynamo's own begin so
    ]
    assert not left, f"patches are left: {left}"


@pytest.fixture(autouse=True)
def rewritten_chains(no_patches_left: None) -> Iterator[None]:
    """Torch's operators run what rules have made, of tensors as small as those of tests, too."""
    with mock.patch("fxfuse.ops.by_torch", return_value=Path.REWRITTEN):
        yield


def _own_modules() -> list[str]:
    return [n for n in sys.modules if n.partition(".")[0] == "fxfuse"]
