"""`resolve_all` beside `resolve`, and the bytes that lie where they say."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
from qcow2_walk import prose, tool

from xbd.core.driver import HostExtent
from xbd.core.units import GIB, KIB
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.resolving import MOST_EXTENTS

pytestmark = pytest.mark.usefixtures("no_power_cuts")

COUNT = 96
"""Clusters of a disk, but for one that is larger."""
SMALL = 4 * KIB
TABLE = 512
"""Clusters of 4 KiB that an L2 table has entries for."""


@attrs.frozen
class Disk:
    """An image that QEMU makes."""

    path: Path
    cluster: int
    size: int

    def change(self, *commands: str) -> None:
        told = tool("qemu-io", "-f", "qcow2", *_each("-c", commands), self.path)
        assert "fail" not in told.lower(), told

    def write(self, numbers: Sequence[int], seed: int = 0) -> None:
        """Clusters in this order, each with content of its own."""
        commands = []
        sources = self.path.with_name(f"{self.path.name}-{seed}")
        sources.mkdir()
        for number in numbers:
            length = min(self.cluster, self.size - number * self.cluster)
            source = sources / f"{number}"
            source.write_bytes(random.Random(f"{seed} {number}").randbytes(length))
            commands.append(f"write -q -s {source} {self.at(number)} {length}")
        self.change(*commands)

    def write_shuffled(self, numbers: Sequence[int], seed: int = 0) -> None:
        """So that next to no cluster lies behind the one before it."""
        order = list(numbers)
        random.Random(seed).shuffle(order)
        self.write(order, seed)

    def pack(self, *numbers: int) -> None:
        source = self.path.with_name("packed")
        source.write_bytes(prose(self.cluster, 1))
        self.change(*(f"write -q -c -s {source} {self.at(n)} {self.cluster}" for n in numbers))

    def zero(self, *numbers: int) -> None:
        self.change(*(f"write -q -z {self.at(number)} {self.cluster}" for number in numbers))

    def at(self, number: int) -> int:
        return number * self.cluster

    def content(self) -> bytes:
        """As QEMU reads it."""
        copy = self.path.with_name("copy")
        tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.path, copy)
        return copy.read_bytes()

    @contextmanager
    def opened(self, *, loaded: bool = True, writable: bool = True) -> Iterator[Opened]:
        content = self.content()
        image = open_image(self.path, Wishes(writable=writable, image_dirs=[self.path.parent]))
        try:
            if loaded:
                image.load(0, image.size)
            yield Opened(image, content, self.cluster)
        finally:
            image.close()


def _each(option: str, words: Sequence[str]) -> list[str]:
    return [part for word in words for part in (option, word)]


@attrs.frozen
class Opened:
    """An image, and what its disk reads as."""

    image: Image
    content: bytes
    cluster: int

    def one_by_one(self, offset: int, length: int, *, for_write: bool) -> list[HostExtent]:
        """Those that follow each other as one."""
        extents: list[HostExtent] = []
        end = offset + length
        while offset < end and len(extents) < MOST_EXTENTS:
            extent = self.image.resolve(offset, end - offset, for_write=for_write)
            if extent is None:
                break
            offset += extent.length
            last = extents[-1] if extents else None
            if last and last.fd == extent.fd and last.offset + last.length == extent.offset:
                extents[-1] = attrs.evolve(last, length=last.length + extent.length)
            else:
                extents.append(extent)
        return extents

    def look(self, offset: int, length: int, *, for_write: bool) -> int:
        """Where that ends which simply lies somewhere, as one answer says."""
        extents = self.image.resolve_all(offset, length, for_write=for_write)
        assert extents == self.one_by_one(offset, length, for_write=for_write)
        assert len(extents) <= MOST_EXTENTS
        at = offset
        for extent in extents:
            assert extent.length > 0
            there = os.pread(extent.fd, extent.length, extent.offset)
            assert there == self.content[at : at + extent.length]
            at += extent.length
        assert at <= min(offset + length, max(offset, self.image.size))
        return at

    def reach(self, number: int, *, for_write: bool = False) -> float:
        """The same from a cluster on, in clusters, by as many answers as it takes."""
        at, last = number * self.cluster, -1
        while at != last:
            last, at = at, self.look(at, len(self.content) - at, for_write=for_write)
        return at / self.cluster

    def reaches(self, *, for_write: bool = False) -> list[int]:
        """Clusters that simply lie somewhere."""
        return [
            number
            for number in range(-(-self.image.size // self.cluster))
            if self.look(number * self.cluster, self.cluster, for_write=for_write)
            == min((number + 1) * self.cluster, self.image.size)
        ]

    def look_anywhere(self) -> None:
        chance = random.Random(1)
        sectors = len(self.content) // 512
        for _ in range(300):
            first = chance.randrange(sectors)
            length = min(chance.choice((1, 8, 30, 128, 1000, sectors)), sectors - first)
            self.look(first * 512, length * 512, for_write=chance.random() < 0.5)


MakeDisk = Callable[..., Disk]


@pytest.fixture
def make(tmp_path: Path) -> MakeDisk:
    """Makes an image; by its name, and in clusters its size."""

    def make(
        name: str = "image",
        count: float = COUNT,
        *,
        cluster: int = SMALL,
        backing: Path | None = None,
        kind: str = "qcow2",
        options: str = "",
    ) -> Disk:
        disk = Disk(tmp_path / name, cluster, int(count * cluster))
        behind = () if backing is None else ("-b", backing, "-F", kind)
        options = f"cluster_size={cluster}{options}"
        command = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *behind)
        tool(*command, disk.path, str(disk.size))
        return disk

    return make


@pytest.fixture(params=[4 * KIB, 64 * KIB])
def cluster(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def test_clusters_in_any_order(make: MakeDisk, cluster: int) -> None:
    disk = make(cluster=cluster)
    disk.write_shuffled(range(COUNT))
    with disk.opened() as opened:
        for for_write in (False, True):
            assert opened.reach(0, for_write=for_write) == COUNT
            assert opened.look(disk.at(5) + 512, 1024, for_write=for_write) == disk.at(5) + 1536
            extents = opened.image.resolve_all(0, disk.size, for_write=for_write)
            assert len(extents) == MOST_EXTENTS
        opened.look_anywhere()


def test_a_disk_that_ends_within_a_cluster(make: MakeDisk) -> None:
    """Nothing is told of what is behind it, however much is asked for."""
    disk = make(count=9.5)
    disk.write([3, 1, 9, 8, *range(4, 8), 0, 2])
    with disk.opened() as opened:
        for for_write in (False, True):
            assert opened.reach(0, for_write=for_write) == 9.5
            assert opened.look(disk.at(8), GIB, for_write=for_write) == disk.size
            assert not opened.image.resolve_all(disk.size, SMALL, for_write=for_write)
            assert not opened.image.resolve_all(disk.size + GIB, SMALL, for_write=for_write)
            assert not opened.image.resolve_all(0, 0, for_write=for_write)


def test_neighbours_are_one(make: MakeDisk) -> None:
    """As far as they follow each other in the file."""
    disk = make()
    disk.write([*range(10, 20), *range(10)])
    with disk.opened() as opened:
        extents = opened.image.resolve_all(0, disk.size)
        assert [extent.length for extent in extents] == [10 * SMALL, 10 * SMALL]


def test_it_ends_at_what_lies_nowhere(make: MakeDisk, cluster: int) -> None:
    """Compressed, zeroes, and clusters that there are not."""
    disk = make(cluster=cluster)
    kinds = random.Random(2).choices(["data"] * 6 + ["zero", "zeroed", "packed", ""], k=COUNT)
    numbers = {kind: [at for at in range(COUNT) if kinds[at] == kind] for kind in set(kinds)}
    disk.write_shuffled(numbers["data"] + numbers["zeroed"])
    disk.zero(*numbers["zero"], *numbers["zeroed"])
    disk.pack(*numbers["packed"])
    with disk.opened() as opened:
        for for_write in (False, True):
            assert opened.reaches(for_write=for_write) == numbers["data"]
            for first in range(COUNT):
                end = next((at for at in range(first, COUNT) if kinds[at] != "data"), COUNT)
                assert opened.reach(first, for_write=for_write) == end
        opened.look_anywhere()


def test_subclusters(make: MakeDisk) -> None:
    """Each as if it were a cluster."""
    disk = make(cluster=64 * KIB, options=",extended_l2=on")
    disk.write_shuffled(range(0, COUNT, 2))
    disk.change(*(f"write -q -P {n} {disk.at(n) + 4 * KIB} 6k" for n in range(1, COUNT, 4)))
    disk.change(*(f"write -q -z {disk.at(n) + 8 * KIB} 2k" for n in range(0, COUNT, 8)))
    with disk.opened() as opened:
        for for_write in (False, True):
            assert opened.reach(0, for_write=for_write) == 8 / 64
            assert opened.reach(2, for_write=for_write) == 3
            assert opened.look(disk.at(1) + 4 * KIB, disk.size, for_write=for_write) == (
                disk.at(1) + 10 * KIB
            )
        opened.look_anywhere()


def test_subclusters_over_an_image(make: MakeDisk) -> None:
    """Clusters of which some are here and some behind."""
    base = make("base", cluster=64 * KIB)
    base.write_shuffled(range(COUNT), 1)
    top = make(cluster=64 * KIB, backing=base.path, options=",extended_l2=on")
    top.change(*(f"write -q -P {n} {top.at(n) + 4 * KIB} 6k" for n in range(1, COUNT, 4)))
    top.change(f"write -q -z {top.at(30) + 8 * KIB} 2k")
    with top.opened() as opened:
        assert opened.reach(0) == 30 + 8 / 64
        assert opened.reach(31) == COUNT
        start = top.at(1) + 4 * KIB
        assert opened.look(start, top.size, for_write=True) == start + 6 * KIB
        opened.look_anywhere()


def chain(make: MakeDisk, cluster: int) -> Disk:
    """Two levels over an image in any order: all of it is somewhere, but for a few clusters."""
    base = make("base", cluster=cluster)
    base.write_shuffled(range(COUNT), 1)
    middle = make("middle", cluster=cluster, backing=base.path)
    middle.write_shuffled(range(0, COUNT, 3), 2)
    middle.zero(40)
    middle.pack(61)
    top = make("top", cluster=cluster, backing=middle.path)
    top.write_shuffled(range(0, COUNT, 5), 3)
    return top


def test_through_two_levels(make: MakeDisk, cluster: int) -> None:
    """In the order of the disk, whichever file it is in; for writing from the uppermost alone."""
    with chain(make, cluster).opened() as opened:
        own = list(range(0, COUNT, 5))
        assert opened.reaches() == [at for at in range(COUNT) if at != 61]
        assert opened.reach(0) == 61, "40 is in the uppermost image"
        assert opened.reaches(for_write=True) == own
        assert [opened.reach(at, for_write=True) for at in own] == [at + 1 for at in own]
        opened.look_anywhere()


def test_zeroes_over_data_end_it(make: MakeDisk) -> None:
    base = make("base")
    base.write_shuffled(range(COUNT))
    top = make(backing=base.path)
    top.zero(7)
    with top.opened() as opened:
        assert opened.reach(0) == 7
        assert opened.reach(7) == 7
        assert opened.reach(8) == COUNT
        assert opened.reaches(for_write=True) == []


def test_no_more_than_are_asked_for_with_those_behind(make: MakeDisk) -> None:
    """Here the first ones are the uppermost image's, all others those behind it."""
    base = make("base", 3 * MOST_EXTENTS)
    base.write_shuffled(range(3 * MOST_EXTENTS), 1)
    top = make(count=3 * MOST_EXTENTS, backing=base.path)
    top.write_shuffled(range(1, MOST_EXTENTS - 1), 2)
    with top.opened() as opened:
        assert len(opened.image.resolve_all(0, top.size)) == MOST_EXTENTS
        assert opened.reach(0) == 3 * MOST_EXTENTS
        opened.look_anywhere()


