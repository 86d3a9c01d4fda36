"""Host block devices, on loop devices with sectors of 512 and of 4096 bytes."""

# ruff: noqa: ASYNC240 - looking at files from tests may block

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_storage import (
    buffer,
    compare_with_model,
    loop_device,
    mounted,
    need,
    open_device,
    read_with_qemu,
    run,
    sparse,
)

from xbd.core.driver import Capability, DiskSpec, DriverError, Extent, OpenFailed, open_with
from xbd.core.hostio import blockdev
from xbd.core.hostio.blockdev import DeviceSpace
from xbd.core.units import MIB
from xbd.drivers.raw import DRIVER

SIZE = 4 * MIB


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    return sparse(tmp_path / "backing", SIZE)


@pytest.fixture(params=[512, 4096])
def sector(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture
def loop(backing: Path, sector: int) -> Iterator[Path]:
    with loop_device(backing, sector) as device:
        yield device


@pytest.fixture
def loop_512(backing: Path) -> Iterator[Path]:
    with loop_device(backing) as device:
        yield device


async def refused(path: Path, number: int, *, writable: bool = True, **options: str) -> str:
    with pytest.raises(OpenFailed) as caught:
        async with open_device(DRIVER, path, writable=writable, **options):
            pass
    assert caught.value.errno == number
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_sizes_come_from_the_device(loop: Path, sector: int) -> None:
    async with open_device(DRIVER, loop) as device:
        geometry = device.geometry
        assert geometry.size == SIZE
        assert geometry.logical_block == sector
        assert geometry.physical_block >= sector
        assert geometry.request_alignment >= sector


@pytest.mark.parametrize(
    "options",
    [{}, {"cache": "writeback"}, {"discard": "ignore"}, {"locking": "no"}],
    ids=str,
)
@pytest.mark.parametrize("shown", [None, "512", "4096"])
async def test_random_work_agrees_with_a_model(
    loop: Path, backing: Path, options: dict[str, str], shown: str | None, sector: int
) -> None:
    options = {**options, "sector-size": shown} if shown else options
    spec = DiskSpec("raw", str(loop), options)
    rng = random.Random(str(options))
    model = bytearray(SIZE)
    async with open_with(DRIVER, spec, device_id="xbdback1i2", writable=True) as access:
        assert access.geometry.logical_block == int(shown or sector)
        await compare_with_model(access, model, rng, 60)
    assert read_with_qemu(loop, SIZE) == model


@pytest.mark.parametrize("cache", ["none", "writeback"])
async def test_small_sectors_on_a_device_of_large_ones_without_the_core(
    backing: Path, cache: str
) -> None:
    with loop_device(backing, 4096) as loop:
        async with open_device(DRIVER, loop, cache=cache, sector_size="512") as device:
            await device.writev(0, [buffer(b"a" * 16384)])
            await device.writev(512, [buffer(b"b" * 512)])
            await device.write_zeroes(3584, 8704, may_unmap=False)
            await device.discard([Extent(offset=512, length=1024)])
            await device.flush()
            there = buffer(1536)
            await device.readv(0, [there])
            assert bytes(there) == b"a" * 512 + b"b" * 512 + b"a" * 512
    content = backing.read_bytes()[:16384]
    assert content[3072:] == b"a" * 512 + bytes(8704) + b"a" * (16384 - 12288)


async def test_discard_reaches_the_device(loop: Path, backing: Path) -> None:
    async with open_device(DRIVER, loop) as device:
        if Capability.DISCARD not in device.capabilities:
            pytest.skip("the loop device passes no discard on")
        assert device.geometry.discard_granularity > 0
        await device.writev(0, [buffer(b"x" * MIB)])
        await device.flush()
        os.sync()
        full = backing.stat().st_blocks
        await device.discard([Extent(offset=0, length=MIB // 2)])
        await device.flush()
        assert backing.stat().st_blocks <= full - MIB // 1024
    async with open_device(DRIVER, loop, discard="ignore") as device:
        assert Capability.DISCARD not in device.capabilities


async def test_zeroes(loop: Path, backing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    async with open_device(DRIVER, loop) as device:
        for step, (name, may_unmap) in enumerate(
            [("", False), ("", True), ("punch_hole", True), ("fcntl", True)]
        ):
            if name == "punch_hole":
                monkeypatch.setattr(blockdev, "punch_hole", refuse)
            elif name == "fcntl":
                monkeypatch.setattr(fcntl, "ioctl", refuse)
            await device.writev(0, [buffer(b"x" * 65536)])
            await device.write_zeroes(4096, 8192 + 4096 * step, may_unmap=may_unmap)
            there = buffer(65536)
            await device.readv(0, [there])
            zeroes = 8192 + 4096 * step
            assert bytes(there) == b"x" * 4096 + bytes(zeroes) + b"x" * (61440 - zeroes)


def test_what_the_kernel_refuses_is_asked_once_other_errors_are_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = [errno.EIO, errno.EOPNOTSUPP]
    asked: list[int] = []

    def ioctl(fd: int, request: int, argument: bytes) -> None:
        asked.append(request)
        raise OSError(numbers.pop(0), "no")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    space = DeviceSpace(3, 512, lambda offset, length: None)
    with pytest.raises(OSError, match="no"):
        space.discard(0, 512)
    assert not space.discard(0, 512)
    assert not space.discard(0, 512)
    assert space.discard(100, 512)  # no whole block in it
    assert len(asked) == 2


async def test_a_mounted_device_is_refused(loop_512: Path, backing: Path, tmp_path: Path) -> None:
    need("mkfs.ext4", "mount")
    run("mkfs.ext4", "-q", loop_512)
    place = tmp_path / "here"
    with mounted(loop_512, place):
        for writable in (True, False):
            text = await refused(loop_512, errno.EBUSY, writable=writable)
            assert f"{loop_512} is in use (mounted on {place})" in text
            assert "errno 16, EBUSY" in text
        async with open_device(DRIVER, loop_512, writable=False, locking="no"):
            pass
    async with open_device(DRIVER, loop_512):
        pass


async def test_a_device_has_one_writer_or_many_readers(loop_512: Path) -> None:
    async with open_device(DRIVER, loop_512):
        await refused(loop_512, errno.EBUSY)
        await refused(loop_512, errno.EBUSY, writable=False)
    async with (
        open_device(DRIVER, loop_512, writable=False),
        open_device(DRIVER, loop_512, writable=False),
    ):
        await refused(loop_512, errno.EBUSY)


async def test_a_read_only_device(backing: Path) -> None:
    with loop_device(backing, 512, "--read-only") as device:
        text = await refused(device, errno.EROFS)
        assert "attach" in text
        assert "read-only" in text
        async with open_device(DRIVER, device, writable=False) as opened:
            assert opened.capabilities is Capability.NONE
            extents = opened.resolve(0, 512, for_write=False)
            assert extents is not None
            flags = fcntl.fcntl(extents[0].fd, fcntl.F_GETFL)
            assert flags & os.O_ACCMODE == os.O_RDONLY


async def test_a_regular_file_belongs_to_imagefile(backing: Path, tmp_path: Path) -> None:
    assert f"use imagefile:{backing}" in await refused(backing, errno.ENOTBLK)
    assert "is a directory" in await refused(tmp_path, errno.ENOTBLK)
    assert "errno 2, ENOENT" in await refused(tmp_path / "missing", errno.ENOENT)


async def test_resize_follows_the_device(loop_512: Path, backing: Path) -> None:
    async with open_device(DRIVER, loop_512) as device:
        with pytest.raises(DriverError, match="extend the device first"):
            await device.resize(2 * SIZE)
        os.truncate(backing, 2 * SIZE)
        run("losetup", "--set-capacity", loop_512)
        assert (await device.resize(2 * SIZE)).size == 2 * SIZE
        await device.writev(2 * SIZE - 512, [buffer(b"x" * 512)])
        (extent,) = device.resolve(SIZE, 512, for_write=True) or ()
        assert (extent.offset, extent.length) == (SIZE, SIZE)
        assert (await device.resize(SIZE)).size == SIZE


async def test_a_size_that_is_no_whole_large_sector(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with loop_device(sparse(tmp_path / "odd", SIZE + 512)) as loop:
        async with open_device(DRIVER, loop, sector_size="4096") as device:
            assert device.geometry.size == SIZE
    assert "the last 512 bytes" in caplog.text


async def test_a_partition_has_the_limits_of_its_disk(backing: Path) -> None:
    need("addpart")
    with loop_device(backing, 512, "--partscan") as loop:
        run("addpart", loop, "1", "2049", "2048")
        partition = loop.with_name(loop.name + "p1")
        async with open_device(DRIVER, loop, writable=False) as device:
            disk = device.geometry
        async with open_device(DRIVER, partition) as device:
            assert device.geometry.size == MIB
            assert device.geometry.discard_granularity == disk.discard_granularity
            await device.write_zeroes(0, 512, may_unmap=False)
            assert "is in use" in await refused(loop, errno.EBUSY)
        run("delpart", loop, "1")
