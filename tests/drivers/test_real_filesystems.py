"""Images on real filesystems, full ones too."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_storage import (
    FILESYSTEMS,
    buffer,
    compare_with_model,
    filesystem,
    loop_device,
    mounted,
    need,
    open_device,
    read_with_qemu,
    run,
    sparse,
)

from xbd.core.driver import BlockDevice, Capability, DiskSpec, DriverError, NoSpace, open_with
from xbd.core.units import MIB
from xbd.drivers.imagefile import DRIVER

SIZE = 2 * MIB


@pytest.fixture(params=FILESYSTEMS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with filesystem(request.param, tmp_path) as path:
        yield path


@pytest.mark.slow
async def test_random_work_agrees_with_a_model_and_with_qemu(place: Path) -> None:
    for options in ({}, {"cache": "writeback"}, {"discard": "ignore"}, {"sector-size": "4096"}):
        image = sparse(place / "image", SIZE)
        spec = DiskSpec("imagefile", str(image), options)
        model = bytearray(SIZE)
        async with open_with(DRIVER, spec, device_id="xbdback1i2", writable=True) as access:
            await compare_with_model(access, model, random.Random(str(options)), 60)
        assert read_with_qemu(image, SIZE) == model


async def write_until_full(device: BlockDevice, piece: memoryview) -> int:
    written = 0
    try:
        while True:
            await device.writev(written, [piece])
            written += len(piece)
    except NoSpace:
        return written


@pytest.mark.parametrize("cache", ["none", "writeback"])
async def test_a_full_filesystem_harms_nothing_and_the_disk_lives_on(
    place: Path, cache: str
) -> None:
    total = os.statvfs(place).f_frsize * os.statvfs(place).f_blocks
    if total > 64 * MIB:
        filler = place / "filler"
        run("fallocate", "--length", str(total - 96 * MIB), filler)
    image = sparse(place / "image", 4 * total)
    piece = buffer(b"x" * MIB)
    async with open_device(DRIVER, image, cache=cache) as device:
        written = await write_until_full(device, piece)
        assert written >= MIB
        with pytest.raises(NoSpace) as caught:
            await device.writev(2 * total, [piece])
        assert caught.value.errno == errno.ENOSPC
        there = buffer(MIB)
        await device.readv(written - MIB, [there])
        assert there == piece
        await device.writev(0, [buffer(b"y" * 4096)])  # has its space already
        await device.flush()
        if Capability.DISCARD in device.capabilities:
            await device.write_zeroes(0, written, may_unmap=True)
            await device.flush()
            await device.writev(2 * total, [piece])
            await device.flush()
            await device.readv(2 * total, [there])
            assert there == piece
    image.unlink()


async def test_an_image_whose_filesystem_became_read_only(tmp_path: Path) -> None:
    need("mkfs.ext4")
    backing = sparse(tmp_path / "backing", 16 * MIB)
    run("mkfs.ext4", "-q", backing)
    with loop_device(backing) as loop:
        with mounted(loop, tmp_path / "mount") as place:
            sparse(place / "image", SIZE)
        with mounted(loop, tmp_path / "mount", "-o", "ro") as place:
            with pytest.raises(DriverError, match=r"errno 30, EROFS.*read-only"):
                async with open_device(DRIVER, place / "image"):
                    pass
            async with open_device(DRIVER, place / "image", writable=False) as device:
                await device.readv(0, [buffer(512)])


async def test_large_sectors_below_an_image(tmp_path: Path) -> None:
    need("mkfs.ext4")
    backing = sparse(tmp_path / "backing", 32 * MIB)
    with loop_device(backing, 4096) as loop:
        run("mkfs.ext4", "-q", loop)
        with mounted(loop, tmp_path / "mount") as place:
            image = sparse(place / "image", SIZE + 512)
            spec = DiskSpec("imagefile", str(image), {"cache": "none"})
            model = bytearray(SIZE + 512)
            async with open_with(DRIVER, spec, device_id="xbdback1i2", writable=True) as access:
                assert access.geometry.logical_block == 512
                assert access.geometry.request_alignment == 4096
                assert access.geometry.physical_block == 4096
                await compare_with_model(access, model, random.Random(3), 80)
            assert read_with_qemu(image, len(model)) == model
