"""Damage done on purpose to images of QEMU's, each kind by itself."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs
from qcow2_walk import Walk

from xbd.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK


class Victim(Walk):
    """An image taken apart, to be changed."""

    @property
    def cluster(self) -> int:
        return self.header.cluster_size

    def word(self, offset: int) -> int:
        return int.from_bytes(self.read(offset, 8), "big")

    def set_word(self, offset: int, value: int, length: int = 8) -> None:
        self.write(offset, value.to_bytes(length, "big"))

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def beyond(self) -> int:
        """An aligned offset far behind the file's end."""
        return (self.size // self.cluster + 64) * self.cluster

    def data(self, number: int = 0, *, compressed: bool = False) -> tuple[int, int, int]:
        """An allocated cluster: where it is on the disk, its L2 entry, where that lies."""
        found = [
            entry
            for entry in self.entries()
            if bool(entry[1] & COMPRESSED) == compressed and entry[1] & OFFSET_MASK
        ]
        return found[number]

    def l1(self, number: int = 0) -> tuple[int, int]:
        """Where a used L1 entry lies, and the entry."""
        places = [self.header.l1_table_offset + 8 * n for n in range(self.header.l1_size)]
        return [(place, self.word(place)) for place in places if self.word(place)][number]

    @property
    def block(self) -> int:
        """The first refcount block."""
        return self.word(self.header.refcount_table_offset)

    def set_refcount(self, offset: int, count: int) -> None:
        """Of the cluster at a host offset; refcounts of a byte at least."""
        width = self.header.refcount_bits // 8
        index, place = divmod(offset // self.cluster, self.header.refcount_block_entries)
        block = self.word(self.header.refcount_table_offset + 8 * index)
        self.set_word(block + place * width, count, width)

    def free_cluster(self) -> int:
        """A cluster behind the file's end that becomes part of it."""
        offset = -(-self.size // self.cluster) * self.cluster
        self.write(offset + self.cluster - 1, b"\0")
        return offset


@attrs.frozen(kw_only=True)
class Damage:
    """What is done to an image, and what is to be expected of it."""

    recipe: str
    act: Callable[[Victim], list[int] | None]
    """Returns the places on the disk of the clusters that are lost."""
    same_numbers: bool = True
    """qemu-img counts as we do."""
    why: str = ""
    """...or why it does not."""
    verdict: str = "corrupt"
    mended: bool = True
    readable: bool = True
    """All of the disk, when it is mended."""
    qemu_verdict: str | None = None
    """If it is another; `why` says why."""


DAMAGES: Final[dict[str, Damage]] = {}


def damage(
    recipe: str, **expected: object
) -> Callable[[Callable[[Victim], list[int] | None]], Callable[[Victim], list[int] | None]]:
    def keep(act: Callable[[Victim], list[int] | None]) -> Callable[[Victim], list[int] | None]:
        name = f"{recipe}: {act.__name__.replace('_', ' ')}"
        DAMAGES[name] = Damage(recipe=recipe, act=act, **expected)  # type: ignore[arg-type]
        return act

    return keep


# -- refcounts ----------------------------------------------------------------------------------


@damage("plain", verdict="leaks")
def a_leaked_cluster(victim: Victim) -> None:
    victim.set_refcount(victim.free_cluster(), 1)


@damage("version2")
def a_refcount_too_high(victim: Victim) -> None:
    victim.set_refcount(victim.l1()[1] & OFFSET_MASK, 7)


@damage("wide-refcounts", verdict="leaks")
def a_refcount_as_high_as_can_be(victim: Victim) -> None:
    victim.set_refcount(victim.header.l1_table_offset, (1 << 64) - 1)


@damage("plain")
def a_refcount_of_0(victim: Victim) -> None:
    victim.set_refcount(victim.data()[1] & OFFSET_MASK, 0)


@damage("refcounts8")
def a_refcount_too_low(victim: Victim) -> None:
    shared = next(e for _, e, _ in victim.entries() if not e & COPIED and not e & COMPRESSED)
    victim.set_refcount(shared & OFFSET_MASK, 1)


@damage("zeroes")
def all_refcounts_0(victim: Victim) -> None:
    victim.write(victim.block, bytes(victim.cluster))


@damage("preallocated")
def no_refcount_block(victim: Victim) -> None:
    victim.set_word(victim.header.refcount_table_offset, 0)


@damage("plain", same_numbers=False, why="it counts an error for each count it can't get")
def a_refcount_block_inside_a_cluster(victim: Victim) -> None:
    victim.set_word(victim.header.refcount_table_offset, victim.block + 512)


@damage("plain")
def a_reserved_bit_in_the_refcount_table(victim: Victim) -> None:
    victim.set_word(victim.header.refcount_table_offset, victim.block | 4)


@damage("compressed")
def a_refcount_block_behind_the_end(victim: Victim) -> None:
    victim.set_word(victim.header.refcount_table_offset, victim.beyond)


@damage("plain")
def a_refcount_block_in_data(victim: Victim) -> None:
    victim.set_word(victim.header.refcount_table_offset, victim.data()[1] & OFFSET_MASK)


@damage("plain")
def a_refcount_block_on_an_l2_table(victim: Victim) -> None:
    victim.set_word(victim.header.refcount_table_offset, victim.l1()[1] & OFFSET_MASK)


@damage("plain")
def a_refcount_block_on_its_table(victim: Victim) -> None:
    victim.set_word(victim.header.refcount_table_offset, victim.header.refcount_table_offset)


@damage("wide-refcounts")
def a_refcount_block_named_twice(victim: Victim) -> None:
    victim.set_word(victim.header.refcount_table_offset + 8, victim.block)


@damage("plain", same_numbers=False, why="what it takes for blocks lies anywhere")
def a_refcount_table_in_data(victim: Victim) -> None:
    victim.set_word(48, victim.data()[1] & OFFSET_MASK)


@damage("plain", same_numbers=False, why="it counts an error for each count it can't get")
def a_refcount_table_behind_the_end(victim: Victim) -> None:
    victim.set_word(48, victim.beyond)


# -- flags --------------------------------------------------------------------------------------


@damage("plain")
def copied_flags_missing(victim: Victim) -> None:
    for number in range(3):
        _, entry, place = victim.data(number)
        victim.set_word(place, entry & ~COPIED)
    place, entry = victim.l1()
    victim.set_word(place, entry & ~COPIED)


@damage("refcounts32")
def copied_flags_on_shared_clusters(victim: Victim) -> None:
    place, entry = victim.l1()
    victim.set_word(place, entry | COPIED)
    for number in range(5):
        _, entry, place = victim.data(number)
        victim.set_word(place, entry | COPIED)


@damage("compressed")
def the_copied_flag_of_a_compressed_cluster(victim: Victim) -> None:
    _, entry, place = victim.data(compressed=True)
    victim.set_word(place, entry | COPIED)


@damage("data-file")
def a_copied_flag_missing_with_a_data_file(victim: Victim) -> None:
    _, entry, place = victim.data(2)
    victim.set_word(place, entry & ~COPIED)


@damage("plain")
def reserved_bits_of_an_l2_entry(victim: Victim) -> None:
    _, entry, place = victim.data()
    victim.set_word(place, entry | 1 << 60 | 2)


@damage("plain")
def reserved_bits_of_an_l1_entry(victim: Victim) -> None:
    place, entry = victim.l1()
    victim.set_word(place, entry | 1 << 60 | 2)


# -- entries that name what they should not -----------------------------------------------------


@damage("plain")
def two_entries_with_one_cluster(victim: Victim) -> list[int]:
    first, second = victim.data(0), victim.data(1)
    victim.set_word(second[2], first[1])
    return [second[0]]


@damage("plain")
def an_entry_that_names_an_l2_table(victim: Victim) -> list[int]:
    guest, _, place = victim.data()
    victim.set_word(place, victim.l1()[1])
    return [guest]


@damage("plain")
def an_entry_that_names_the_l1_table(victim: Victim) -> list[int]:
    guest, _, place = victim.data()
    victim.set_word(place, victim.header.l1_table_offset | COPIED)
    return [guest]


@damage("plain")
def an_entry_that_names_the_refcount_table(victim: Victim) -> list[int]:
    guest, _, place = victim.data()
    victim.set_word(place, victim.header.refcount_table_offset | COPIED)
    return [guest]


@damage("plain")
def an_entry_that_names_a_refcount_block(victim: Victim) -> list[int]:
    guest, _, place = victim.data()
    victim.set_word(place, victim.block | COPIED)
    return [guest]


@damage("plain")
def an_entry_behind_the_end(victim: Victim) -> list[int]:
    guest, _, place = victim.data()
    victim.set_word(place, victim.beyond | COPIED)
    return [guest]


@damage("version2")
def an_entry_behind_the_end_of_version_2(victim: Victim) -> list[int]:
    guest, _, place = victim.data()
    victim.set_word(place, OFFSET_MASK & ~(victim.cluster - 1) | COPIED)
    return [guest]


@damage("plain")
def an_entry_inside_a_cluster(victim: Victim) -> list[int]:
    guest, entry, place = victim.data()
    victim.set_word(place, entry + 512)
    return [guest]


@damage("zeroes")
def a_preallocated_zero_cluster_inside_a_cluster(victim: Victim) -> list[int]:
    guest, entry, place = victim.data(3)
    victim.set_word(place, entry + 512 | 1)
    return [guest]


@damage("compressed")
def a_compressed_cluster_behind_the_end(victim: Victim) -> list[int]:
    guest, entry, place = victim.data(compressed=True)
    victim.set_word(place, entry + victim.beyond)
    return [guest]


@damage("compressed", verdict="clean")
def compressed_clusters_that_overlap(victim: Victim) -> list[int]:
    """They may."""
    first, second = victim.data(0, compressed=True), victim.data(-1, compressed=True)
    victim.set_word(second[2], first[1])
    return [second[0]]


@damage("compressed", readable=False)
def a_compressed_cluster_in_the_refcount_table(victim: Victim) -> list[int]:
    guest, _, place = victim.data(compressed=True)
    victim.set_word(place, COMPRESSED | victim.header.refcount_table_offset)
    return [guest]


def _an_l1_entry(victim: Victim, new: int) -> list[int]:
    place, _ = victim.l1()
    number = (place - victim.header.l1_table_offset) // 8
    first = number * victim.header.l1_coverage
    end = min(victim.header.size, first + victim.header.l1_coverage)
    victim.set_word(place, new)
    return list(range(first, end, victim.cluster))


@damage("zeroes", same_numbers=False, why="it follows the table in spite of that")
def an_l2_table_inside_a_cluster(victim: Victim) -> list[int]:
    return _an_l1_entry(victim, victim.l1()[1] + 512)


@damage("zeroes")
def an_l2_table_behind_the_end(victim: Victim) -> list[int]:
    return _an_l1_entry(victim, victim.beyond | COPIED)


@damage("zeroes", same_numbers=False, why="it takes the header for an L2 table")
def an_l1_entry_with_nothing_but_a_flag(victim: Victim) -> list[int]:
    return _an_l1_entry(victim, COPIED)


@damage("zeroes")
def an_l2_table_in_the_l1_table(victim: Victim) -> list[int]:
    return _an_l1_entry(victim, victim.header.l1_table_offset | COPIED)


@damage("refcounts32", same_numbers=False, why="it counts what L2 tables name for each L1 entry")
def one_l2_table_for_two_l1_entries(victim: Victim) -> list[int]:
    place, _ = victim.l1(1)
    victim.set_word(place, victim.l1(0)[1])
    first = (place - victim.header.l1_table_offset) // 8 * victim.header.l1_coverage
    return list(range(first, first + victim.header.l1_coverage, victim.cluster))


@damage("plain")
def a_file_cut_short(victim: Victim) -> list[int]:
    end = victim.size - 3 * victim.cluster
    lost = [guest for guest, entry, _ in victim.entries() if entry & OFFSET_MASK >= end]
    with victim.path.open("r+b") as file:
        file.truncate(end)
    return lost


# -- extended entries ---------------------------------------------------------------------------


@damage("extended")
def subclusters_both_allocated_and_zero(victim: Victim) -> None:
    _, _, place = victim.data()
    bitmap = victim.word(place + 8)
    victim.set_word(place + 8, bitmap | (bitmap & 0xF0) << 32)


@damage("extended")
def subclusters_allocated_nowhere(victim: Victim) -> list[int]:
    place = next(
        offset
        for offset in range(victim.l1()[1] & OFFSET_MASK, 1 << 40, 16)
        if not victim.word(offset)
    )
    victim.set_word(place + 8, 0x18)
    number = (place - (victim.l1()[1] & OFFSET_MASK)) // 16
    return [number * victim.cluster]


@damage("extended-compressed")
def a_compressed_cluster_with_a_bitmap(victim: Victim) -> None:
    _, _, place = victim.data(compressed=True)
    victim.set_word(place + 8, 1)


@damage("extended")
def an_extended_entry_behind_the_end(victim: Victim) -> list[int]:
    guest, _, place = victim.data(1)
    victim.set_word(place, victim.beyond | COPIED)
    return [guest]


# -- snapshots ----------------------------------------------------------------------------------


@damage("version2")
def a_snapshots_l1_table_inside_a_cluster(victim: Victim) -> None:
    place = victim.header.snapshots_offset
    victim.set_word(place, victim.word(place) + 8)


@damage("version2", same_numbers=False, why="it follows tables behind the end")
def a_snapshots_l1_table_behind_the_end(victim: Victim) -> None:
    victim.set_word(victim.header.snapshots_offset, victim.beyond)


@damage("zstd")
def a_snapshots_l1_table_too_large(victim: Victim) -> None:
    victim.set_word(victim.header.snapshots_offset + 8, 0xFFFFFFF0, 4)


@damage("zstd")
def a_snapshot_without_the_disks_size(victim: Victim) -> None:
    table = victim.header.snapshots_offset
    entry = bytearray(victim.read(table, 256))
    id_length, name_length = struct.unpack_from(">HH", entry, 12)
    names = entry[64 : 64 + id_length + name_length]
    struct.pack_into(">I", entry, 36, 8)
    victim.write(table, bytes(entry[:48] + names + bytes(40)))


@damage("zstd")
def more_snapshots_than_there_are(victim: Victim) -> None:
    victim.set_word(60, 3, 4)


@damage("zstd", same_numbers=False, why="it does not go on")
def more_snapshots_than_allowed(victim: Victim) -> None:
    victim.set_word(60, 0x80000001, 4)


@damage("version2", same_numbers=False, why="it does not go on")
def a_snapshot_table_inside_a_cluster(victim: Victim) -> None:
    victim.set_word(64, victim.header.snapshots_offset + 8)


@damage("zstd", same_numbers=False, why="it does not go on")
def far_too_much_extra_data(victim: Victim) -> None:
    victim.set_word(victim.header.snapshots_offset + 36, 0x10000000, 4)


@damage("refcounts8")
def a_bad_entry_of_a_snapshots_own_table(victim: Victim) -> None:
    l1 = victim.word(victim.header.snapshots_offset)
    l2 = next(
        victim.word(l1 + 8 * n) for n in range(victim.header.l1_size) if victim.word(l1 + 8 * n)
    )
    victim.set_word((l2 & OFFSET_MASK) + 8 * 5, victim.beyond)


# -- bitmaps ------------------------------------------------------------------------------------


@damage("bitmaps", same_numbers=False, why="it can't open the image")
def a_bitmap_of_an_unknown_type(victim: Victim) -> None:
    victim.write(_bitmap_directory(victim) + 16, b"\7")


@damage("bitmaps", same_numbers=False, why="it does not go on")
def a_bitmap_table_with_reserved_bits(victim: Victim) -> None:
    table = victim.word(_bitmap_directory(victim))
    victim.set_word(table, victim.word(table) | 2)


@damage("bitmaps", same_numbers=False, why="it can't open the image")
def a_bitmap_behind_the_end(victim: Victim) -> None:
    table = victim.word(_bitmap_directory(victim))
    victim.set_word(table, victim.beyond)


@damage("bitmaps")
def a_bitmap_on_data(victim: Victim) -> None:
    table = victim.word(_bitmap_directory(victim))
    victim.set_word(table, victim.data()[1] & OFFSET_MASK)


@damage("bitmaps", verdict="leaks")
def bitmaps_that_somebody_passed_by(victim: Victim) -> None:
    victim.set_word(88, 0)


def _bitmap_directory(victim: Victim) -> int:
    extension = victim.header.extension(0x23852875)  # type: ignore[arg-type]
    assert extension is not None
    return int.from_bytes(extension[16:24], "big")


# -- external data ------------------------------------------------------------------------------


@damage(
    "data-file",
    qemu_verdict="clean",
    why="it does not look, and refuses to read the cluster",
)
def an_entry_that_names_another_cluster_of_the_data_file(victim: Victim) -> None:
    _, entry, place = victim.data(1)
    victim.set_word(place, entry + 40 * victim.cluster)


@damage("data-file")
def a_compressed_cluster_with_a_data_file(victim: Victim) -> list[int]:
    guest, _, place = victim.data()
    victim.set_word(place, COMPRESSED | 1 << 20)
    return [guest]


# -- what can't be mended -----------------------------------------------------------------------


@damage("tiny-clusters", mended=False)
def a_cluster_shared_where_refcounts_have_one_bit(victim: Victim) -> None:
    victim.set_word(victim.data(1)[2], victim.data(0)[1])


@damage("plain", mended=False, same_numbers=False, why="it goes on")
def an_l1_table_behind_the_end(victim: Victim) -> None:
    victim.set_word(40, victim.beyond)


def victim(path: Path) -> Victim:
    walk = Walk.open(path)
    return Victim(walk.path, walk.header)
