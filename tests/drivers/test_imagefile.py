"""Flat image files, as any user may have them."""

# ruff: noqa: ASYNC240 - looking at files from tests may block

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from host_storage import buffer, open_device, run, sparse

from xbd.core.driver import (
    Capability,
    DeviceBroken,
    DriverError,
    Extent,
    HostExtent,
    MediaError,
    OpenFailed,
    OptionError,
    parse_options,
)
from xbd.core.hostio import hostfile, locks
from xbd.core.hostio.files import O_DIRECT
from xbd.core.units import MIB
from xbd.drivers.imagefile import DRIVER
from xbd.drivers.imagefile.options import ImagefileOptions

SIZE = 4 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return sparse(tmp_path / "image", SIZE)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert set(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT)


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


# -- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cache": "writeback"}, {"sector_size": "4096"}])
async def test_bytes_lie_in_the_file_as_on_the_disk(image: Path, options: dict[str, str]) -> None:
    data = os.urandom(64 * 1024)
    async with open_device(DRIVER, image, **options) as device:
        assert device.geometry.size == SIZE
        assert device.geometry.logical_block == int(options.get("sector_size", "512"))
        parts = buffer(data)
        await device.writev(8192, [parts[:512], parts[512:8192], parts[8192:]])
        await device.flush()
        there = buffer(len(data))
        await device.readv(8192, [there[:4096], there[4096:]])
        assert there == data
    content = image.read_bytes()
    assert content[8192 : 8192 + len(data)] == data
    assert len(content) == SIZE


async def test_transfers_that_direct_io_refuses_go_through_the_page_cache(image: Path) -> None:
    async with open_device(DRIVER, image) as device:
        host = device.file  # type: ignore[attr-defined]
        host.alignment = hostfile.DirectAlignment(offset=4096, memory=512)
        await device.writev(0, [buffer(b"a" * 8192)])
        await device.writev(512, [buffer(b"b" * 1024)])
        there = buffer(8192)
        await device.readv(0, [there])
        assert bytes(there) == b"a" * 512 + b"b" * 1024 + b"a" * (8192 - 1536)
        await device.readv(SIZE - 512, [there[:512]])
        assert bytes(there[:512]) == bytes(512)


async def test_the_page_cache_is_used_on_demand_only(image: Path) -> None:
    async with open_device(DRIVER, image) as device:
        extents = device.resolve(0, 512, for_write=True)
        assert extents is not None
        if not is_direct(extents[0].fd):
            pytest.skip("the filesystem of the temporary directory has no O_DIRECT")
    async with open_device(DRIVER, image, cache="writeback") as device:
        extents = device.resolve(0, 512, for_write=True)
        assert extents is not None
        assert not is_direct(extents[0].fd)
        assert device.geometry.request_alignment == 1
        assert device.geometry.memory_alignment == 1


async def test_a_filesystem_without_direct_io(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hostfile, "direct_alignment", lambda fd: None)
    async with open_device(DRIVER, image) as device:
        await device.writev(0, [buffer(b"x" * 512)])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "xbdback1i2" in caplog.text
    with pytest.raises(OpenFailed, match="set cache=writeback"):
        async with open_device(DRIVER, image, cache="none"):
            pass


async def test_everything_resolves_to_the_file_itself(image: Path) -> None:
    async with open_device(DRIVER, image) as device:
        (extent,) = device.resolve(4096, 512, for_write=True) or ()
        assert extent == HostExtent(fd=extent.fd, offset=4096, length=SIZE - 4096)
        assert device.resolve(SIZE, 512, for_write=False) is None
    async with open_device(DRIVER, image, writable=False) as device:
        assert device.resolve(0, 512, for_write=True) is None
        assert device.resolve(0, 512, for_write=False) is not None


# -- reading only -------------------------------------------------------------------------------


async def test_a_disk_opened_for_reading_cannot_be_written_by_any_way(image: Path) -> None:
    async with open_device(DRIVER, image, writable=False) as device:
        assert device.capabilities is Capability.NONE
        (extent,) = device.resolve(0, SIZE, for_write=False) or ()
        for fd in (extent.fd, device.file.cached_fd):  # type: ignore[attr-defined]
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(DriverError):
            await device.writev(0, [buffer(512)])


