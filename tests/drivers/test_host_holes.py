"""Image files tell of their holes; devices, of which the kernel says nothing, are all data."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from host_storage import buffer, open_device, sparse

from xbd.core.driver import BlockStatus, Extent, MediaError
from xbd.core.units import KIB, MIB
from xbd.drivers.imagefile import DRIVER


def hole(length: int) -> BlockStatus:
    return BlockStatus(length=length, hole=True, zero=True)


def data(length: int) -> BlockStatus:
    return BlockStatus(length=length, hole=False, zero=False)


@pytest.mark.parametrize("options", [{}, {"cache": "writeback"}])
async def test_holes_of_an_image(tmp_path: Path, options: dict[str, str]) -> None:
    image = sparse(tmp_path / "image", 4 * MIB)
    async with open_device(DRIVER, image, **options) as device:
        assert await device.block_status(0, 4 * MIB) == [hole(4 * MIB)]
        await device.writev(MIB, [buffer(b"x" * 64 * KIB)])
        told = await device.block_status(512 * KIB, MIB)
        assert told == [hole(512 * KIB), data(64 * KIB), hole(448 * KIB)]
        await device.discard([Extent(offset=MIB, length=64 * KIB)])
        assert await device.block_status(0, 4 * MIB) == [hole(4 * MIB)]


async def test_an_image_that_was_cut_off_has_no_zeroes_there(tmp_path: Path) -> None:
    image = sparse(tmp_path / "image", 4 * MIB)
    async with open_device(DRIVER, image) as device:
        os.truncate(image, 2 * MIB)
        assert await device.block_status(2 * MIB, MIB) == [data(MIB)]
        assert await device.block_status(MIB, 2 * MIB) == [hole(MIB)]


async def test_a_failing_look_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = sparse(tmp_path / "image", 4 * MIB)

    def fail(*_: int) -> int:
        raise OSError(errno.EIO, "bad")

    async with open_device(DRIVER, image) as device:
        with monkeypatch.context() as patch:
            patch.setattr(os, "lseek", fail)
            with pytest.raises(MediaError, match="look for holes in"):
                await device.block_status(0, MIB)
