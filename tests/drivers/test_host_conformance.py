"""The conformance suite over image files and block devices, with every option that matters."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from host_storage import filesystem, loop_device, mounted, need, run, sparse

from xbd.core.driver import (
    BlockDevice,
    DriverDescriptor,
    Geometry,
    OpenContext,
    parse_options,
)
from xbd.core.driver.open import DeviceMaker
from xbd.core.driver.testing import check_block_device, check_driver
from xbd.core.driver.testing.wrapper import Wrapper
from xbd.core.units import MIB
from xbd.drivers import imagefile, raw

IMAGEFILE_OPTIONS = [
    "",
    "?cache=none",
    "?cache=writeback",
    "?discard=ignore",
    "?sector-size=4096",
    "?cache=writeback&sector-size=4096&discard=ignore&locking=no",
]
RAW_OPTIONS = ["", "?cache=writeback", "?discard=ignore", "?sector-size=512", "?sector-size=4096"]
EXAMPLES = 6


def maker(driver: DriverDescriptor[Any], path: Path, **options: str) -> DeviceMaker:
    parsed = parse_options(driver.options, {"path": str(path), **options})
    return lambda context: driver.open(context, parsed)


@pytest.mark.parametrize("options", IMAGEFILE_OPTIONS)
async def test_imagefile(tmp_path: Path, options: str) -> None:
    image = sparse(tmp_path / "image", MIB)
    await check_driver(imagefile.DRIVER, f"imagefile:{image}{options}", examples=EXAMPLES)


@pytest.mark.parametrize("kind", ["ext4", "ext4-1k", "xfs", "tmpfs"])
async def test_imagefile_on_filesystems(tmp_path: Path, kind: str) -> None:
    with filesystem(kind, tmp_path) as place:
        disk = f"imagefile:{sparse(place / 'image', MIB)}"
        await check_driver(imagefile.DRIVER, disk, examples=EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("size", [MIB, MIB + 512])
async def test_imagefile_above_large_sectors(tmp_path: Path, size: int) -> None:
    need("mkfs.ext4")
    with loop_device(sparse(tmp_path / "backing", 16 * MIB), 4096) as loop:
        run("mkfs.ext4", "-q", loop)
        with mounted(loop, tmp_path / "mount") as place:
            disk = f"imagefile:{sparse(place / 'image', size)}?cache=none"
            await check_driver(imagefile.DRIVER, disk, examples=EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
async def test_imagefile_without_space(tmp_path: Path, kind: str, cache: str) -> None:
    with filesystem(kind, tmp_path) as place:
        status = os.statvfs(place)
        filler = status.f_bavail * status.f_frsize - 2 * MIB
        run("fallocate", "--length", str(filler), place / "filler")
        image = sparse(tmp_path / "image", MIB)
        large = sparse(place / "large", 16 * MIB)
        await check_block_device(
            maker(imagefile.DRIVER, image, cache=cache),
            make_full=maker(imagefile.DRIVER, large, cache=cache),
            examples=1,
        )


class Extended(Wrapper):
    """A loop device whose administrator extends it before resizing the disk."""

    def __init__(self, inner: BlockDevice, loop: Path, backing: Path) -> None:
        super().__init__(inner)
        self.loop = loop
        self.backing = backing

    async def resize(self, size: int) -> Geometry:
        if size > self.geometry.size:
            os.truncate(self.backing, size)
            run("losetup", "--set-capacity", self.loop)
        return await self.inner.resize(size)


@pytest.mark.slow
@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("options", RAW_OPTIONS)
async def test_raw(tmp_path: Path, sector: int, options: str) -> None:
    backing = sparse(tmp_path / "backing", MIB)
    texts = dict(pair.split("=") for pair in options[1:].split("&") if pair)
    with loop_device(backing, sector) as loop:
        make = maker(raw.DRIVER, loop, **texts)

        @asynccontextmanager
        async def extended(context: OpenContext) -> AsyncIterator[BlockDevice]:
            async with make(context) as device:
                yield Extended(device, loop, backing)

        await check_block_device(extended, examples=EXAMPLES)