async def test_a_file_without_write_permission_is_told(image: Path, tmp_path: Path) -> None:
    refusal = PermissionError(errno.EACCES, "no")

    def refuse(*_: object) -> int:
        raise refusal

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(OpenFailed, match=r"errno 13, EACCES\); .*attach the disk read-only"):
            async with open_device(DRIVER, image):
                pass


# -- what cannot be opened ----------------------------------------------------------------------


async def refused(path: Path, number: int, **options: str) -> str:
    with pytest.raises(OpenFailed) as caught:
        async with open_device(DRIVER, path, **options):
            pass
    assert caught.value.errno == number
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_wrong_paths_get_one_line_that_helps(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "tiny").write_bytes(b"x" * 511)
    assert "create it first" in await refused(tmp_path / "missing", errno.ENOENT)
    assert "is a directory, not an image" in await refused(tmp_path, errno.EISDIR)
    assert "is a named pipe" in await refused(tmp_path / "pipe", errno.EINVAL)
    assert "is a character device" in await refused(Path("/dev/null"), errno.EINVAL)
    assert "0 bytes, less than one sector" in await refused(tmp_path / "empty", errno.EINVAL)
    assert "511 bytes, less than" in await refused(tmp_path / "tiny", errno.EINVAL)


async def test_a_block_device_belongs_to_raw() -> None:
    device = next((path for path in Path("/dev").glob("loop[0-9]") if path.is_block_device()), None)
    if device is None:
        pytest.skip("no block device here")
    assert f"use raw:{device}" in await refused(device, errno.ENOTBLK)


def test_options_are_checked() -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(ImagefileOptions, {"path": "a", "cache": "maybe", "sector-size": "520"})
    for name in ("path", "cache", "sector-size"):
        assert f"{name}: " in str(caught.value)


# -- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sector", "rest"), [("512", 100), ("4096", 512)])
async def test_a_broken_sector_at_the_end_is_left_alone(
    image: Path, caplog: pytest.LogCaptureFixture, sector: str, rest: int
) -> None:
    with image.open("ab") as file:
        file.write(b"t" * rest)
    async with open_device(DRIVER, image, sector_size=sector) as device:
        assert device.geometry.size == SIZE
        await device.writev(SIZE - 4096, [buffer(b"x" * 4096)])
        await device.write_zeroes(0, SIZE, may_unmap=True)
        if Capability.DISCARD in device.capabilities:
            await device.discard([Extent(offset=0, length=SIZE)])
        await device.flush()
    assert image.read_bytes() == bytes(SIZE) + b"t" * rest
    assert f"the last {rest} bytes" in caplog.text


async def test_resize_changes_the_file(image: Path) -> None:
    async with open_device(DRIVER, image) as device:
        await device.writev(SIZE - 512, [buffer(b"x" * 512)])
        assert (await device.resize(2 * SIZE)).size == device.geometry.size == 2 * SIZE
        assert image.stat().st_size == 2 * SIZE
        there = buffer(1024)
        await device.readv(SIZE - 512, [there])
        assert bytes(there) == b"x" * 512 + bytes(512)
        await device.writev(2 * SIZE - 512, [buffer(b"y" * 512)])
        assert (await device.resize(512)).size == 512
        assert image.stat().st_size == 512


async def test_growing_into_a_longer_file_keeps_what_is_there(image: Path) -> None:
    async with open_device(DRIVER, image) as device:
        with image.open("ab") as file:
            file.write(b"new" * 1024)
        await device.resize(SIZE + 1024)
        there = buffer(1024)
        await device.readv(SIZE, [there])
        assert bytes(there) == (b"new" * 1024)[:1024]
        assert image.stat().st_size == SIZE + 3072


async def test_a_size_that_no_file_can_have(image: Path) -> None:
    async with open_device(DRIVER, image) as device:
        with pytest.raises(DriverError):
            await device.resize((1 << 63) - 512)
        assert device.geometry.size == SIZE


