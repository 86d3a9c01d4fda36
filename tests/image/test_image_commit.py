"""``xbd image commit`` and ``rebase``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_world import Run

from xbd.core.units import MIB


@pytest.fixture
def overlay(image: Run, qemu: Run, place: Path) -> Path:
    """2 MiB of sevens over a flat image of 4 MiB of ones."""
    image("create", "imagefile:base", "4M")
    qemu("qemu-io", "-f", "raw", "-c", "write -P 1 0 4M", "base")
    image("create", "qcow2:top", "-b", "imagefile:base")
    qemu("qemu-io", "-c", "write -P 7 1M 2M", "top")
    return place / "top"


def test_commit(image: Run, qemu: Run, overlay: Path) -> None:
    told = image("commit", "qcow2:top")
    assert told == f"Committed qcow2:{overlay}: a disk of 4 MiB (4194304 bytes).\n"
    reads = ["-c", "read -P 1 0 1M", "-c", "read -P 7 1M 2M", "-c", "read -P 1 3M 1M"]
    qemu("qemu-io", "-f", "raw", *reads, "base")
    qemu("qemu-io", *reads, "top")
    checked = json.loads(qemu("qemu-img", "check", "--output=json", "top"))
    assert checked.get("allocated-clusters", 0) == 0


def test_rebase(image: Run, qemu: Run, overlay: Path, place: Path) -> None:
    image("convert", "imagefile:base", "qcow2:other")
    qemu("qemu-io", "-c", "write -P 9 0 64k", "other")
    told = json.loads(image("rebase", "--json", "qcow2:top", "-b", "qcow2:other"))
    assert told["backing-filename"] == "other"
    assert told["backing-filename-format"] == "qcow2"
    reads = ["-c", "read -P 1 0 1M", "-c", "read -P 7 1M 2M", "-c", "read -P 1 3M 1M"]
    qemu("qemu-io", *reads, "top")
    (place / "other").rename(place / "moved")
    image("rebase", "-u", "qcow2:top", "-b", "qcow2:moved")
    qemu("qemu-io", *reads, "top")
    image("rebase", "qcow2:top", "-b", "")
    (place / "moved").unlink()
    qemu("qemu-io", *reads, "top")
    assert "backing-filename" not in json.loads(image("info", "--json", "qcow2:top"))
    qemu("qemu-img", "check", "top")


def test_mistakes_are_a_line(image: Run, qemu: Run, overlay: Path, place: Path) -> None:
    image("create", "qcow2:alone", "1M")
    assert "alone" in image("commit", "qcow2:alone", code=2)
    assert "nowhere" in image("rebase", "qcow2:top", "-b", "qcow2:nowhere", code=1)
    (place / "base").unlink()
    assert "base" in image("commit", "qcow2:top", code=1)
    assert overlay.stat().st_size > 2 * MIB