@pytest.mark.parametrize("count", [20, 20.5, 20.3])
def test_over_a_raw_image_that_is_shorter(make: MakeDisk, tmp_path: Path, count: float) -> None:
    """What direct I/O can read of it is told, and nothing behind its end."""
    raw = tmp_path / "raw"
    raw.write_bytes(random.Random(1).randbytes(int(count * SMALL)))
    top = make(count=64, backing=raw, kind="raw")
    top.write_shuffled([3, 4, 9, 30, 31], 2)
    with top.opened() as opened:
        end = opened.reach(0) * SMALL
        assert count * SMALL - SMALL < end <= count * SMALL
        assert opened.reaches() == [*range(20), 30, 31]
        assert opened.look(top.at(5), 2 * SMALL, for_write=False) == top.at(7)
        assert opened.look(top.at(19) + 512, SMALL, for_write=False) <= end
        for number in range(21, 30):
            assert not opened.image.resolve_all(top.at(number), top.size)
        assert opened.reaches(for_write=True) == [3, 4, 9, 30, 31]
        opened.look_anywhere()


def test_over_an_image_that_is_shorter(make: MakeDisk) -> None:
    base = make("base", 10.5)
    base.write_shuffled(range(11))
    top = make(count=TABLE + 20, backing=base.path)
    top.write([11, 12, TABLE])
    with top.opened() as opened:
        assert opened.reach(0) == 10.5
        assert opened.reach(11) == 13
        assert opened.reach(TABLE) == TABLE + 1
        assert opened.reaches() == [*range(10), 11, 12, TABLE]