async def test_a_file_cut_off_while_in_use_gives_errors_not_zeroes(image: Path) -> None:
    async with open_device(DRIVER, image) as device:
        os.truncate(image, 4096)
        with pytest.raises(MediaError, match="ends at byte 4096"):
            await device.readv(0, [buffer(8192)])
        await device.readv(0, [buffer(4096)])


# -- space --------------------------------------------------------------------------------------


async def test_discard_makes_holes(image: Path) -> None:
    async with open_device(DRIVER, image) as device:
        if Capability.DISCARD not in device.capabilities:
            pytest.skip("the filesystem of the temporary directory makes no holes")
        await device.writev(0, [buffer(b"x" * MIB)])
        await device.flush()
        assert allocated(image) >= MIB
        await device.discard([Extent(offset=0, length=65536), Extent(offset=131072, length=65536)])
        await device.flush()
        assert allocated(image) <= MIB - 131072
        assert image.stat().st_size == SIZE
    if shutil.which("qemu-img"):
        parts = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", image))
        starts = [(part["start"], part["length"], part["data"]) for part in parts]
        assert starts[:3] == [(0, 65536, False), (65536, 65536, True), (131072, 65536, False)]


@pytest.mark.parametrize("options", [{}, {"cache": "writeback"}])
async def test_zeroes_free_space_only_where_allowed(image: Path, options: dict[str, str]) -> None:
    async with open_device(DRIVER, image, **options) as device:
        await device.writev(0, [buffer(b"x" * MIB)])
        await device.flush()
        full = allocated(image)
        await device.write_zeroes(512, MIB - 1024, may_unmap=False)
        await device.flush()
        assert allocated(image) == full
        if Capability.DISCARD in device.capabilities:
            await device.write_zeroes(512, MIB - 1024, may_unmap=True)
            assert allocated(image) < full
    assert image.read_bytes() == b"x" * 512 + bytes(MIB - 1024) + b"x" * 512 + bytes(SIZE - MIB)


async def test_discard_ignored_means_the_space_stays(image: Path) -> None:
    async with open_device(DRIVER, image, discard="ignore") as device:
        assert Capability.DISCARD not in device.capabilities
        await device.write_zeroes(0, MIB, may_unmap=True)
        await device.flush()
        assert allocated(image) >= MIB


# -- locks --------------------------------------------------------------------------------------


async def test_an_image_has_one_writer(image: Path) -> None:
    async with open_device(DRIVER, image):
        text = await refused(image, errno.EBUSY)
        assert "locked by another process" in text
        assert "errno 16, EBUSY" in text
        async with open_device(DRIVER, image, locking="no"):
            pass
    async with (
        open_device(DRIVER, image, writable=False),
        open_device(DRIVER, image, writable=False),
    ):
        await refused(image, errno.EBUSY)
    async with open_device(DRIVER, image):
        pass


async def test_a_lock_that_is_just_being_given_up_is_waited_for(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 60.0)  # this machine may be slow
    taken, tried = trio.Event(), trio.Event()

    async def first() -> None:
        async with open_device(DRIVER, image):
            taken.set()
            await tried.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await taken.wait()
        nursery.start_soon(trio.lowlevel.checkpoint)
        tried.set()
        async with open_device(DRIVER, image) as device:
            await device.flush()


# -- failures -----------------------------------------------------------------------------------


async def test_after_a_failed_flush_cached_writes_are_never_called_safe(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "disk")

    for cache, stays in (("writeback", True), ("none", False)):
        async with open_device(DRIVER, image, cache=cache) as device:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fdatasync", fail)
                with pytest.raises(MediaError):
                    await device.flush()
            if stays:
                with pytest.raises(MediaError, match="earlier writes were lost"):
                    await device.flush()
            else:
                await device.flush()


async def test_closing_twice_is_fine_and_nothing_works_after_it(image: Path) -> None:
    async with open_device(DRIVER, image) as device:
        await device.aclose()
        await device.aclose()
        with pytest.raises(DeviceBroken):
            await device.readv(0, [buffer(512)])


async def test_a_failed_open_leaves_nothing_open(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> int:
        raise OSError(errno.EIO, "disk")

    monkeypatch.setattr(hostfile, "direct_alignment", fail)
    assert "errno 5, EIO" in await refused(image, errno.EIO)
