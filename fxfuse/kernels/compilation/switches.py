"""Environment variables that are looked at on every call, which may switch something off while a program runs."""

from __future__ import annotations

import os
from typing import Any

#: of os.environ, with keys and values as it encodes them: its get() takes a microsecond where a variable is not set
environment: Any = getattr(os.environ, "_data", None)


def encoded(name: str, value: str) -> tuple[Any, Any]:
    """A variable's name and a value of it, as they are in :data:`environment`."""
    if environment is os.environ:
        return name, value
    return os.environ.encodekey(name), os.environ.encodevalue(value)


if environment is None:
    environment = os.environ
