"""qcow2 images to measure with, made and checked by QEMU's own tools."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

from harness.guest import RunFailed

CLUSTER = 64 << 10
"""qemu-img's default."""
TOOLS = ("qemu-img", "qemu-io", "qemu-nbd")


def missing_tools() -> list[str]:
    """Those of QEMU's that are not installed."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def empty(path: Path, size: int) -> None:
    """An image without any data."""
    _run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)])


def overlay(path: Path, base: Path) -> None:
    """An image with nothing but a backing file, in qcow2 as well."""
    _run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(path)])


def compressed(path: Path, content: Path) -> None:
    """An image of compressed clusters."""
    _run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(content), str(path)])


def allocated(path: Path, content: Path) -> None:
    """An image whose clusters lie in any order, as in one that a guest has filled."""
    size = content.stat().st_size
    empty(path, size)
    offsets = list(range(0, size, CLUSTER))
    random.Random(size).shuffle(offsets)
    commands = "".join(f"write -q {offset} {CLUSTER}\n" for offset in offsets)
    _run(["qemu-io", "-f", "qcow2", "-t", "unsafe", str(path)], commands)
    _run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(content), str(path)])


def check(path: Path) -> None:
    """Raises `RunFailed` if an image is corrupt or has leaked clusters."""
    _run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)])


def _run(command: list[str], commands: str | None = None) -> None:
    done = subprocess.run(command, input=commands, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise RunFailed(f"{' '.join(command)} failed ({done.returncode}): {said}")
