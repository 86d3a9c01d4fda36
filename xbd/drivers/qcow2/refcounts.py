"""Host clusters: which are free, how often each is used, and when one may be used again.

Source: QEMU's docs/interop/qcow2.rst, "Host cluster management".

Two of the rules that keep an image whole in a crash are kept here:

* A cluster is handed out only after its count of 1 and its content, zeroes, are durable.  So
  whatever names it may reach the disk in any order.  Clusters are reserved in runs, to pay for one
  flush per run, and ahead, so that nobody waits for it; what is unused after a crash is leaked.
* A cluster that nothing names any more keeps its count until that is durable: see `release`.
"""

from __future__ import annotations

import errno
import sys
import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final

import attrs

from xbd.core.driver import DriverError, NoSpace
from xbd.core.hostio.failures import shown
from xbd.core.units import MIB
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.metadata_map import MetadataMap
from xbd.drivers.qcow2.refcount_block import RefcountBlock

FIRST_RUN: Final = 64
LONGEST_RUN: Final = 1024
"""Clusters reserved at a time: the first time, and when a guest goes on allocating."""

RUN_BYTES: Final = 64 * MIB
"""No reservation is longer than this (or one cluster)."""

CACHE_BYTES: Final = 4 * MIB
"""Refcount blocks kept in memory, but two at least: 128 GiB of clusters of 64 KiB."""

_FEW: Final = 4
"""Writes that are made durable one by one rather than by a flush."""

LARGEST_OFFSET: Final = 1 << 56
"""Host offsets have 56 bits."""


@attrs.define(eq=False)
class _Reservation:
    """Clusters that become used."""

    runs: list[tuple[int, int]]
    used_before: list[tuple[int, int]] = attrs.field(factory=list)
    """Runs of them in which something may have been written."""
    counts: list[tuple[int, bytes]] = attrs.field(factory=list)
    """Where their counts lie in the image, and what is there; none if others' counts are in the
    same bytes."""
    durable: bool = False


