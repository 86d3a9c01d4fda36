"""The driver of docs/driver-authors.md, with more of the manual's methods."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from sample_packages import CHUNKS

MANUAL = Path(__file__).parents[2] / "docs" / "driver-authors.md"


def chunks_with(monkeypatch: pytest.MonkeyPatch, label: str, *methods: str) -> Any:
    """The driver's module; its device has the methods that the code behind ``<!-- label -->``
    defines."""
    monkeypatch.syspath_prepend(CHUNKS)
    monkeypatch.delitem(sys.modules, "xbd_driver_chunks", raising=False)
    import xbd_driver_chunks as chunks

    found = re.search(rf"<!-- {label} -->\n```python\n(.*?)```\n", MANUAL.read_text(), re.DOTALL)
    assert found
    names: dict[str, Any] = {"CHUNK": chunks.CHUNK}
    exec(found[1], names)
    for method in methods:
        monkeypatch.setattr(chunks.ChunkDevice, method, names[method], raising=False)
    return chunks
