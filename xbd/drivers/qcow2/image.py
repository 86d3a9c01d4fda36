"""An open qcow2 image: reading, what lies where, flushing, and its header.

Blocking and thread-safe.  Writing is in `writing`, discarding and zeroing in `zeroing`; they
share the locks and tables kept here.

Who uses host clusters without holding the lock (a read that is under way, I/O through resolved
extents) holds a token from `enter` until `leave`: released clusters are not used again as long as
anyone may still look at what they held before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol, TypeVar

import attrs

from xbd.core.driver import BlockStatus, DriverError, HostExtent, MediaError, ReadRequest
from xbd.core.driver.buffers import aligned_buffer
from xbd.core.hostio.failures import shown
from xbd.core.units import MIB
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.compressed import ClusterCache, Codec, codec_for
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header, pack_header
from xbd.drivers.qcow2.host import PAGE, Host
from xbd.drivers.qcow2.layout import COPIED, Incompatible
from xbd.drivers.qcow2.metadata import locate_metadata
from xbd.drivers.qcow2.metadata_map import MetadataMap
from xbd.drivers.qcow2.reading import Reader
from xbd.drivers.qcow2.refcounts import LARGEST_OFFSET, Refcounts
from xbd.drivers.qcow2.tables import Kind, Piece, Tables
from xbd.drivers.qcow2.unpacking import Unpacker

ExtentT = TypeVar("ExtentT", HostExtent, HostExtent | None)

DEFAULT_CACHE_BYTES: Final = 8 * MIB
"""L2 tables in memory: 64 GiB of clusters of 64 KiB."""

MOST_RELEASED: Final = 256
"""Runs of released clusters that wait for the guest to flush, before the image does."""

_NOT_PLAIN: Final = layout.COMPRESSED | layout.ZERO

MOST_EXTENTS: Final = 64
"""That one look at the tables finds: some 50 us where no cluster follows the one before it."""


class Backing(Protocol):
    """What lies behind an image.  Nothing is ever written to it."""

    @property
    def size(self) -> int: ...

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Behind its end there are zeroes."""

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Read all; each request's `error` says how it went.  Behind its end there are zeroes."""

    def status(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """The range in pieces: length, and whether it reads as zeroes."""

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether a range reads as zeroes for sure."""

    def resolve(self, offset: int, length: int) -> HostExtent | None:
        """Where the first bytes of the range simply lie, if they do.  No I/O."""

    def resolve_all(self, offset: int, length: int) -> list[HostExtent]:
        """As much of the range as simply lies somewhere, up to `MOST_EXTENTS`.  No I/O."""

    def zeroes(self, offset: int, length: int) -> int:
        """How much of the range reads as zeroes for sure, from its beginning on.  No I/O."""

    def in_memory(self, offset: int, length: int) -> bool:
        """Whether these know all they can.  No I/O."""

    def load(self, offset: int, length: int) -> None:
        """Have it so."""

    def close(self) -> None: ...


class Cipher(Protocol):
    """Encryption of whole sectors in place; `first_sector` counts them in the host file."""

    def decrypt(self, data: bytearray | memoryview, first_sector: int) -> None: ...

    def encrypt(self, data: bytearray | memoryview, first_sector: int) -> None: ...


class Moved:
    """Clusters of the disk that lie elsewhere now, until nobody looks for them where they were.

    Who writes to them there meanwhile must not be answered: a reader would not see it.
    """

    def __init__(self) -> None:
        self.stamp = 0
        """Grows with each move."""
        self._clusters: dict[int, int] = {}
        """With the stamps of their last moves."""

    def __contains__(self, cluster: int) -> bool:
        return cluster in self._clusters

    def note(self, cluster: int) -> None:
        """It has moved.  Under the image's lock."""
        self.stamp += 1
        self._clusters[cluster] = self.stamp

    def first(self, start: int, stop: int) -> int:
        """The first one of these, or `stop`."""
        if not self._clusters:
            return stop
        return min((one for one in list(self._clusters) if start <= one < stop), default=stop)

    def settled(self, start: int, stop: int, stamp: int) -> None:
        """What was known of these clusters when `stamp` was this is forgotten."""
        for cluster, moved in list(self._clusters.items()):
            if start <= cluster < stop and moved <= stamp:
                del self._clusters[cluster]


class Image:
    """An open image.  Use `opening.open_image`."""

    def __init__(
        self,
        host: Host,
        header: Header,
        *,
        writable: bool,
        data_host: Host | None = None,
        backing: Backing | None = None,
        cipher: Cipher | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.host = host
        self.data_host = host if data_host is None else data_host
        """Where guest data lies."""
        self.header = header
        self.writable = writable
        self.backing = backing
        self.cipher = cipher
        self.lock = threading.RLock()
        """Over all metadata."""
        self.unblocked = threading.Condition(self.lock)
        """Some cluster of `allocating` is done."""
        self.allocating: set[int] = set()
        """Clusters of the disk whose mapping somebody is about to change."""
        self.moved: Moved | None = None
        """Clusters of the disk that lie elsewhere now; None: nobody keeps answers of `resolve`."""
        self.metadata = MetadataMap()
        self.refcounts = Refcounts(host, header, self.metadata, self._refcount_table_moved)
        self.tables = Tables(host, header, cache_bytes)
        if writable:
            self.metadata.replace(locate_metadata(self))
        self.clusters = ClusterCache()
        self.packed_until = 0
        """Where the bytes end that were compressed last; more may follow in the same cluster, until
        that is released.  0: nowhere."""
        self.before_closing: list[Callable[[], None]] = []
        """Of those who have something that was reserved: they give it back."""
        self._codec: Codec | None = None
        self.unpacker = Unpacker(host, header.cluster_bits, self.clusters, lambda: self.codec)
        self._reader = Reader(self)
        self.read = self._reader.read
        self.read_known = self._reader.read_known
        self.broken: DriverError | None = None
        """Why nothing is written any more."""
        self._epoch = 0
        self._users: dict[object, int] = {}
        self._waiting: list[tuple[int, list[tuple[int, int]]]] = []
        """Released runs whose release is durable, each with the last epoch that may know them."""

    # -- who is using host clusters -----------------------------------------------------------

    def enter(self) -> object:
        """From now on, clusters that are released are kept as they are; see `leave`."""
        token = object()
        self._users[token] = self._epoch
        return token

    def leave(self, token: object) -> None:
        """The end of what `enter` began."""
        del self._users[token]

    @contextmanager
    def using(self) -> Iterator[None]:
        """`enter` and `leave`."""
        token = self.enter()
        try:
            yield
        finally:
            self.leave(token)

    def note_move(self, cluster: int, moved: list[tuple[int, int]] | None = None) -> None:
        """A cluster of the disk lies elsewhere now; its range goes into `moved`.  Locked."""
        if moved is not None:
            moved.append((cluster << self.header.cluster_bits, self.header.cluster_size))
        if self.moved is not None:
            self.moved.note(cluster)

    # -- reading ------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Of the disk."""
        return self.header.size

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers; behind the disk's end there are zeroes."""
        request = ReadRequest(offset, buffers)
        self.read([request])
        if request.error is not None:
            raise request.error

    def read_many(self, reads: Sequence[tuple[int, memoryview]]) -> list[DriverError | None]:
        """Fill each buffer from its offset of the disk on; what became of each.

        What simply lies somewhere, here or in the images behind, is read all at the same time.
        """
        if not reads:
            return []
        whole = [False] * len(reads)
        plain: list[tuple[int, int, list[memoryview]]] = []
        numbers = []
        with self.using():
            for number, (offset, buffer) in enumerate(reads if len(reads) > 1 else ()):
                extent = self.resolve(offset, buffer.nbytes)
                if extent is not None and extent.length >= buffer.nbytes:
                    plain.append((extent.fd, extent.offset, [buffer]))
                    numbers.append(number)
            for number, done in zip(numbers, self.host.parallel.read(plain), strict=True):
                whole[number] = done
        requests = [ReadRequest(offset, [buffer]) for offset, buffer in reads]
        self.read([one for done, one in zip(whole, requests, strict=True) if not done])
        return [request.error for request in requests]

    def pieces(self, offset: int, length: int) -> list[Piece]:
        """What lies in a range."""
        with self.lock:
            return list(self.tables.pieces(offset, length))

    @property
    def codec(self) -> Codec:
        """For compressed clusters; `OpenFailed` if what it needs is not installed."""
        if self._codec is None:
            self._codec = codec_for(self.header.compression_type)
        return self._codec

    def buffer(self, length: int) -> memoryview:
        """Memory that direct I/O takes, in whole pages: others cost it dearly."""
        return aligned_buffer(length, PAGE if length >= PAGE else self.data_host.alignment.memory)

    # -- what lies where ----------------------------------------------------------------------

    def status(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """The range in pieces: length, and whether it reads as zeroes for sure."""
        return [(status.length, status.zero) for status in self.block_status(offset, length)]

    def block_status(self, offset: int, length: int) -> list[BlockStatus]:
        """Holes are what nothing in the whole chain has stored."""
        told: list[BlockStatus] = []
        end = min(offset + length, max(self.size, offset))
        with self.using():
            for piece in self.pieces(offset, end - offset):
                if piece.kind is not Kind.UNALLOCATED:
                    zero = piece.kind is Kind.ZERO
                    told.append(BlockStatus(length=piece.length, hole=zero, zero=zero))
                elif self.backing is None:
                    told.append(BlockStatus(length=piece.length, hole=True, zero=True))
                else:
                    told.extend(
                        BlockStatus(length=size, hole=zero, zero=zero)
                        for size, zero in self.backing.status(piece.offset, piece.length)
                    )
        if end < offset + length:
            told.append(BlockStatus(length=offset + length - end, hole=True, zero=True))
        return told

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether a range reads as zeroes for sure."""
        end = min(offset + length, max(self.size, offset))
        with self.using():
            return all(self._piece_is_zero(piece) for piece in self.pieces(offset, end - offset))

    def _piece_is_zero(self, piece: Piece) -> bool:
        if piece.kind is Kind.UNALLOCATED:
            return self.backing is None or self.backing.is_zero(piece.offset, piece.length)
        return piece.kind is Kind.ZERO

    def resolve(self, offset: int, length: int, *, for_write: bool = False) -> HostExtent | None:
        """Where the first bytes of a range simply lie.

        Looks only at tables in memory, without the lock; each entry of the range costs time.
        """
        piece = self._locate(offset, length, for_write=for_write)
        if piece is None:
            return None
        if piece.kind is Kind.UNALLOCATED:
            assert self.backing is not None
            return _shortened(self.backing.resolve(piece.offset, piece.length), piece.length)
        return HostExtent(fd=self.data_host.fd, offset=piece.host, length=piece.length)

    def resolve_all(self, offset: int, length: int, *, for_write: bool = False) -> list[HostExtent]:
        """As `resolve`, for as much of a range as simply lies somewhere, up to `MOST_EXTENTS`."""
        extents: list[HostExtent] = []
        end = offset + length
        while offset < end and len(extents) < MOST_EXTENTS:
            if not for_write and (reach := self._scattered(offset, end, extents)) > offset:
                offset = reach
                continue
            piece = self._locate(offset, end - offset, for_write=for_write)
            if piece is None:
                break
            if piece.kind is Kind.UNALLOCATED:
                assert self.backing is not None
                found = self.backing.resolve_all(piece.offset, piece.length)
            else:
                found = [HostExtent(fd=self.data_host.fd, offset=piece.host, length=piece.length)]
            found = found[: MOST_EXTENTS - len(extents)]
            reach = sum(extent.length for extent in found)
            if reach > piece.length:
                found[-1] = _shortened(found[-1], found[-1].length - (reach - piece.length))
            for extent in found:
                _append(extents, extent)
            offset += min(reach, piece.length)
            if reach < piece.length:
                break
        return extents

    def zeroes(self, offset: int, length: int) -> int:
        """How much of a range reads as zeroes for sure, from its beginning on.  Behind the disk
        there are zeroes.  Looks only at tables in memory."""
        at, end = offset, offset + length
        try:
            while at < min(end, self.size):
                reach = self._zero_reach(at, min(end, self.size) - at)
                if not reach:
                    return at - offset
                at += reach
        except CorruptImage:
            return at - offset  # reading it says what is wrong
        return length

    def _zero_reach(self, offset: int, length: int) -> int:
        """As `zeroes`, of the first piece of what lies inside the disk."""
        piece = None
        if not self.tables.extended:
            piece = self._run(offset, length, holes=True)
        if piece is None:
            piece = next(self.tables.pieces(offset, length, wait=False), None)
        if piece is None or piece.kind not in (Kind.ZERO, Kind.UNALLOCATED):
            return 0
        if piece.kind is Kind.UNALLOCATED and self.backing is not None:
            return self.backing.zeroes(piece.offset, piece.length)
        return piece.length

    def _scattered(self, offset: int, end: int, extents: list[HostExtent]) -> int:
        """Clusters that lie anywhere, for reading: as `_run`, but many at a time.  How far."""
        tables, size = self.tables, self.tables.cluster_size
        if tables.extended or self.cipher is not None or offset % size:
            return offset
        index, place = divmod(offset >> tables.bits, tables.l2_entries)
        try:
            table = tables.cached(index)
        except CorruptImage:
            table = None
        if table is None:
            return offset
        fd, most = self.data_host.fd, LARGEST_OFFSET - size
        whole = min(end, self.size) - offset >> tables.bits
        start = following = 0
        for entry in table[place : place + whole]:
            host = entry & layout.OFFSET_MASK
            if not host or entry & _NOT_PLAIN or host & size - 1 or host > most:
                break
            if host != following:
                if following:
                    _append(extents, HostExtent(fd=fd, offset=start, length=following - start))
                    if len(extents) == MOST_EXTENTS:
                        return offset
                start = host
            following = host + size
            offset += size
        if following:
            _append(extents, HostExtent(fd=fd, offset=start, length=following - start))
        return offset

    def in_memory(self, offset: int, length: int) -> bool:
        """Whether `resolve` and `zeroes` know all they can of a range.  No I/O."""
        end = min(offset + length, self.size)
        for piece in self.tables.pieces(offset, end - offset, wait=False):
            offset += piece.length
            behind = self.backing if piece.kind is Kind.UNALLOCATED else None
            if behind is not None and not behind.in_memory(piece.offset, piece.length):
                return False
        return offset >= end

    def load(self, offset: int, length: int) -> None:
        """Have it so: see `in_memory`."""
        for piece in self.pieces(offset, min(length, self.size - offset)):
            if piece.kind is Kind.UNALLOCATED and self.backing is not None:
                self.backing.load(piece.offset, piece.length)

    def simply_lies(self, offset: int, length: int) -> bool:
        """Whether all of a range lies somewhere or reads as zeroes, as far as is in memory."""
        end = offset + length
        while offset < end:
            found = sum(extent.length for extent in self.resolve_all(offset, end - offset))
            found = found or self.zeroes(offset, end - offset)
            if not found:
                return False
            offset += found
        return True

    def _locate(self, offset: int, length: int, *, for_write: bool) -> Piece | None:
        """The piece at `offset`, if it simply lies somewhere: here, or behind this image."""
        if for_write and (not self.writable or self.broken is not None):
            return None
        if self.cipher is not None:
            return None
        try:
            return self._locate_piece(offset, length, for_write=for_write)
        except CorruptImage:
            return None  # the slow way says what is wrong

    def _locate_piece(self, offset: int, length: int, *, for_write: bool) -> Piece | None:
        tables = self.tables
        cluster = tables.cluster_size
        length = min(length, self.size - offset)
        if length <= 0:
            return None
        if tables.extended:
            piece = next(tables.pieces(offset, length, wait=False), None)
        else:
            piece = self._run(offset, length, holes=self.backing is not None and not for_write)
        if piece is None or piece.length <= 0:
            return None
        if piece.kind is Kind.UNALLOCATED and self.backing is not None and not for_write:
            return piece
        if piece.kind is not Kind.NORMAL or (for_write and not piece.writable):
            return None
        end = piece.host + piece.length
        if end > LARGEST_OFFSET:
            return None
        if for_write and self.data_host is self.host:
            first = piece.host // cluster
            last = -(-end // cluster)
            if last > self.refcounts.end or self.metadata.overlaps(first, last - first):
                return None
        if for_write and self.moved is not None:
            first = offset // cluster
            stop = self.moved.first(first, -(-(offset + piece.length) // cluster))
            if stop == first:
                return None
            length = min(piece.length, stop * cluster - offset)
            piece = attrs.evolve(piece, length=length)
        return piece

    def _run(self, offset: int, length: int, *, holes: bool) -> Piece | None:
        """The piece at `offset`, of entries without subclusters: as `Tables.pieces`, but fast.

        `holes`: unallocated ones too.
        """
        tables = self.tables
        bits, entries = tables.bits, tables.l2_entries
        index, place = divmod(offset >> bits, entries)
        base = index * entries
        last = min(entries, (offset + length - 1 >> bits) - base + 1)
        table = tables.cached(index)
        if table is None:
            if tables.l2_offset(index) or not holes:
                return None
            stop = min((base + entries) << bits, offset + length)
            return Piece(Kind.UNALLOCATED, offset, stop - offset)
        entry = table[place]
        if entry & (layout.COMPRESSED | layout.ZERO):
            return None
        if not tables.has_host(entry):
            if not holes:
                return None
            same = table[place:last].tobytes()
            place += (len(same) - len(same.lstrip(b"\0"))) // 8 or 1
            stop = min((base + place) << bits, offset + length)
            return Piece(Kind.UNALLOCATED, offset, stop - offset)
        host = tables.host_offset(entry) + (offset & tables.cluster_size - 1)
        step = tables.cluster_size
        writable = bool(entry & tables.l1[index] & COPIED)
        place += 1
        while place < last and table[place] == entry + step:
            entry += step
            place += 1
        stop = min((base + place) << bits, offset + length)
        return Piece(Kind.NORMAL, offset, stop - offset, host, writable)

    # -- flushing -----------------------------------------------------------------------------

    def flush(self) -> None:
        """Make durable all that was written; then clusters released before may be used again."""
        with self.lock:
            released = self.refcounts.take_released()
            if released:
                self._epoch += 1
        try:
            if self.data_host is not self.host:
                self.data_host.flush()
            self.host.flush()
        except BaseException:
            self.refcounts.released_again(released)
            raise
        with self.lock:
            if released:
                self._waiting.append((self._epoch, released))
            try:
                self._free_waiting()
            except CorruptImage as error:
                self.mark_corrupt(error)
                raise

    def _free_waiting(self) -> None:
        """Free what was released before the oldest user came."""
        oldest = min(list(self._users.values()), default=self._epoch)
        while self._waiting and self._waiting[0][0] <= oldest:
            _, released = self._waiting.pop(0)
            bits = self.header.cluster_bits
            for first, count in released:
                self.clusters.forget(first << bits, count << bits, bits)
                if first <= self.packed_until >> bits < first + count:
                    self.packed_until = 0
            self.refcounts.free(released)

    def settle(self) -> None:
        """After clusters were taken or released: do what should not wait for the next time.

        Flush if many released ones wait for that, and see to it that there are more to take.
        """
        self.stock_up()
        if self.refcounts.released > MOST_RELEASED:
            self.flush()

    def stock_up(self) -> None:
        """Have clusters reserved in a thread, if they will be needed: nobody has to wait then."""
        with self.lock:
            if self.broken is not None or not self.refcounts.wants_more:
                return
            try:
                go_on = self.refcounts.reserve_ahead()
            except DriverError:
                return  # whoever needs a cluster hears of it
        thread = threading.Thread(target=_try, args=(go_on,), name="xbd-reserve", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # there can't be more threads
            _try(go_on)

    # -- the header ---------------------------------------------------------------------------

    def update_header(self, **changes: Any) -> None:
        """Write a changed header and make it durable: all of it, or nothing, is there then."""
        with self.lock:
            header = attrs.evolve(self.header, **changes)
            packed = pack_header(header)
            room = header.cluster_size - len(packed)
            self.host.write(0, packed + bytes(min(room, 8)))
            try:
                self.host.flush()
            except DriverError:
                # What was the old header's goes on, for as long as the host lives.
                with suppress(DriverError):
                    self.host.write(0, pack_header(self.header))
                raise
            self.header = header

    def _refcount_table_moved(self, offset: int, clusters: int) -> None:
        self.update_header(refcount_table_offset=offset, refcount_table_clusters=clusters)

    def require_writable(self) -> None:
        """Raise if nothing may be written (any more)."""
        if self.broken is not None:
            raise MediaError(f"{self} is not written any more: {self.broken}")

    def require_data(self, clusters: Sequence[int]) -> None:
        """Raise `CorruptImage` if metadata lie in a host cluster that an L2 entry names.

        Whoever gives such a cluster up would give up what lies there.  The clusters ascend.
        """
        cluster = self.metadata.find(clusters)
        if cluster is not None:
            at = cluster << self.header.cluster_bits
            raise CorruptImage(f"{self}: an L2 entry names metadata, at {at:#x}")

    def mark_corrupt(self, error: CorruptImage) -> None:
        """Stop writing for good, and say so in the image."""
        with self.lock:
            if self.broken is None and self.writable:
                self.broken = error
                self.tables.take_all_back()
                if self.header.version >= 3:
                    with suppress(DriverError):  # one error is told already
                        self.update_header(
                            incompatible=self.header.incompatible | Incompatible.CORRUPT
                        )

    # -- end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back what is reserved and let go of all files.  Idempotent; nobody uses it now.

        Raises `DriverError` if what is written may not be durable.
        """
        try:
            if self.host.fd >= 0 and self.writable and self.broken is None:
                for give_back in self.before_closing:
                    give_back()
                self.flush()
                with self.lock:
                    self.refcounts.give_back()
                self.host.flush()
        finally:
            self.tables.take_all_back()
            self.refcounts.await_arrival()  # it uses the file
            for part in (self.backing, self.data_host, self.host):
                if part is not None:
                    part.close()

    def __str__(self) -> str:
        return shown(self.host.path)


def _append(extents: list[HostExtent], more: HostExtent) -> None:
    last = extents[-1] if extents else None
    if last is not None and last.fd == more.fd and last.offset + last.length == more.offset:
        extents[-1] = attrs.evolve(last, length=last.length + more.length)
    else:
        extents.append(more)


def _try(reserve: Callable[[], None]) -> None:
    with suppress(DriverError):  # whoever needs a cluster hears of it
        reserve()


def _shortened(extent: ExtentT, length: int) -> ExtentT:
    if extent is None or extent.length <= length:
        return extent
    return attrs.evolve(extent, length=length)
