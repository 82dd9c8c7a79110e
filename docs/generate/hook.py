"""MkDocs hook: what docstrings say in Sphinx's words, in plain ones."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Of ``:class:`~fxfuse.Report``` the name is left."""
    return re.sub(r":(?:class|func|meth|data|mod):<code>~?", "<code>", html)