def test_what_a_snapshot_has_is_not_for_writing(make: MakeDisk, cluster: int) -> None:
    disk = make(cluster=cluster)
    disk.write_shuffled(range(COUNT), 1)
    tool("qemu-img", "snapshot", "-c", "s", disk.path)
    with disk.opened() as opened:
        assert opened.reach(0) == COUNT
        assert opened.reaches(for_write=True) == []
    disk.write_shuffled(range(20, 40), 2)
    with disk.opened() as opened:
        assert opened.reach(0) == COUNT
        assert opened.reaches(for_write=True) == list(range(20, 40))
        assert opened.reach(20, for_write=True) == 40
        opened.look_anywhere()
    tool("qemu-img", "snapshot", "-d", "s", disk.path)
    with disk.opened() as opened:
        assert opened.reach(0, for_write=True) == COUNT


def test_nothing_is_for_writing_where_nothing_is_written(make: MakeDisk) -> None:
    disk = make()
    disk.write_shuffled(range(COUNT))
    with disk.opened(writable=False) as opened:
        assert opened.reach(0) == COUNT
        assert opened.reaches(for_write=True) == []
    with disk.opened() as opened:
        assert opened.reach(0, for_write=True) == COUNT
        opened.image.mark_corrupt(CorruptImage("as if"))
        assert opened.reach(0) == COUNT
        assert opened.reaches(for_write=True) == []


