"""Places for clusters before they are written to; who writes one after the other gets more."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from qcow2_recipes import NAMED
from qcow2_walk import Walk, tool

from xbd.core.driver import Extent, MediaError
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import placing
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import COPIED
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.placing import MOST_AHEAD, STREAK, Placer

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


def write(placer: Placer, offset: int, data: bytes) -> None:
    """As a data path does."""
    image, end = placer.image, offset + len(data)
    if not is_known(image, offset, end):
        assert placer.useful(offset, len(data))
        placer.place([Extent(offset=offset, length=len(data))])
    while data:
        extent = image.resolve(offset, len(data), for_write=True)
        assert extent is not None
        length = min(extent.length, len(data))
        os.pwrite(extent.fd, data[:length], extent.offset)
        offset, data = offset + length, data[length:]


def is_known(image: Image, offset: int, end: int) -> bool:
    while offset < end:
        extent = image.resolve(offset, end - offset, for_write=True)
        if extent is None:
            return False
        offset += extent.length
    return True


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
    placer = Placer(image)
    rewritten = 0
    for offset in range(0, SIZE // 2, REQUEST):
        if linked(image) >= offset + REQUEST:
            rewritten += 1  # as a data path does, in place
        write(placer, offset, b"%08d" % offset * (REQUEST // 8))
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
    placer = Placer(image)
    chance = random.Random(1)
    for start in range(0, 4 * MIB, 4 * REQUEST):
        offsets = [start + i * REQUEST for i in range(4)]
        chance.shuffle(offsets)
        for offset in offsets:
            write(placer, offset, b"x" * REQUEST)
    assert linked(image) > 4 * MIB
    closed_clean(image, path)


def test_writes_here_and_there_link_nothing_else(image: Image, path: Path) -> None:
    placer = Placer(image)
    # So far apart that none continues another one.
    clusters = list(range(0, SIZE // CLUSTER, 40))
    random.Random(2).shuffle(clusters)
    for number in clusters:
        write(placer, number * CLUSTER, b"r" * CLUSTER)
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
    placer = Placer(image)
    for offset in range(0, MIB, REQUEST):
        write(placer, offset, b"e" * REQUEST)
    assert linked(image) == size
    clusters = [number for number, _, _ in Walk.open(path).entries()]
    assert len(clusters) <= -(-size // CLUSTER)
    closed_clean(image, path)


@pytest.mark.parametrize("name", ["subclusters-over", "external-4k", "over-two", "luks"])
def test_only_where_a_new_cluster_reads_as_none_does(tmp_path: Path, name: str) -> None:
    made = NAMED[name].make(tmp_path)
    image = open_image(made.path, made.wishes())
    placer = Placer(image)
    assert not any(placer.useful(at, CLUSTER) for at in range(0, image.size - CLUSTER, CLUSTER))
    image.close()


def test_what_has_a_place_or_is_to_be_zero_stays_as_it_is(path: Path) -> None:
    tool("qemu-io", "-c", "write -P 1 0 64k", "-c", "write -z 64k 64k", path)
    image = open_image(path, Wishes(writable=True))
    placer = Placer(image)
    assert placer.useful(0, CLUSTER)  # for all it knows before the table is in memory
    placer.place([Extent(offset=0, length=4 * CLUSTER), Extent(offset=0, length=CLUSTER)])
    assert not placer.useful(0, 4 * CLUSTER)
    known = [is_known(image, at, at + CLUSTER) for at in range(0, 5 * CLUSTER, CLUSTER)]
    assert known == [True, False, True, True, False]
    assert content_of(image) == (b"\1" * CLUSTER).ljust(SIZE, b"\0")
    closed_clean(image, path)


def test_what_somebody_is_just_mapping_stays_as_it_is(image: Image, path: Path) -> None:
    placer = Placer(image)
    image.allocating.add(1)
    placer.place([Extent(offset=CLUSTER, length=CLUSTER)])
    assert linked(image) == 0
    placer.place([Extent(offset=0, length=3 * CLUSTER)])
    known = [is_known(image, at, at + CLUSTER) for at in range(0, 3 * CLUSTER, CLUSTER)]
    assert known == [True, False, True]
    image.allocating.clear()
    closed_clean(image, path)


def test_a_corrupt_image_gets_no_places(path: Path) -> None:
    image = open_image(path, Wishes(writable=True))
    placer = Placer(image)
    image.tables.l1[0] = 12345 | COPIED  # inside a cluster
    assert not placer.useful(0, CLUSTER)
    with pytest.raises(CorruptImage):
        placer.place([Extent(offset=0, length=CLUSTER)])
    assert image.broken is not None
    assert not placer.useful(SIZE - CLUSTER, CLUSTER)
    image.close()


def test_a_streak_ends_where_something_is_mapped(image: Image, path: Path) -> None:
    placer = Placer(image)
    write(placer, 3 * MIB, b"there already".ljust(CLUSTER))
    for offset in range(0, 2 * MIB + REQUEST, REQUEST):
        write(placer, offset, b"s" * REQUEST)
    assert linked(image) == 3 * MIB + CLUSTER
    target = bytearray(CLUSTER)
    image.readv(3 * MIB, [memoryview(target)])
    assert bytes(target) == b"there already".ljust(CLUSTER)
    closed_clean(image, path)


def test_where_the_table_cannot_be_written_nothing_is_lost(
    image: Image, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placer = Placer(image)
    for offset in range(0, STREAK - REQUEST, REQUEST):
        write(placer, offset, b"k" * REQUEST)

    def refuse(*_: object) -> None:
        raise MediaError("the host refuses", errno=5)

    before = image.refcounts.in_store
    with monkeypatch.context() as patched:
        patched.setattr(image.host, "write", refuse)
        with pytest.raises(MediaError):
            write(placer, STREAK - REQUEST, b"f" * REQUEST)
    assert image.refcounts.in_store < before - 2  # so some were to be linked ahead
    write(placer, STREAK - REQUEST, b"g" * REQUEST)
    written = (b"k" * (STREAK - REQUEST) + b"g" * REQUEST).ljust(SIZE, b"\0")
    assert content_of(image) == written
    closed_clean(image, path)


def test_streaks_can_be_as_short_as_tests_want(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other tests count on."""
    monkeypatch.setattr(placing, "STREAK", 0)
    write(Placer(image), 0, b"1" * KIB)
    assert linked(image) > CLUSTER