class Refcounts:
    """The counts of one image.  Call it under the image's lock, unless a method says otherwise."""

    def __init__(
        self,
        host: Host,
        header: Header,
        metadata: MetadataMap,
        move_table: Callable[[int, int], None],
    ) -> None:
        """Loads the refcount table.  ``move_table(offset,
        clusters)`` durably writes a header that names a new one."""
        self._host = host
        self._header = header
        self._metadata = metadata
        self._move_table = move_table
        self._table_offset = header.refcount_table_offset
        self._table_clusters = header.refcount_table_clusters
        self._bits = header.cluster_bits
        self._entries = header.refcount_block_entries
        self._table = self._load_table()
        self._blocks: OrderedDict[int, RefcountBlock] = OrderedDict()
        self._most_blocks = max(2, CACHE_BYTES // header.cluster_size)
        self._dirty: set[int] = set()
        self._hint = 0
        """No cluster below is free."""
        self._fresh = -(-host.size() // header.cluster_size)
        """Nothing was ever written at this cluster or behind it."""
        self._pool: deque[int] = deque()
        self._run_taken = self._goes_on = False
        """Whether one run has been needed, and more."""
        self._under_way = threading.Lock()
        """Held while clusters are being reserved ahead."""
        self._arrived: deque[_Reservation] = deque()
        """Reserved ahead, or failed to be, and not in the store yet."""
        self._longest_run = min(LONGEST_RUN, max(1, RUN_BYTES >> self._bits))
        self._run = min(FIRST_RUN, self._longest_run)
        self._released: list[tuple[int, int]] = []

    # -- loading ------------------------------------------------------------------------------

    def _load_table(self) -> array[int]:
        size = self._table_clusters * self._header.cluster_size
        table = array("Q", bytes(self._host.read(self._table_offset, size)))
        if sys.byteorder == "little":
            table.byteswap()
        return table

    def table_clusters(self) -> range:
        """In which the table lies."""
        first = self._table_offset >> self._bits
        return range(first, first + self._table_clusters)

    def block_clusters(self) -> Iterator[int]:
        """Those of the blocks that the table names."""
        return (offset >> self._bits for offset in self._table if offset)

    def _block(self, index: int) -> RefcountBlock | None:
        """The block of this place in the table; None: there is none, all its counts are 0."""
        block = self._blocks.get(index)
        if block is not None:
            self._blocks.move_to_end(index)
            return block
        if index >= len(self._table) or not self._table[index]:
            return None
        offset = self._table[index]
        if offset % self._header.cluster_size or offset >= LARGEST_OFFSET:
            raise CorruptImage(f"refcount block {index} can't be at {offset:#x}")
        block = RefcountBlock(
            self._host.read(offset, self._header.cluster_size), self._header.refcount_order
        )
        self._keep(index, block)
        return block

    def _keep(self, index: int, block: RefcountBlock) -> None:
        self._blocks[index] = block
        while len(self._blocks) > self._most_blocks:
            oldest = next(iter(self._blocks))
            if oldest in self._dirty:
                self._write_block(oldest)
                self._dirty.discard(oldest)
            del self._blocks[oldest]

    # -- counts -------------------------------------------------------------------------------

    def get(self, cluster: int) -> int:
        """How often a host cluster is used."""
        block = self._block(cluster // self._entries)
        return 0 if block is None else block.counts[cluster % self._entries]

    @property
    def largest(self) -> int:
        """What no count can exceed."""
        return (1 << self._header.refcount_bits) - 1

    def change(self, cluster: int, delta: int) -> int:
        """Add to a count, in memory until `write`; returns the new one."""
        index, place = divmod(cluster, self._entries)
        block = self._block(index)
        if block is None:
            raise _uncounted(cluster)
        count = block.counts[place] + delta
        if not 0 <= count <= block.largest:
            raise self._impossible(cluster, count)
        block.set(place, count)
        self._dirty.add(index)
        return count

    def _impossible(self, cluster: int, count: int) -> DriverError:
        if count < 0:
            return CorruptImage(f"host cluster {cluster} is released more often than it is used")
        bits = self._header.refcount_bits
        return DriverError(
            f"host cluster {cluster} can't be shared more than {(1 << bits) - 1} times with "
            f"refcounts of {bits} bits",
            errno=errno.EINVAL,
        )

    def get_many(self, clusters: Sequence[int]) -> list[int]:
        """As `get`, for clusters which follow each other more or less."""
        counts = []
        loaded, block = -1, None
        for cluster in clusters:
            index = cluster // self._entries
            if index != loaded:
                loaded, block = index, self._block(index)
            counts.append(0 if block is None else block.counts[cluster % self._entries])
        return counts

    def change_many(self, clusters: Sequence[int], delta: int) -> list[int]:
        """As `change`, for ascending clusters, which may repeat: for all of them, or for none.

        All are in use before.  Returns those that nobody uses any more.
        """
        emptied: list[int] = []
        done = 0
        try:
            while done < len(clusters):
                index = clusters[done] // self._entries
                stop = bisect_left(clusters, (index + 1) * self._entries, done)
                self._change_in_block(index, clusters[done:stop], delta, emptied)
                done = stop
        except DriverError:
            for cluster in clusters[:done]:
                self.change(cluster, -delta)
            raise
        return emptied

    def _change_in_block(
        self, index: int, clusters: Sequence[int], delta: int, emptied: list[int]
    ) -> None:
        block = self._block(index)
        if block is None:
            raise _uncounted(clusters[0])
        counts, largest, first = block.counts, block.largest, index * self._entries
        before = counts[:]
        for cluster in clusters:
            count = counts[cluster - first] + delta
            if not 0 <= count <= largest or count == delta:
                counts[:] = before
                raise self._impossible(cluster, count) if count != delta else _uncounted(cluster)
            counts[cluster - first] = count
            if not count:
                emptied.append(cluster)
        for cluster in (clusters[0], clusters[-1]):
            block.set(cluster - first, counts[cluster - first])
        self._dirty.add(index)

    def write(self, *, durably: bool = False) -> None:
        """Hand all changed counts to the host: outside this process, and only if `durably` on the
        disk."""
        for index in sorted(self._dirty):
            self._write_block(index, durably=durably)
        self._dirty.clear()

    def _write_block(self, index: int, *, durably: bool = False) -> None:
        block = self._blocks[index]
        change = block.dirty()
        if change is not None:
            at, data = change
            write = self._host.write_durably if durably else self._host.write
            write(self._table[index] + at, data)
            block.clean()

    @property
    def end(self) -> int:
        """Nothing was ever written at this cluster or behind it."""
        return self._fresh

    # -- reserving ----------------------------------------------------------------------------

    def take(self) -> int:
        """A host cluster: its count of 1 and its zeroes are durable.  Its number."""
        if self._arrived:
            self._receive()
        if not self._pool:
            self._take_more()
        return self._pool.popleft()

    def _take_more(self) -> None:
        self._goes_on = self._run_taken
        self._run_taken = True
        try:
            self._pool.extend(self.reserve(self._run))
        except NoSpace:
            self.await_arrival()
            if not self._pool:
                raise
        self._run = min(self._run * 2, self._longest_run)

    @property
    def in_store(self) -> int:
        """Clusters that `take` gives without reserving more."""
        return len(self._pool)

    def put_back(self, clusters: Sequence[int]) -> None:
        """What was taken and not used for anything."""
        self._pool.extendleft(reversed(clusters))

    def take_metadata(self) -> int:
        """As `take`, for a table: nothing else will be written there."""
        cluster = self.take()
        self._metadata.add(cluster)
        return cluster

    def take_many(self, count: int) -> list[int]:
        """As `take`, so many in any order; or none."""
        taken: list[int] = []
        try:
            while len(taken) < count:
                taken.append(self.take())
        except DriverError:
            self.release(taken)
            raise
        return taken

    def take_run(self, count: int) -> int:
        """As `take`, but so many that follow each other; the first one's number."""
        if count > self._entries // 2:
            return self._take_far_run(count)
        start = self._hint
        while True:
            run = self._find(start, count)
            if len(run) < count:
                if not self._free_pool():
                    raise self._no_room()
                start = self._hint
                continue
            first, length = runs(run)[-1]
            if length == count:
                break
            start = first
        self._reserve(run)
        return first

    def _take_far_run(self, count: int) -> int:
        """As `take_run`, for more than one block counts: behind all that is counted yet.

        The blocks come first, all together, because each would else interrupt the run.
        """
        index = 1 + max((i for i, offset in enumerate(self._table) if offset), default=-1)
        index = max(index, -(-self._fresh // self._entries))
        blocks = -(-count // self._entries)
        blocks = -(-(count + blocks) // self._entries)
        if index + blocks > len(self._table):
            self._grow_table(index + blocks)
            return self._take_far_run(count)
        start = index * self._entries
        used = blocks + count
        if self._metadata.overlaps(start, used):
            raise CorruptImage("metadata lie where nothing counts them")
        self._host.grow((start + used) << self._bits)
        self._add_full_blocks(index, start, blocks, used)
        self._host.flush()
        for number in range(index, index + blocks):
            entry = (start + number - index) << self._bits
            self._host.write(self._table_offset + number * 8, entry.to_bytes(8, "big"))
            self._table[number] = entry
        self._host.flush()
        self._metadata.add(start, blocks)
        self._fresh = max(self._fresh, start + used)
        return start + blocks

    # -- other counts -------------------------------------------------------------------------

    def copied(self) -> Refcounts:
        """The same counts once more, in places of their own, which they count.

        They may be changed, and written, without any effect until a header names their table; then
        `become` them.
        """
        self.await_arrival()  # whose counts are written where they are now
        clusters, run, blocks = self._take_places()
        try:
            table = array("Q", bytes(8 * len(self._table)))
            used = [index for index, offset in enumerate(self._table) if offset]
            for index, cluster in zip(used, blocks, strict=True):
                block = self._block(index)
                assert block is not None
                self._host.write(cluster << self._bits, block.pack(0, self._entries))
                table[index] = cluster << self._bits
            if sys.byteorder == "little":
                table.byteswap()
            self._host.write(run << self._bits, table.tobytes())
            header = attrs.evolve(
                self._header,
                refcount_table_offset=run << self._bits,
                refcount_table_clusters=clusters,
            )
            return Refcounts(self._host, header, self._metadata, self._move_table)
        except DriverError:
            self.release([*range(run, run + clusters), *blocks])
            raise

    def _take_places(self) -> tuple[int, int, list[int]]:
        """Room for the table and all blocks: how many clusters and the first one, and the blocks'.

        Taking them can add blocks, and move the table.
        """
        blocks: list[int] = []
        while True:
            clusters = self._table_clusters
            run: range = range(0)
            try:
                first = self.take_run(clusters)
                run = range(first, first + clusters)
                while len(blocks) < sum(1 for offset in self._table if offset):
                    blocks.append(self.take())
            except DriverError:
                self.release([*run, *blocks])
                raise
            if self._table_clusters == clusters:
                return clusters, first, blocks
            self.release(run)

    def clusters(self) -> list[int]:
        """Where these counts themselves lie."""
        return [*self.table_clusters(), *self.block_clusters()]

    def become(self, other: Refcounts) -> None:
        """The header names these instead, all of which is written."""
        self._table = other._table
        self._table_offset, self._table_clusters = other._table_offset, other._table_clusters
        self._blocks, self._dirty = other._blocks, other._dirty

    def _add_full_blocks(self, index: int, place: int, blocks: int, used: int) -> None:
        """Write blocks to clusters from `place` on, of which the first `used` clusters that they
        count are in use."""
        for number in range(blocks):
            block = RefcountBlock(bytes(self._header.cluster_size), self._header.refcount_order)
            for count in range(min(used - number * self._entries, self._entries)):
                block.set(count, 1)
            self._host.write((place + number) << self._bits, block.pack(0, self._entries))
            self._blocks.pop(index + number, None)

    def reserve(self, wanted: int) -> list[int]:
        """Between one and `wanted` clusters, durable as `take` says."""
        run = self._find(self._hint, wanted)
        if not run:
            raise self._no_room()
        self._reserve(run)
        self._hint = run[-1] + 1
        return run

    def _find(self, start: int, wanted: int) -> list[int]:
        """Free clusters from `start` on, ascending: `wanted`, or fewer if the host has no more.

        Makes the blocks that count them, in memory.
        """
        found: list[int] = []
        cluster = start
        most = self._host.most()
        end = (LARGEST_OFFSET if most is None else most) >> self._bits
        while len(found) < wanted:
            if cluster >= end:
                break
            index, place = divmod(cluster, self._entries)
            block = self._block(index)
            if block is None:
                block = self._add_block(index, cluster)
                if block is None:
                    cluster = start = max(start, self._hint)
                    found.clear()
                    continue
            try:
                place = block.counts.index(0, place)
            except ValueError:
                cluster = (index + 1) * self._entries
                continue
            cluster = index * self._entries + place
            free = block.free_from(place, min(wanted - len(found), end - cluster))
            if free and not self._metadata.overlaps(cluster, free):
                found.extend(range(cluster, cluster + free))
                cluster += free
                continue
            if cluster < end and not self._metadata.overlaps(cluster):
                found.append(cluster)
            cluster += 1
        return found

    def _no_room(self) -> DriverError:
        most = self._host.most()
        if most is None:
            return DriverError("the image can't grow any further", errno=errno.EFBIG)
        return NoSpace(f"{shown(self._host.path)} has only {most} bytes: extend it first")

    def _add_block(self, index: int, cluster: int) -> RefcountBlock | None:
        """Put a new block into the first free cluster that it counts itself.

        None: the table had to be moved first, search again.
        """
        if index >= len(self._table):
            self._grow_table(index)
            return None
        while self._metadata.overlaps(cluster):
            cluster += 1
        if cluster // self._entries != index:
            raise CorruptImage(f"metadata fill all of refcount block {index}'s clusters")
        self._host.grow((cluster + 1) << self._bits)
        block = RefcountBlock(bytes(self._header.cluster_size), self._header.refcount_order)
        block.set(cluster % self._entries, 1)
        # The block is complete and durable before the table names it.
        self._host.write_durably(cluster << self._bits, block.pack(0, self._entries))
        offset = cluster << self._bits
        self._host.write_durably(self._table_offset + index * 8, offset.to_bytes(8, "big"))
        self._table[index] = offset
        self._metadata.add(cluster)
        self._fresh = max(self._fresh, cluster + 1)
        self._keep(index, block)
        return block

    def _grow_table(self, index: int) -> None:
        """Move the table to where it has room for `index` and half as much again.

        It goes behind all that the old table can count, with the blocks that count it.
        """
        entry_count = index + 1 + (index + 1) // 2
        per_cluster = self._header.cluster_size // 8
        start = len(self._table) * self._entries
        first_block = len(self._table)
        table_clusters = blocks = 0
        while True:
            needed_table = -(-max(entry_count, first_block + blocks) // per_cluster)
            needed_blocks = -(-(needed_table + blocks) // self._entries)
            if (needed_table, needed_blocks) == (table_clusters, blocks):
                break
            table_clusters, blocks = needed_table, max(needed_blocks, blocks)
        size = table_clusters * self._header.cluster_size
        if size > layout.MAX_REFCOUNT_TABLE_BYTES and table_clusters > 1:
            raise DriverError(
                "the image's refcount table can't grow any further", errno=errno.EFBIG
            )
        used = table_clusters + blocks
        if self._metadata.overlaps(start, used):
            raise CorruptImage("metadata lie where nothing counts them")
        self._host.grow((start + used) << self._bits)
        table = array("Q", bytes(size))
        table[: len(self._table)] = self._table
        for number in range(blocks):
            table[first_block + number] = (start + table_clusters + number) << self._bits
        self._add_full_blocks(first_block, start + table_clusters, blocks, used)
        packed = array("Q", table)
        if sys.byteorder == "little":
            packed.byteswap()
        self._host.write(start << self._bits, packed.tobytes())
        self._host.flush()
        self._move_table(start << self._bits, table_clusters)
        old_first, old_count = self._table_offset >> self._bits, self._table_clusters
        self._table = table
        self._table_offset, self._table_clusters = start << self._bits, table_clusters
        self._metadata.add(start, used)
        self._fresh = max(self._fresh, start + used)
        self._metadata.remove(old_first, old_count)
        self.release(range(old_first, old_first + old_count))

    def _reserve(self, run: Sequence[int]) -> None:
        """Make durable that these are used, and that they are zero."""
        reservation = self._count(run)
        try:
            self._make_durable(reservation)
        except DriverError:
            self.release(run)
            raise
        self._fresh = max(self._fresh, run[-1] + 1)

    def _count(self, run: Sequence[int]) -> _Reservation:
        """Have the host told that these are used, which nobody uses."""
        self._host.grow((run[-1] + 1) << self._bits)
        reservation = _Reservation(runs(run))
        for first, count in reservation.runs:
            if first < self._fresh:
                reservation.used_before.append((first, min(count, self._fresh - first)))
            while count:
                index, place = divmod(first, self._entries)
                part = min(count, self._entries - place)
                block = self._block(index)
                assert block is not None
                block.fill(place, place + part, 1)
                self._dirty.add(index)
                if self._header.refcount_bits >= 8:
                    at = self._table[index] + place * self._header.refcount_bits // 8
                    reservation.counts.append((at, block.pack(place, place + part)))
                first, count = first + part, count - part
        try:
            self.write()
        except DriverError:
            self.release(run)
            raise
        return reservation

    def _make_durable(self, reservation: _Reservation) -> None:
        """What is counted already, and zero.  Without the lock, too: touches nothing else."""
        for first, count in reservation.used_before:
            self._host.zero(first << self._bits, count << self._bits, may_unmap=True)
        for first, count in reservation.runs:
            self._host.allocate(first << self._bits, count << self._bits)
        # A flush waits for the guest's data too: only where there are zeroes to wait for, and where
        # single writes are not possible, or take longer.
        if reservation.used_before or not 0 < len(reservation.counts) <= _FEW:
            self._host.flush()
        else:
            for offset, data in reservation.counts:
                self._host.write_durably(offset, data)

    # -- reserving ahead ----------------------------------------------------------------------

    @property
    def wants_more(self) -> bool:
        """Whether the store is low and likely to be needed, and nobody fills it."""
        return (
            self._goes_on
            and len(self._pool) < self._run // 2
            and not self._arrived
            and not self._under_way.locked()
        )

    def reserve_ahead(self) -> Callable[[], None]:
        """Begin to reserve some more for `take`.

        What is returned has to be called, without the lock, to get on with it and to end it.
        """
        self._under_way.acquire()
        try:
            run = self._find(self._hint, self._run)
            if not run:
                raise self._no_room()
            reservation = self._count(run)
            self._hint = run[-1] + 1
            self._run = min(self._run * 2, self._longest_run)
        except BaseException:
            self._under_way.release()
            raise
        return partial(self._complete, reservation)

    def _complete(self, reservation: _Reservation) -> None:
        try:
            self._make_durable(reservation)
            reservation.durable = True
        finally:
            self._arrived.append(reservation)
            self._under_way.release()

    def await_arrival(self) -> None:
        """Have all that is being reserved ahead in the store: nobody does that any more then."""
        with self._under_way:
            self._receive()

    def _receive(self) -> None:
        while self._arrived:
            reservation = self._arrived.popleft()
            for first, count in reservation.runs:
                run = range(first, first + count)
                if reservation.durable:
                    self._pool.extend(run)
                    self._fresh = max(self._fresh, run.stop)
                else:
                    self.release(run)

    # -- releasing ----------------------------------------------------------------------------

    def release(self, clusters: Iterable[int]) -> None:
        """One use less of each, as soon as what says so is durable: `take_released`, `free`."""
        self._released.extend(runs(clusters))

    @property
    def released(self) -> int:
        """Runs that wait."""
        return len(self._released)

    def take_released(self) -> list[tuple[int, int]]:
        """All that was released until now, for `free` after the next flush."""
        released, self._released = self._released, []
        return released

    def released_again(self, released: Iterable[tuple[int, int]]) -> None:
        """The flush failed: they wait for another."""
        self._released.extend(released)

    def free(self, released: Iterable[tuple[int, int]]) -> None:
        """Lower the counts; what nobody uses any more is given back to the host."""
        emptied = []
        for first, count in released:
            for cluster in range(first, first + count):
                if self.change(cluster, -1) == 0:
                    emptied.append(cluster)
        self._give_space_back(emptied)

    def free_many(self, clusters: Sequence[int]) -> None:
        """As `free`, for clusters in any order."""
        self._give_space_back(self.change_many(sorted(clusters), -1))

    def _give_space_back(self, emptied: Sequence[int]) -> None:
        self.give_space_back(runs(emptied))

    def give_space_back(self, given: Sequence[tuple[int, int]]) -> None:
        """Runs that nobody uses any more, and whose counts say so."""
        for first, count in given:
            self._hint = min(self._hint, first)
            self._metadata.remove(first, count)
        self.write()
        for first, count in given:
            self._host.punch(first << self._bits, count << self._bits)

    def _free_pool(self) -> list[int]:
        """What was reserved and not taken."""
        self.await_arrival()
        pool, self._pool = sorted(self._pool), deque()
        self.free(runs(pool))
        return pool

    def give_back(self) -> None:
        """Before closing: what was reserved and not taken is free again."""
        pool = self._free_pool()
        end = self._fresh
        while pool and pool[-1] == end - 1:
            pool.pop()
            end -= 1
        cuts = end < self._fresh and self._host.most() is None
        if cuts and self._host.size() == self._fresh << self._bits:
            self._host.truncate(end << self._bits)
            self._fresh = end


def _uncounted(cluster: int) -> CorruptImage:
    return CorruptImage(f"host cluster {cluster} is in use and has no refcount")


def runs(clusters: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending clusters as runs of neighbours: first and count."""
    found: list[tuple[int, int]] = []
    for cluster in clusters:
        if found and sum(found[-1]) == cluster:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((cluster, 1))
    return found