# -- tables in memory -----------------------------------------------------------------------------


def test_nothing_is_told_before_tables_are_in_memory(make: MakeDisk) -> None:
    disk = make(count=2 * TABLE)
    numbers = range(TABLE - 20, TABLE + 20)
    disk.write_shuffled(numbers)
    first, middle = disk.at(numbers[0]), disk.at(TABLE)
    with disk.opened(loaded=False) as opened:
        image = opened.image
        assert opened.reaches() == opened.reaches(for_write=True) == []
        assert not image.in_memory(first, SMALL)
        image.load(first, SMALL)
        assert image.in_memory(0, middle)
        assert not image.in_memory(middle - SMALL, 2 * SMALL)
        assert not image.in_memory(middle, SMALL)
        for for_write in (False, True):
            assert opened.reach(numbers[0], for_write=for_write) == TABLE
        image.load(first, 40 * SMALL)
        assert image.in_memory(0, disk.size)
        for for_write in (False, True):
            assert opened.reach(numbers[0], for_write=for_write) == TABLE + 20
            assert opened.reaches(for_write=for_write) == list(numbers)


def test_what_is_behind_the_disk_is_in_memory(make: MakeDisk) -> None:
    """There is nothing to know of it."""
    disk = make(count=9.5)
    disk.write(range(10))
    with disk.opened(loaded=False) as opened:
        image = opened.image
        image.load(disk.size, SMALL)
        image.load(disk.size + GIB, SMALL)
        assert image.in_memory(disk.size, GIB)
        assert not image.in_memory(0, GIB)
        image.load(0, GIB)
        assert image.in_memory(0, GIB)


def test_where_there_is_no_table_there_is_nothing_to_load(make: MakeDisk) -> None:
    with make().opened(loaded=False) as opened:
        assert opened.image.in_memory(0, len(opened.content))
        assert opened.reaches() == []


def test_tables_of_images_behind_are_loaded_too(make: MakeDisk, cluster: int) -> None:
    with chain(make, cluster).opened(loaded=False) as opened:
        image, size = opened.image, len(opened.content)
        assert not image.in_memory(0, size)
        assert opened.reaches() == []
        image.pieces(0, size)  # tables of the uppermost alone
        assert not image.in_memory(0, size)
        assert opened.reaches() == opened.reaches(for_write=True) == list(range(0, COUNT, 5))
        assert image.in_memory(0, cluster), "which has this cluster itself"
        image.load(0, size)
        assert image.in_memory(0, size)
        assert opened.reaches() == [at for at in range(COUNT) if at != 61]


def test_an_overlay_without_tables(make: MakeDisk, tmp_path: Path) -> None:
    """What is known of it is what is known of the one behind, which may know nothing."""
    base = make("base", 2 * TABLE)
    base.write_shuffled(range(10))
    top = make(count=2 * TABLE, backing=base.path)
    with top.opened(loaded=False) as opened:
        image = opened.image
        assert opened.reaches() == []
        assert not image.in_memory(0, SMALL)
        assert image.in_memory(top.at(TABLE), SMALL)
        image.load(0, SMALL)
        assert image.in_memory(0, top.size)
        assert opened.reaches() == list(range(10))
    raw = tmp_path / "raw"
    raw.write_bytes(base.content())
    with make("over-raw", 2 * TABLE, backing=raw, kind="raw").opened(loaded=False) as opened:
        assert opened.image.in_memory(0, top.size)
        assert opened.reach(0) == 2 * TABLE
