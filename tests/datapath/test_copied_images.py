"""Images over backing files whose first writes the I/O threads copy by themselves."""

from __future__ import annotations

import random
import shutil
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from data_paths import NATIVE, NATIVE_PREADV

from xbd.core.driver import Extent, parse_options
from xbd.core.driver.open import open_device
from xbd.core.units import KIB, MIB, PAGE_SIZE
from xbd.drivers.qcow2 import DRIVER

pytestmark = [
    pytest.mark.parametrize("native_threads", [NATIVE, NATIVE_PREADV], indirect=True),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img"),
]

SIZE = 16 * MIB
CLUSTER = 64 * KIB
CLUSTERS = SIZE // CLUSTER


def tool(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def make_images(directory: Path, cluster: int = CLUSTER) -> tuple[Path, bytearray]:
    """An overlay, over what lies anywhere in its image, and zeroes; and the disk's content."""
    content = bytearray(random.Random(cluster).randbytes(SIZE))
    for offset in range(2 * MIB, SIZE, 4 * MIB):
        content[offset : offset + MIB] = bytes(MIB)
    base, over = directory / "base", directory / "over"
    options = f"cluster_size={cluster}"
    tool("qemu-img", "create", "-f", "qcow2", "-o", options, base, SIZE)
    order = list(range(0, SIZE, MIB))
    random.Random(1).shuffle(order)
    for offset in order:
        if not any(content[offset : offset + MIB]):
            continue
        (directory / "part").write_bytes(content[offset : offset + MIB])
        tool(
            "qemu-io", "-f", "qcow2", "-c", f"write -q -s {directory / 'part'} {offset} {MIB}", base
        )
    tool("qemu-img", "create", "-f", "qcow2", "-o", options, "-F", "qcow2", "-b", base, over)
    return over, content


@asynccontextmanager
async def serving(rig_maker, path: Path):
    options = parse_options(DRIVER.options, {"path": str(path), "discard": "unmap"})
    opening = open_device(
        lambda context: DRIVER.open(context, options),
        name="test",
        concurrency=DRIVER.concurrency,
        device_id="d",
        writable=True,
        image_dirs=[path.parent],
    )
    async with opening as access, rig_maker(access=access) as rig:
        yield rig


def check(path: Path, content: bytes) -> None:
    tool("qemu-img", "check", "-q", path)
    raw = path.with_name("found")
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert raw.read_bytes() == content


def count_writes(device) -> list[int]:
    """Notes how many requests the driver is asked to write at a time."""
    counts: list[int] = []
    real = device.write_many

    async def write_many(requests):
        counts.append(len(requests))
        await real(requests)

    device.write_many = write_many
    return counts


async def write(rig, content: bytearray, offset: int, data: bytes) -> None:
    await rig.front.write(offset, data)
    content[offset : offset + len(data)] = data


async def test_first_writes_are_copied_without_the_driver(rig_maker, tmp_path):
    path, content = make_images(tmp_path)
    async with serving(rig_maker, path) as rig:
        if not rig.access.device.image.data_host.direct:
            pytest.skip("the page cache is in the way on this filesystem")
        counts = count_writes(rig.access.device)
        async with trio.open_nursery() as nursery:
            for cluster in range(CLUSTERS):
                data = bytes([cluster]) * PAGE_SIZE
                offset = cluster * CLUSTER + cluster % 16 * PAGE_SIZE
                nursery.start_soon(write, rig, content, offset, data)
        assert sum(counts) < CLUSTERS // 8
        for cluster in range(0, CLUSTERS, 7):
            found = await rig.front.read(cluster * CLUSTER, CLUSTER)
            assert found == content[cluster * CLUSTER : (cluster + 1) * CLUSTER]
    check(path, content)


@pytest.mark.parametrize("cluster", [4 * KIB, 64 * KIB, 128 * KIB])
async def test_everything_else_goes_on_meanwhile(rig_maker, tmp_path, cluster):
    """Guests' tasks write to slots of their own in the same clusters; one writes long pieces; the
    administrator zeroes, discards and takes snapshots."""
    path, content = make_images(tmp_path, cluster)
    tasks, slot, half = 6, 24 * KIB, SIZE // 2
    chance = random.Random(cluster)

    async def small(rig, number):
        mine = [at for at in range(0, half - slot, slot) if at // slot % (tasks + 1) == number]
        for _ in range(60):
            at = chance.choice(mine)
            unit = 512 if chance.random() < 0.1 else PAGE_SIZE
            length = chance.randrange(1, 5) * unit
            at += chance.randrange((slot - length) // unit + 1) * unit
            await write(rig, content, at, chance.randbytes(length))
            low = at - at % PAGE_SIZE
            found = await rig.front.read(low, PAGE_SIZE)
            assert found == content[low : low + PAGE_SIZE]

    async def large(rig):
        for _ in range(30):
            length = chance.randrange(1, 100) * PAGE_SIZE
            at = half + chance.randrange((half - length) // PAGE_SIZE + 1) * PAGE_SIZE
            await write(rig, content, at, chance.randbytes(length))

    async def administrator(rig):
        mine = [at for at in range(0, half - slot, slot) if at // slot % (tasks + 1) == tasks]
        for number in range(12):
            at = chance.choice(mine)
            await rig.access.write_zeroes(at, slot, may_unmap=bool(number % 2))
            content[at : at + slot] = bytes(slot)
            if number % 4 == 1:
                await rig.access.create_snapshot(f"s{number}")
            at = chance.choice(mine)
            await rig.access.discard([Extent(offset=at, length=slot)])
            found = memoryview(bytearray(slot))
            await rig.access.readv(at, [found])
            content[at : at + slot] = found

    async with serving(rig_maker, path) as rig:
        async with trio.open_nursery() as nursery:
            for number in range(tasks):
                nursery.start_soon(small, rig, number)
            nursery.start_soon(large, rig)
            nursery.start_soon(administrator, rig)
        await rig.access.flush()
    check(path, content)


async def test_holes_are_read_without_the_driver(rig_maker, tmp_path):
    tool("qemu-img", "create", "-f", "qcow2", tmp_path / "image", SIZE)
    async with serving(rig_maker, tmp_path / "image") as rig:
        assert await rig.front.read(0, PAGE_SIZE) == bytes(PAGE_SIZE)

        async def read_many(requests):
            pytest.fail("the driver was asked")

        rig.access.device.read_many = read_many
        for offset in range(0, SIZE, MIB):
            assert await rig.front.read(offset, MIB // 4) == bytes(MIB // 4)
        await rig.front.write(MIB, b"data" * (PAGE_SIZE // 4))
        await rig.front.write(3 * MIB, b"data" * (PAGE_SIZE // 4))
        for offset in (MIB, 3 * MIB):
            found = await rig.front.read(offset, 2 * PAGE_SIZE)
            assert found == b"data" * (PAGE_SIZE // 4) + bytes(PAGE_SIZE)
