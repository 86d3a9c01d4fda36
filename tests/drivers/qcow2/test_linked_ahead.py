"""Who writes one cluster after the other finds the next ones linked already."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from qcow2_walk import Walk, tool

from xbd.core.driver import MediaError
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import writing
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.writing import MOST_AHEAD, STREAK, Writer, WriteRequest

pytestmark = pytest.mark.usefixtures("no_power_cuts")

SIZE = 64 * MIB
CLUSTER = 64 * KIB
REQUEST = 128 * KIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    tool("qemu-img", "create", "-f", "qcow2", path, str(SIZE))
    return path


@pytest.fixture
def image(path: Path) -> Iterator[Image]:
    image = open_image(path, Wishes(writable=True))
    yield image
    if image.host.fd >= 0:
        image.close()


def write(writer: Writer, offset: int, data: bytes) -> None:
    request = WriteRequest(offset, [memoryview(data)])
    moved = writer.write([request])
    if request.error is not None:
        raise request.error
    assert not moved


def linked(image: Image) -> int:
    """Bytes from the disk's beginning on that are written without a new mapping."""
    end = 0
    while extent := image.resolve(end, image.size - end, for_write=True):
        end += extent.length
    return end


def content_of(image: Image) -> bytes:
    target = bytearray(SIZE)
    image.readv(0, [memoryview(target)])
    return bytes(target)


def closed_clean(image: Image, path: Path) -> None:
    image.close()
    tool("qemu-img", "check", path)


def test_a_streak_is_linked_ahead_and_reads_as_zeroes(image: Image, path: Path) -> None:
    writer = Writer(image)
    rewritten = 0
    for offset in range(0, SIZE // 2, REQUEST):
        if linked(image) >= offset + REQUEST:
            rewritten += 1  # as a data path does, in place
        write(writer, offset, b"%08d" % offset * (REQUEST // 8))
        if offset + REQUEST < STREAK:
            assert linked(image) == offset + REQUEST
        assert linked(image) <= offset + REQUEST + MOST_AHEAD
    assert rewritten > 0.8 * SIZE / 2 / REQUEST
    written = b"".join(b"%08d" % at * (REQUEST // 8) for at in range(0, SIZE // 2, REQUEST))
    assert content_of(image) == written.ljust(SIZE, b"\0")
    closed_clean(image, path)
    flat = path.with_suffix(".raw")
    tool("qemu-img", "convert", "-O", "raw", path, flat)
    assert flat.read_bytes() == written.ljust(SIZE, b"\0")


def test_batches_that_end_in_another_order_are_a_streak(image: Image, path: Path) -> None:
    writer = Writer(image)
    chance = random.Random(1)
    for start in range(0, 4 * MIB, 4 * REQUEST):
        offsets = [start + i * REQUEST for i in range(4)]
        chance.shuffle(offsets)
        for offset in offsets:
            write(writer, offset, b"x" * REQUEST)
    assert linked(image) > 4 * MIB
    closed_clean(image, path)


def test_writes_here_and_there_link_nothing_else(image: Image, path: Path) -> None:
    writer = Writer(image)
    # So far apart that none continues another one.
    clusters = list(range(0, SIZE // CLUSTER, 40))
    random.Random(2).shuffle(clusters)
    for number in clusters:
        write(writer, number * CLUSTER, b"r" * CLUSTER)
    written = set(clusters)
    for number in range(SIZE // CLUSTER):
        known = image.resolve(number * CLUSTER, CLUSTER, for_write=True) is not None
        assert known is (number in written)
    closed_clean(image, path)


def test_nothing_behind_the_disks_end_is_linked(tmp_path: Path) -> None:
    path = tmp_path / "odd.qcow2"
    size = 3 * MIB // 2 + 4 * KIB
    tool("qemu-img", "create", "-f", "qcow2", path, str(size))
    image = open_image(path, Wishes(writable=True))
    writer = Writer(image)
    for offset in range(0, MIB, REQUEST):
        write(writer, offset, b"e" * REQUEST)
    assert linked(image) == size
    clusters = [number for number, _, _ in Walk.open(path).entries()]
    assert len(clusters) <= -(-size // CLUSTER)
    closed_clean(image, path)


def test_what_lies_behind_the_image_stays_seen(tmp_path: Path) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "over.qcow2"
    base.write_bytes(b"b" * 4 * MIB)
    tool("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "raw", path)
    image = open_image(path, Wishes(writable=True))
    writer = Writer(image)
    for offset in range(0, 2 * MIB, REQUEST):
        request = WriteRequest(offset, [memoryview(b"o" * REQUEST)])
        writer.write([request])
        assert request.error is None
    target = bytearray(4 * MIB)
    image.readv(0, [memoryview(target)])
    assert bytes(target) == b"o" * 2 * MIB + b"b" * 2 * MIB
    closed_clean(image, path)


def test_a_streak_ends_where_something_is_mapped(image: Image, path: Path) -> None:
    writer = Writer(image)
    write(writer, 3 * MIB, b"there already".ljust(CLUSTER))
    for offset in range(0, 2 * MIB + REQUEST, REQUEST):
        write(writer, offset, b"s" * REQUEST)
    assert linked(image) == 3 * MIB + CLUSTER
    target = bytearray(CLUSTER)
    image.readv(3 * MIB, [memoryview(target)])
    assert bytes(target) == b"there already".ljust(CLUSTER)
    closed_clean(image, path)


def test_where_the_table_cannot_be_written_nothing_is_lost(
    image: Image, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(image)
    for offset in range(0, STREAK - REQUEST, REQUEST):
        write(writer, offset, b"k" * REQUEST)

    def refuse(*_: object) -> None:
        raise MediaError("the host refuses", errno=5)

    before = image.refcounts.in_store
    with monkeypatch.context() as patched:
        patched.setattr(image.tables, "_write_sectors", refuse)
        with pytest.raises(MediaError):
            write(writer, STREAK - REQUEST, b"f" * REQUEST)
    assert image.refcounts.in_store < before - 2  # so some were to be linked ahead
    write(writer, STREAK - REQUEST, b"g" * REQUEST)
    written = (b"k" * (STREAK - REQUEST) + b"g" * REQUEST).ljust(SIZE, b"\0")
    assert content_of(image) == written
    closed_clean(image, path)


def test_streaks_can_be_as_short_as_tests_want(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other tests count on."""
    monkeypatch.setattr(writing, "STREAK", 0)
    write(Writer(image), 0, b"1" * KIB)
    assert linked(image) > CLUSTER
