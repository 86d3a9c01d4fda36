"""Batches of reads, compressed clusters among them, and serving requests outside trio."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from qcow2_walk import prose, tool

from xbd.core.driver import BlockDevice, OpenContext, ReadRequest, WriteRequest, parse_options
from xbd.core.driver.buffers import aligned_buffer
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import DRIVER
from xbd.drivers.qcow2 import device as device_module
from xbd.drivers.qcow2.device import Qcow2Device
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.tables import Kind

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")

SIZE = 4 * MIB
CLUSTER = 64 * KIB


@pytest.fixture
def content() -> bytes:
    return prose(SIZE // 2, 1) + bytes(MIB) + os.urandom(MIB)


@pytest.fixture
def packed(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "raw").write_bytes(content)
    tool(
        "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2",
        tmp_path / "raw", tmp_path / "image",
    )  # fmt: skip
    return tmp_path / "image"


def some_reads(seed: int, count: int) -> list[ReadRequest]:
    chance = random.Random(seed)
    reads = []
    for _ in range(count):
        length = chance.choice((512, 4096, 65536, 300 * KIB))
        offset = chance.randrange((SIZE - length) // 512 + 1) * 512
        reads.append(ReadRequest(offset, [aligned_buffer(length, 4096)]))
    return reads


def read_alone(image: Image, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    image.readv(offset, [memoryview(buffer)])
    return bytes(buffer)


def check(reads: list[ReadRequest], content: bytes) -> None:
    for read in reads:
        assert read.error is None
        length = read.buffers[0].nbytes
        assert read.buffers[0] == content[read.offset : read.offset + length]


@pytest.mark.parametrize("over", [False, True])
def test_a_batch_reads_what_is_there(
    tmp_path: Path, packed: Path, content: bytes, over: bool
) -> None:
    if over:
        tool("qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", packed, tmp_path / "over")
    image = open_image(tmp_path / "over" if over else packed, Wishes())
    for seed in range(5):
        reads = some_reads(seed, 40)
        image.read(reads)
        check(reads, content)
    image.close()


def test_the_beginning_of_a_cluster_is_no_answer_for_its_end(packed: Path, content: bytes) -> None:
    image = open_image(packed, Wishes())
    assert read_alone(image, 0, 512) == content[:512]
    buffer = memoryview(bytearray(512))
    assert image.read_known(0, [buffer])
    assert buffer == content[:512]
    assert not image.read_known(CLUSTER - 512, [buffer])
    assert read_alone(image, CLUSTER - 512, 512) == content[CLUSTER - 512 : CLUSTER]
    assert image.read_known(CLUSTER - 512, [buffer])
    assert buffer == content[CLUSTER - 512 : CLUSTER]
    image.close()


def test_a_damaged_cluster_fails_only_those_who_read_it(packed: Path, content: bytes) -> None:
    image = open_image(packed, Wishes())
    first = image.pieces(0, CLUSTER)[0]
    assert first.kind is Kind.COMPRESSED
    with packed.open("r+b") as file:
        file.seek(first.host & (1 << 54) - 1)
        file.write(b"\xff" * 64)
    reads = [ReadRequest(at, [memoryview(bytearray(4096))]) for at in (0, 4096, 2 * CLUSTER)]
    image.read(reads)
    assert isinstance(reads[0].error, CorruptImage)
    assert isinstance(reads[1].error, CorruptImage)
    check(reads[2:], content)
    image.close()


async def test_requests_are_served_outside_trio(packed: Path, content: bytes) -> None:
    """By threads at the same time; each tells what has moved, and holds it until the end."""
    options = parse_options(DRIVER.options, {"path": str(packed), "cache": "writeback"})

    async def invalidate(offset: int, length: int) -> None:
        pytest.fail("only who called may do this")

    context = OpenContext(
        device_id="test",
        writable=True,
        run_blocking=trio.to_thread.run_sync,
        invalidate=invalidate,
    )
    now = bytearray(content)
    async with DRIVER.open(context, options) as device:
        assert isinstance(device, Qcow2Device)
        wrong: list[BaseException] = []

        def serve(number: int) -> None:
            try:
                for cluster in range(number, SIZE // CLUSTER, 4):
                    at = cluster * CLUSTER + 4096
                    new = bytes([1 + cluster]) * 4096
                    served = device.serve_blocking([WriteRequest(at, [memoryview(new)])])
                    # Compressed clusters move, and others have been nowhere.
                    moves = not at >= SIZE * 3 // 4
                    assert served.moved == [(at - 4096, CLUSTER)] * moves
                    served.end()
                    now[at : at + 4096] = new
                    read = ReadRequest(at, [memoryview(bytearray(4096))])
                    device.serve_blocking([read]).end()
                    assert read.error is None
                    assert read.buffers[0] == new
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert read_alone(device.image, 0, SIZE) == bytes(now)
        served = device.serve_blocking([WriteRequest(0, [memoryview(b"x" * 512)])])
        assert served.moved == []  # it is in a cluster of its own by now
        served.end()
        with pytest.raises(KeyError):
            served.end()
    tool("qemu-img", "check", "-f", "qcow2", packed)


class Threads:
    """How often a device needed one."""

    def __init__(self) -> None:
        self.calls = 0

    async def run(self, function: Any, *args: Any) -> Any:
        self.calls += 1
        return await trio.to_thread.run_sync(function, *args)


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[tuple[BlockDevice, Threads]]:
    """The image is in the page cache."""
    await trio.Path(path).read_bytes()

    async def invalidate(offset: int, length: int) -> None:
        pytest.fail("nothing moves")

    threads = Threads()
    context = OpenContext(
        device_id="test", writable=False, run_blocking=threads.run, invalidate=invalidate
    )
    options = parse_options(DRIVER.options, {"path": str(path)})
    async with DRIVER.open(context, options) as device:
        await read_by(device, 5 * CLUSTER, alone=False)  # tables come into memory
        threads.calls = 0
        yield device, threads


async def read_by(device: BlockDevice, offset: int, *, alone: bool) -> ReadRequest:
    read = ReadRequest(offset, [aligned_buffer(4096, 4096)], alone=alone)
    await device.read_many([read])
    return read


async def test_who_is_alone_needs_no_thread_for_a_compressed_cluster(
    packed: Path, content: bytes
) -> None:
    async with served(packed) as (device, threads):
        check([await read_by(device, 4096, alone=True)], content)
        assert threads.calls == 0
        check([await read_by(device, CLUSTER + 4096, alone=False)], content)
        assert threads.calls == 1


async def test_one_image_at_a_time_does_without_threads(
    packed: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "_OWNED_SECONDS", 1000)
    async with served(packed) as (device, threads), served(packed) as (other, others):
        check([await read_by(device, 0, alone=True)], content)
        check([await read_by(other, 0, alone=True)], content)
        check([await read_by(device, CLUSTER, alone=True)], content)
        assert (threads.calls, others.calls) == (0, 1)
        await device.aclose()
        check([await read_by(other, CLUSTER, alone=True)], content)
        assert others.calls == 1


async def test_what_takes_long_gets_a_thread_even_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "raw").write_bytes(content)
    tool(
        "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=2M",
        tmp_path / "raw", tmp_path / "image",
    )  # fmt: skip
    async with served(tmp_path / "image") as (device, threads):
        check([await read_by(device, 2 * MIB, alone=True)], content)
        assert threads.calls == 1


async def test_damage_is_told_as_ever_to_who_is_alone(packed: Path, content: bytes) -> None:
    image = open_image(packed, Wishes())
    place = image.pieces(0, CLUSTER)[0].host & (1 << 54) - 1
    image.close()
    with packed.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 64)
    async with served(packed) as (device, _):
        read = await read_by(device, 0, alone=True)
        assert isinstance(read.error, CorruptImage)
        check([await read_by(device, 2 * CLUSTER, alone=True)], content)
