"""Writing to an image: in place where a cluster is its own, otherwise into a new one.

A batch of requests is planned under the image's lock, carried out without it, and linked into the
L2 tables under it again.  Rules of order (what a crash may leave):

* A new cluster's count and zeroes are durable before it is known here (`refcounts`), so its L2
  entry may reach the disk before its data: the guest sees old zeroes then.
* Where anything but zeroes is replaced, the new data is made durable before the L2 entry is
  written: the guest sees the old or the new content, never zeroes or another's bytes.
* L2 entries are in the host's hands before a request is answered.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Final

import attrs

from xbd.core.driver import DriverError, WriteRequest
from xbd.core.driver.buffers import Cursor, gather, total
from xbd.core.hostio.parallel import Piece
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.host import Transfer
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET_MASK, ZERO
from xbd.drivers.qcow2.tables import pack_table

_LONGEST_WRITE: Final = MIB
"""In bytes: longer ones are not faster."""

_MOST_SPARE: Final = 2 * MIB
"""In bytes: memory that is kept."""

_CHEAP: Final = 16 * KIB
"""Bytes that are read in vain, rather than making one more read."""


@attrs.define(eq=False)
class _Part:
    """What a request has for one cluster."""

    request: WriteRequest
    offset: int
    length: int
    buffers: Sequence[memoryview]

    @property
    def end(self) -> int:
        return self.offset + self.length


@attrs.define(eq=False)
class _InPlace:
    """Bytes for clusters that can be written as they are."""

    request: WriteRequest
    host: int
    length: int
    buffers: list[memoryview]
    clusters: list[int]
    """Of the disk."""


@attrs.define(eq=False)
class _Allocation:
    """A cluster of the disk that gets another mapping."""

    cluster: int
    host: int
    """Offset in the data file."""
    zeroed: bool
    """What lies there now are zeroes, for sure."""
    taken: bool
    """Reserved for this: to be released if nothing comes of it."""
    fill: int
    """A bit for each subcluster that is to be complete afterwards."""
    release: list[int] = attrs.field(factory=list)
    """Host clusters that are used once less afterwards."""
    parts: list[_Part] = attrs.field(factory=list)
    copies: list[tuple[int, memoryview]] = attrs.field(factory=list)
    """What is to be read before: from where on the disk, into what."""
    old_is_zero: bool = False
    """Whether the cluster reads as zeroes, as far as its own entry says."""
    replaces: bool = True
    """Whether something but zeroes is replaced."""
    was_nowhere: bool = False
    """It had no entry: who is lent the table may make one."""
    error: DriverError | None = None

    @property
    def clusters(self) -> Sequence[int]:
        """Of the disk."""
        return (self.cluster,)


@attrs.define(eq=False)
class _Write:
    """Bytes on their way to the data file, and who fails with them."""

    host: int
    buffers: Sequence[memoryview]
    owner: WriteRequest | _Allocation


class Writer:
    """Writes to one image; any number of batches at a time."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._tables = image.tables
        self._unit = image.tables.subcluster_size
        self._bits = image.header.cluster_bits
        self._spare: list[memoryview] = []
        """Memory for clusters, to be used again: new memory costs as much as reading into it."""

    def write(self, requests: Sequence[WriteRequest]) -> list[tuple[int, int]]:
        """Write all; each request's `error` says how it went.

        Returns the ranges (offset and length) of the disk that lie elsewhere now: what `resolve`
        said of them before holds no longer, or somebody else has still to say so.
        """
        moved: list[tuple[int, int]] = []
        parts = [part for request in requests for part in self._parts(request) if part.length]
        with self._image.using():
            while parts:
                parts = self._round(parts, moved)
        self.settle(requests)
        return moved

    def settle(self, requests: Sequence[WriteRequest]) -> None:
        """After these requests: `Image.settle`, and what has moved has moved even if that fails."""
        try:
            self._image.settle()
        except DriverError as error:
            for request in requests:
                request.error = request.error or error

    def _parts(self, request: WriteRequest) -> list[_Part]:
        """A request cut at the borders of clusters."""
        cluster = self._tables.cluster_size
        offset = request.offset
        end = offset + total(request.buffers)
        if offset // cluster == (end - 1) // cluster:
            return [_Part(request, offset, end - offset, request.buffers)]
        cursor = Cursor(request.buffers)
        parts = []
        while offset < end:
            length = min(end, offset - offset % cluster + cluster) - offset
            parts.append(_Part(request, offset, length, cursor.take(length)))
            offset += length
        return parts

    def _round(self, parts: list[_Part], moved: list[tuple[int, int]]) -> list[_Part]:
        """Write what can be written now; returns what has to wait for other batches."""
        image = self._image
        in_place: list[_InPlace] = []
        mine: dict[int, _Allocation] = {}
        try:
            with image.lock:
                later = self._plan_some(parts, in_place, mine)
                while later and not (in_place or mine):
                    image.unblocked.wait()
                    later = self._plan_some(later, in_place, mine)
                self._note_moving([*in_place, *mine.values()], moved)
            self._carry_out(in_place, list(mine.values()))
            later += self._link(list(mine.values()), moved)
        finally:
            if mine:
                with image.lock:
                    image.allocating.difference_update(mine)
                    image.unblocked.notify_all()
        return later

    # -- planning, under the lock -------------------------------------------------------------

    def _note_moving(
        self, planned: Sequence[_InPlace | _Allocation], moved: list[tuple[int, int]]
    ) -> None:
        """Who writes where a cluster has just moved to waits until everybody knows that."""
        if self._image.moved is not None:
            for one in planned:
                for cluster in one.clusters:
                    if cluster in self._image.moved:
                        moved.append((cluster << self._bits, self._tables.cluster_size))

    def _plan_some(
        self, parts: Sequence[_Part], in_place: list[_InPlace], mine: dict[int, _Allocation]
    ) -> list[_Part]:
        """Plan what can be planned now; returns what has to wait for other batches."""
        later = []
        for part in parts:
            try:
                self._image.require_writable()
                if not self._plan(part, in_place, mine):
                    later.append(part)
            except CorruptImage as error:
                self._image.mark_corrupt(error)
                part.request.error = error
            except DriverError as error:
                part.request.error = error
        return later

    def _plan(self, part: _Part, in_place: list[_InPlace], mine: dict[int, _Allocation]) -> bool:
        """Find a place for a part; False: another batch is just making one."""
        number = part.offset >> self._bits
        allocation = mine.get(number)
        if allocation is not None:
            allocation.parts.append(part)
            allocation.fill |= self._touched(part) & ~self._allocated(number, allocation)
            return True
        if number in self._image.allocating:
            return False
        index, place = divmod(number, self._tables.l2_entries)
        table = writable_l2(self._image, index, look=True)
        # Once: who is lent the table may change it.
        entry = table[2 * place if self._tables.extended else place]
        bitmap = table[2 * place + 1] if self._tables.extended else 0
        host = self._host_for(entry, bitmap, part)
        if host is None:
            allocation = self._allocate(entry, bitmap, number, part)
            allocation.parts.append(part)
            mine[number] = allocation
            self._image.allocating.add(number)
            return True
        last = in_place[-1] if in_place else None
        if last and last.request is part.request and last.host + last.length == host:
            last.buffers.extend(part.buffers)
            last.length += part.length
            last.clusters.append(number)
        else:
            buffers = list(part.buffers)
            in_place.append(_InPlace(part.request, host, part.length, buffers, [number]))
        return True

    def _host_for(self, entry: int, bitmap: int, part: _Part) -> int | None:
        """Where a part may simply be written."""
        tables = self._tables
        if tables.extended:
            if not entry & COMPRESSED:
                tables.check_bitmap(entry, bitmap)
            touched = self._touched(part)
            writable = bitmap & touched == touched
        else:
            writable = not entry & ZERO
        if entry & COMPRESSED or not (entry & COPIED and writable and tables.has_host(entry)):
            return None
        host = tables.host_offset(entry)
        self._require_a_place_for_data(host)
        return host + part.offset % tables.cluster_size

    def _require_a_place_for_data(self, host: int) -> None:
        image, cluster = self._image, host >> self._bits
        if image.data_host is not image.host:
            return
        if image.metadata.overlaps(cluster):
            raise CorruptImage(f"{image}: guest data would lie over metadata, at {host:#x}")
        if cluster >= image.refcounts.end and not image.refcounts.get(cluster):
            raise CorruptImage(f"{image}: guest data would lie behind its end, at {host:#x}")

    def _touched(self, part: _Part) -> int:
        """A bit for each subcluster in which bytes of the part lie."""
        start = part.offset % self._tables.cluster_size
        first, last = start // self._unit, (start + part.length - 1) // self._unit
        return (2 << last) - (1 << first)

    def _allocated(self, number: int, allocation: _Allocation) -> int:
        """Subclusters that stay where they are, and are complete."""
        if not self._tables.extended or allocation.taken:
            return 0
        index, place = divmod(number, self._tables.l2_entries)
        table = self._tables.l2(index)
        return 0 if table is None else table[2 * place + 1] & ALL_ALLOCATED

    def _allocate(self, entry: int, bitmap: int, number: int, part: _Part) -> _Allocation:
        image, tables = self._image, self._tables
        fill = self._touched(part)
        if entry & COMPRESSED:
            whole = ALL_ALLOCATED if tables.extended else 1
            packed = compressed_clusters(image, entry)
            image.require_data(packed)
            return self._new(number, whole, packed)
        zero = not tables.extended and bool(entry & ZERO)
        if not tables.has_host(entry):
            allocation = self._new(number, fill, [], old_is_zero=zero or image.backing is None)
            allocation.was_nowhere = not entry and not tables.extended
            return allocation
        host = tables.host_offset(entry)
        kept = bitmap & ALL_ALLOCATED
        if entry & COPIED:
            self._require_a_place_for_data(host)
            return _Allocation(number, host, False, False, fill & ~kept, old_is_zero=zero)
        if image.data_host is image.host:
            image.require_data([host >> self._bits])
        return self._new(number, fill | kept, [host >> self._bits], old_is_zero=zero)

    def _new(
        self, number: int, fill: int, release: list[int], *, old_is_zero: bool = False
    ) -> _Allocation:
        image = self._image
        if image.data_host is not image.host:
            # In an external data file each cluster has its own place; nothing counts them.
            host = number << self._bits
            image.data_host.grow(min(host + image.header.cluster_size, image.size))
            return _Allocation(number, host, False, False, fill, old_is_zero=old_is_zero)
        host = image.refcounts.take() << self._bits
        # Zeroes in the file are no zeroes once they are decrypted.
        zeroed = image.cipher is None
        return _Allocation(
            number, host, zeroed, True, fill, release=release, old_is_zero=old_is_zero
        )

    # -- carrying out, without the lock -------------------------------------------------------

    def _carry_out(self, in_place: list[_InPlace], mine: list[_Allocation]) -> None:
        image = self._image
        writes = [_Write(one.host, one.buffers, one.request) for one in in_place]
        writes += self._assemble_all(self._copy(mine))
        joined = _join(writes)
        transfers = [self._transfer(group[0].host, _buffers(group)) for group in joined]
        for group, failure in zip(joined, image.data_host.writev(transfers), strict=True):
            if failure is not None:
                for write in group:
                    write.owner.error = failure
        replacing = [one for one in mine if one.replaces and one.error is None]
        if replacing:
            try:
                image.data_host.flush()
            except DriverError as error:
                for allocation in replacing:
                    allocation.error = error

    def _copy(self, mine: Sequence[_Allocation]) -> Sequence[_Allocation]:
        """Write clusters of which all the old content simply lies somewhere, each as soon as that
        is read.  Returns those that are not written, whatever the reason."""
        if not self._image.data_host.direct:
            return mine
        found = [(one, copy) for one in mine if (copy := self._copy_of(one)) is not None]
        if not found:
            return mine
        done = self._image.data_host.copy([copy for _, copy in found])
        written = {id(one) for (one, _), whole in zip(found, done, strict=True) if whole}
        for _, ((_, _, memory), _) in found:
            if len(self._spare) < max(1, _MOST_SPARE >> self._bits):
                self._spare += memory
        return [one for one in mine if id(one) not in written]

    def _copy_of(self, allocation: _Allocation) -> tuple[Piece, Transfer] | None:
        """What to read, and what to write then; None: it has to be looked at more closely."""
        image, size = self._image, self._tables.cluster_size
        if allocation.old_is_zero or self._tables.extended or image.cipher is not None:
            return None
        if image.data_host is not image.host:
            return None  # it shall not become longer than the disk
        start = allocation.cluster << self._bits
        parts = sorted(allocation.parts, key=lambda part: part.offset)
        unit = image.data_host.alignment.offset
        at = start
        for part in parts:
            if part.offset < at or (part.offset | part.length) % unit:
                return None
            if any(buffer.readonly for buffer in part.buffers):
                return None
            at = part.end
        extent = image.resolve(start, size)
        if extent is None or extent.length < size:
            return None
        old = self._spare.pop() if self._spare else image.buffer(size)
        new: list[memoryview] = []
        at = start
        for part in parts:
            if at < part.offset:
                new.append(old[at - start : part.offset - start])
            new += part.buffers
            at = part.end
        if at < start + size:
            new.append(old[at - start :])
        return (extent.fd, extent.offset, [old]), Transfer(allocation.host, new)

    def _assemble_all(self, mine: Sequence[_Allocation]) -> list[_Write]:
        """What to write for allocations, with what has to be copied read already."""
        assembled: list[tuple[_Allocation, list[_Write]]] = []
        for allocation in mine:
            try:
                assembled.append((allocation, self._assemble(allocation)))
            except DriverError as error:
                allocation.error = error
        copies = [(one, *copy) for one, _ in assembled for copy in one.copies]
        results = self._image.read_many([(offset, buffer) for _, offset, buffer in copies])
        for (allocation, _, _), failure in zip(copies, results, strict=True):
            allocation.error = allocation.error or failure
        return [write for one, writes in assembled if one.error is None for write in writes]

    def _assemble(self, allocation: _Allocation) -> list[_Write]:
        """What to write for an allocation: where, what, and who fails with it."""
        image = self._image
        start = allocation.cluster << self._bits
        spans = self._spans(allocation)
        old_is_zero = allocation.old_is_zero or all(
            image.is_zero(low, high - low) for low, high in spans
        )
        allocation.replaces = not (allocation.zeroed and old_is_zero)
        if not allocation.replaces:
            return [
                _Write(allocation.host + part.offset - start, part.buffers, part.request)
                for part in allocation.parts
            ]
        writes: list[_Write] = []
        for low, high in spans:
            buffers = self._fill(low, high, allocation, zero=old_is_zero)
            writes.append(_Write(allocation.host + low - start, buffers, allocation))
        for part in allocation.parts:
            if not any(low <= part.offset and part.end <= high for low, high in spans):
                # Some of it lies in subclusters that are there already.
                host = allocation.host + part.offset - start
                writes.append(_Write(host, part.buffers, part.request))
        return writes

    def _spans(self, allocation: _Allocation) -> list[tuple[int, int]]:
        """The ranges of the disk that are to be complete, by subclusters."""
        start = allocation.cluster << self._bits
        spans = []
        number = 0
        while allocation.fill >> number:
            if allocation.fill >> number & 1:
                first = number
                while allocation.fill >> number & 1:
                    number += 1
                spans.append((start + first * self._unit, start + number * self._unit))
            else:
                number += 1
        if spans and self._image.data_host is not self._image.host:
            # It is no longer than the disk.
            low, high = spans[-1]
            spans[-1] = (low, min(high, self._image.size))
        return spans

    def _fill(
        self, low: int, high: int, allocation: _Allocation, *, zero: bool
    ) -> list[memoryview]:
        """The new content of a range: the parts', and room for what was there around them.

        What is to be read into it is in `allocation.copies` then.
        """
        parts = allocation.parts
        inside = sorted(
            (part for part in parts if part.offset < high and low < part.end),
            key=lambda part: part.offset,
        )
        apart = all(a.end <= b.offset for a, b in pairwise(inside))
        if not apart or any(part.offset < low or high < part.end for part in inside):
            return [self._overlay(low, high, parts, zero=zero)]
        gaps = _gaps(low, high, inside)
        within = high - low - sum(stop - start for start, stop in gaps)
        if zero or len(gaps) < 2 or within > _CHEAP:
            old = [self._old(start, stop, allocation, zero=zero) for start, stop in gaps]
        else:
            # One read costs less than two.
            content = self._old(low, high, allocation, zero=False)
            old = [content[start - low : stop - low] for start, stop in gaps]
        pieces = [(start, [buffer]) for (start, _), buffer in zip(gaps, old, strict=True)]
        pieces += [(part.offset, list(part.buffers)) for part in inside]
        pieces.sort(key=itemgetter(0))
        return [buffer for _, buffers in pieces for buffer in buffers]

    def _old(self, low: int, high: int, allocation: _Allocation, *, zero: bool) -> memoryview:
        """Room for what was there, or zeroes."""
        buffer = self._image.buffer(high - low)
        if not zero:
            allocation.copies.append((low, buffer))
        return buffer

    def _overlay(self, low: int, high: int, parts: Sequence[_Part], *, zero: bool) -> memoryview:
        """As `_fill`, for parts that overlap each other or the range's ends: the later one wins."""
        content = self._image.buffer(high - low)
        if not zero:
            self._image.readv(low, [content])
        for part in parts:
            start, stop = max(low, part.offset), min(high, part.end)
            if start < stop:
                cursor = Cursor(part.buffers)
                cursor.take(start - part.offset)
                gather(cursor.take(stop - start), content[start - low : stop - low])
        return content

    def _transfer(self, host: int, buffers: list[memoryview]) -> Transfer:
        cipher = self._image.cipher
        if cipher is None:
            return Transfer(host, buffers)
        secret = self._image.buffer(total(buffers))
        gather(buffers, secret)
        cipher.encrypt(secret, host // layout.SECTOR)
        return Transfer(host, [secret])

    # -- linking, under the lock --------------------------------------------------------------

    def _link(self, mine: Sequence[_Allocation], moved: list[tuple[int, int]]) -> list[_Part]:
        """Let the L2 tables name what was written; returns what has to be written again."""
        if not mine:
            return []
        done: dict[int, list[_Allocation]] = {}
        again: list[_Part] = []
        with self._image.lock:
            for allocation in mine:
                if allocation.error is not None or self._all_failed(allocation):
                    self._drop(allocation)
                else:
                    index = allocation.cluster // self._tables.l2_entries
                    done.setdefault(index, []).append(allocation)
            for index, allocations in done.items():
                with self._tables.alone(index):
                    again += self._link_in(index, allocations, moved)
        return again

    def _link_in(
        self, index: int, allocations: Sequence[_Allocation], moved: list[tuple[int, int]]
    ) -> list[_Part]:
        again: list[_Part] = []
        try:
            late = self._linked_meanwhile(index, allocations)
            for allocation in late:
                self._drop(allocation)
                again += allocation.parts
            allocations = [one for one in allocations if one not in late]
            self._store(index, allocations, moved)
        except DriverError as error:
            for allocation in allocations:
                _fail(allocation, error)
            self._give_up(index, allocations)
            return again
        for allocation in allocations:
            self._image.refcounts.release(allocation.release)
        return again

    def _linked_meanwhile(
        self, index: int, allocations: Sequence[_Allocation]
    ) -> list[_Allocation]:
        """Those for which somebody who was lent the table has made an entry."""
        table = self._tables.l2(index)
        if table is None:
            return []
        entries = self._tables.l2_entries
        return [one for one in allocations if one.was_nowhere and table[one.cluster % entries]]

    def _give_up(self, index: int, allocations: Sequence[_Allocation]) -> None:
        """The table could not be written, or not all of it: see which clusters it names now."""
        tables, refcounts = self._tables, self._image.refcounts
        try:
            table = tables.l2(index)
        except DriverError:
            return  # nothing is known, so nothing is given up
        for allocation in allocations:
            place = allocation.cluster % tables.l2_entries
            entry = 0 if table is None else table[place * 2 if tables.extended else place]
            if not entry & COMPRESSED and entry & OFFSET_MASK == allocation.host:
                refcounts.release(allocation.release)
            elif allocation.taken:
                refcounts.release([allocation.host >> self._bits])

    @staticmethod
    def _all_failed(allocation: _Allocation) -> bool:
        return all(part.request.error is not None for part in allocation.parts)

    def _drop(self, allocation: _Allocation) -> None:
        if allocation.error is not None:
            _fail(allocation, allocation.error)
        if allocation.taken:
            self._image.refcounts.release([allocation.host >> self._bits])

    def _store(
        self, index: int, allocations: Sequence[_Allocation], moved: list[tuple[int, int]]
    ) -> None:
        if not allocations:
            return
        tables = self._tables
        table = writable_l2(self._image, index)
        words = {}
        for allocation in allocations:
            place = allocation.cluster % tables.l2_entries
            entry = allocation.host | COPIED
            if tables.extended:
                old, bitmap = table[2 * place], table[2 * place + 1]
                if old & COMPRESSED:
                    bitmap = 0
                words[2 * place] = entry
                words[2 * place + 1] = bitmap & ~(allocation.fill << 32) | allocation.fill
            else:
                words[place] = entry
        self._image.remap(index, words, moved)


def _gaps(low: int, high: int, parts: Sequence[_Part]) -> list[tuple[int, int]]:
    """What these, in order and apart from each other, leave of a range."""
    starts = [low, *(part.end for part in parts)]
    stops = [*(part.offset for part in parts), high]
    return [(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]


def _join(writes: list[_Write]) -> list[list[_Write]]:
    """Neighbours in the data file together, up to `_LONGEST_WRITE`."""
    if len(writes) == 1:
        return [writes]
    groups: list[list[_Write]] = []
    end = length = -1
    for write in sorted(writes, key=lambda write: write.host):
        size = total(write.buffers)
        if write.host == end and length + size <= _LONGEST_WRITE:
            groups[-1].append(write)
            length += size
        else:
            groups.append([write])
            length = size
        end = write.host + size
    return groups


def _buffers(group: Sequence[_Write]) -> list[memoryview]:
    return [buffer for write in group for buffer in write.buffers]


def _fail(allocation: _Allocation, error: DriverError) -> None:
    for part in allocation.parts:
        part.request.error = error


def writable_l2(image: Image, index: int, *, look: bool = False) -> array[int]:
    """The L2 table of an L1 entry, made or copied if nobody may write to it.  Under the lock.

    `look`: who was lent it may go on making entries there.
    """
    tables = image.tables
    entry = tables.l1[index]
    if entry & COPIED:
        table = tables.look(index) if look else tables.l2(index)
        if table is not None:
            return table
    old = tables.l2(index)
    cluster = image.refcounts.take_metadata()
    offset = cluster << tables.bits
    try:
        if old is None:
            # It reads as zeroes, durably: the L1 entry may come at any time.
            table = array("Q", bytes(tables.cluster_size))
        else:
            table = array("Q", old)
            image.host.write(offset, pack_table(table))
            image.host.flush()
        tables.set_l1(index, offset | COPIED)
    except DriverError:
        image.refcounts.release([cluster])
        raise
    tables.keep(offset, table)
    if old is not None:
        image.metadata.remove((entry & OFFSET_MASK) >> tables.bits)
        image.refcounts.release([(entry & OFFSET_MASK) >> tables.bits])
    return table


def compressed_clusters(image: Image, entry: int) -> list[int]:
    """The host clusters in which a compressed cluster's bytes lie."""
    bits = image.header.cluster_bits
    offset, length = layout.compressed_extent(entry, bits)
    return list(range(offset >> bits, (offset + length - 1 >> bits) + 1))


def given_up(image: Image, old: int, new: int) -> list[int]:
    """Host clusters that an L2 entry names no longer when it becomes `new`."""
    tables = image.tables
    if image.data_host is not image.host:
        return []
    if old & COMPRESSED:
        return [] if new == old else compressed_clusters(image, old)
    if not tables.has_host(old):
        return []
    host = tables.host_offset(old)
    kept = not new & COMPRESSED and tables.has_host(new) and tables.host_offset(new) == host
    return [] if kept else [host >> tables.bits]
