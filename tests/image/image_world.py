"""What the tests of the image commands share."""

from __future__ import annotations

from collections.abc import Callable

Run = Callable[..., str]
"""``run("info", "qcow2:a")``: what a command prints."""
