"""Real storage for tests: loop devices and small filesystems, always given back."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from xbd.core.driver import (
    BlockDevice,
    Capability,
    DeviceAccess,
    DriverDescriptor,
    Extent,
    OpenContext,
    parse_options,
)
from xbd.core.units import MIB

FILESYSTEMS = {
    "ext4": (32 * MIB, ["mkfs.ext4", "-q"]),
    "ext4-1k": (16 * MIB, ["mkfs.ext4", "-q", "-b", "1024"]),
    "xfs": (320 * MIB, ["mkfs.xfs", "-q"]),
    "tmpfs": (16 * MIB, []),
}


def run(*command: str | Path) -> str:
    """A command's output; its complaint becomes the test's."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def need(*programs: str) -> None:
    """Skip the test unless we are root and these programs are there."""
    if os.geteuid() != 0:
        pytest.skip("needs root for loop devices and mounts")
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


@contextmanager
def loop_device(backing: Path, sector: int = 512, *options: str) -> Iterator[Path]:
    """The file as a block device with sectors of this size."""
    need("losetup")
    command = ["losetup", "--find", "--show", "--sector-size", str(sector), *options, str(backing)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no loop devices here: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(device: Path | str, place: Path, *options: str) -> Iterator[Path]:
    """A filesystem mounted at `place`."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", *options, str(device), str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        run("umount", place)


@contextmanager
def filesystem(kind: str, place: Path) -> Iterator[Path]:
    """A new filesystem of a kind from `FILESYSTEMS`, mounted on a directory below `place`."""
    size, mkfs = FILESYSTEMS[kind]
    if kind == "tmpfs":
        need("mount")
        with mounted("none", place / "mount", "-t", "tmpfs", "-o", f"size={size}") as path:
            yield path
        return
    need(mkfs[0], "mount", "losetup")
    backing = sparse(place / "backing", size)
    run(*mkfs, backing)
    with loop_device(backing) as device, mounted(device, place / "mount") as path:
        yield path


def sparse(path: Path, size: int) -> Path:
    """A file that is one hole."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


@asynccontextmanager
async def open_device(
    driver: DriverDescriptor[Any], path: Path, *, writable: bool = True, **options: str
) -> AsyncIterator[BlockDevice]:
    """A driver's device itself, without the core's layer over it."""

    async def invalidate(offset: int, length: int) -> None:
        await trio.lowlevel.checkpoint()

    context = OpenContext(
        device_id="xbdback1i2",
        writable=writable,
        run_blocking=trio.to_thread.run_sync,
        invalidate=invalidate,
    )
    texts = {"path": str(path), **options}
    async with driver.open(context, parse_options(driver.options, texts)) as device:
        yield device


def buffer(data: bytes | int) -> memoryview:
    """Page-aligned memory with this content, or of this size."""
    size = data if isinstance(data, int) else len(data)
    memory = memoryview(mmap.mmap(-1, size))
    if not isinstance(data, int):
        memory[:] = data
    return memory


async def compare_with_model(
    access: DeviceAccess, model: bytearray, rng: random.Random, steps: int
) -> None:
    """Do random things to a disk and its model, and find them equal after each step."""
    unit = access.geometry.logical_block

    def some_range() -> tuple[int, int]:
        length = rng.choice([1, 1, 2, 3, 8, 16, 40]) * unit
        return rng.randrange(0, len(model) - length + unit, unit), length

    for _ in range(steps):
        offset, length = some_range()
        match rng.choice(["write", "write", "zero", "unmap", "discard", "flush"]):
            case "write":
                data = rng.randbytes(length)
                parts = [memoryview(data)[start : start + 512] for start in range(0, length, 512)]
                await access.writev(offset, parts)
                model[offset : offset + length] = data
            case "discard" if Capability.DISCARD in access.capabilities:
                await access.discard([Extent(offset=offset, length=length)])
                there = buffer(length)
                await access.readv(offset, [there])  # whatever it is now, it stays
                model[offset : offset + length] = there
            case "flush":
                await access.flush()
            case kind:
                await access.write_zeroes(offset, length, may_unmap=kind == "unmap")
                model[offset : offset + length] = bytes(length)
        offset, length = some_range()
        there = buffer(length)
        await access.readv(offset, [there])
        assert there == model[offset : offset + length]
    await access.flush()


def read_with_qemu(path: Path, size: int) -> bytes:
    """The image's first `size` bytes as QEMU sees them."""
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")
    with tempfile.NamedTemporaryFile() as copy:
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", path, copy.name)
        return Path(copy.name).read_bytes()[:size]
