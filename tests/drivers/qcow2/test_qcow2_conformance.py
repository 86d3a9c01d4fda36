"""The conformance suite over images of every kind, and QEMU's check of what it leaves."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
from host_storage import filesystem, loop_device, run, sparse
from qcow2_recipes import NAMED, RECIPES, THOROUGH, Recipe
from qcow2_walk import tool

from xbd.core.driver import BlockDevice, OpenContext, parse_options
from xbd.core.driver.open import DeviceMaker
from xbd.core.driver.registry import check_descriptor
from xbd.core.driver.testing import check_block_device
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import DRIVER

OPTIONS = (
    ("default", {"discard": "ignore"}),
    ("default", {"cache": "writeback"}),
    ("4k", {"cache": "none", "locking": "no"}),
    ("512", {"l2-cache-size": "1K"}),
    ("subclusters-over", {"cache": "writeback", "discard": "ignore"}),
    ("4k", {"compress": "yes"}),
)

FAST = ("default", "512", "subclusters-over", "zstd", "snapshots", "external-raw", "luks")
OTHERS = [recipe for recipe in RECIPES if recipe.name not in FAST]

pytestmark = pytest.mark.usefixtures("no_power_cuts")


def maker(path: Path, **options: str) -> DeviceMaker:
    parsed = parse_options(DRIVER.options, {"path": str(path), **options})

    @asynccontextmanager
    async def make(context: OpenContext) -> AsyncIterator[BlockDevice]:
        context = attrs.evolve(context, image_dirs=[path.parent])
        async with DRIVER.open(context, parsed) as device:
            yield device

    return make


def secret_options(recipe: Recipe, directory: Path) -> dict[str, str]:
    if not recipe.encrypted:
        return {}
    return {"key-file": str(directory / "key")}


async def conform(recipe: Recipe, directory: Path, **options: str) -> None:
    # The suite's time is in proportion to the clusters.
    size = min(recipe.size, max(64 * KIB, 2 * recipe.cluster_size))
    recipe = attrs.evolve(recipe, size=size, backing_size=recipe.backing_size * size // recipe.size)
    made = recipe.make(directory)
    options |= secret_options(recipe, directory)
    await check_block_device(
        maker(made.path, **options), concurrency=DRIVER.concurrency, examples=2
    )
    made.qemu_checks()


def test_descriptor() -> None:
    check_descriptor("qcow2", DRIVER)


@pytest.mark.parametrize("name", FAST)
async def test_image(tmp_path: Path, name: str) -> None:
    await conform(NAMED[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OTHERS, ids=str)
async def test_more_images(tmp_path: Path, recipe: Recipe) -> None:
    await conform(recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
async def test_options(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    await conform(NAMED[name], tmp_path, **options)


@pytest.mark.parametrize(
    ("sector", "cluster"), [(512, "64k"), *([(4096, "4k"), (4096, "512")] if THOROUGH else [])]
)
async def test_block_devices(tmp_path: Path, sector: int, cluster: str) -> None:
    """They do not grow, and nothing is known of what was on them."""
    options = f"cluster_size={cluster}"
    small, full = sparse(tmp_path / "small", 16 * MIB), sparse(tmp_path / "full", 3 * MIB)
    for path in (small, full):
        path.write_bytes(b"\x99" * path.stat().st_size)
    with loop_device(small, sector) as disk, loop_device(full, sector) as full_disk:
        for path, size in ((disk, "128k"), (full_disk, "16M")):
            tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
        await check_block_device(maker(disk), make_full=maker(full_disk), examples=1)
        for path in (disk, full_disk):
            tool("qemu-img", "check", "-q", "-f", "qcow2", path)


@pytest.mark.parametrize(
    ("kind", "cache"),
    [("ext4", "none"), ("tmpfs", "writeback"), *([("ext4", "writeback")] if THOROUGH else [])],
)
async def test_without_space(tmp_path: Path, kind: str, cache: str) -> None:
    with filesystem(kind, tmp_path) as place:
        image, large = tmp_path / "image", place / "large"
        for path, size in ((image, MIB), (large, 16 * MIB)):
            tool("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
        status = os.statvfs(place)
        filler = status.f_bavail * status.f_frsize - 2 * MIB
        run("fallocate", "--length", str(filler), place / "filler")
        await check_block_device(maker(image), make_full=maker(large, cache=cache), examples=1)
        (place / "filler").unlink()
        for path in (image, large):
            tool("qemu-img", "check", "-q", "-f", "qcow2", path)
