"""The fuzzer's images, for tests."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "fuzz"))

from fuzz_qcow2 import Fuzzer
from qcow2_images import RECIPES, SECRET, Field, Seed, Seeds, damage, interesting, run
from qcow2_ordeal import Find, Ordeal, limited, no_power_cuts

__all__ = [
    "NAMES",
    "RECIPES",
    "SECRET",
    "Field",
    "Find",
    "Fuzzer",
    "Ordeal",
    "Seed",
    "Seeds",
    "damage",
    "image",
    "interesting",
    "limited",
    "no_power_cuts",
    "qemu_check",
    "qemu_reads",
    "run",
    "seeds",
]

NAMES = [recipe.name for recipe in RECIPES]

_made: dict[Path, Seeds] = {}


@pytest.fixture
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    """Made once for all tests, which work on copies."""
    if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
        pytest.skip("needs qemu-img and qemu-io")
    base = tmp_path_factory.getbasetemp()
    if base not in _made:
        directory = base / "qcow2-seeds"
        directory.mkdir()
        _made[base] = Seeds(directory)
    return _made[base]


@pytest.fixture
def image(seeds: Seeds, tmp_path: Path, name: str) -> Seed:
    """A copy of the image that the test's parameter `name` names."""
    return seeds.copy(name, tmp_path / "image")


def qemu_check(seed: Seed, repair: str | None = None) -> dict[str, Any] | None:
    """What qemu-img finds; None: it can't open the image."""
    command = ["qemu-img", "check", "--output=json", *SECRET]
    if repair:
        command += ["-r", repair]
    told = run(*command, "--image-opts", seed.options, good=False).stdout
    if "{" not in told:
        return None
    found: dict[str, Any] = json.loads(told[told.index("{") :])
    return found


def qemu_reads(seed: Seed, target: Path) -> bytes:
    """The disk as QEMU sees it."""
    run(
        *("qemu-img", "convert", *SECRET, "--image-opts", "-O", "raw"),
        *("-t", "unsafe", seed.options, target),
    )
    return target.read_bytes()
