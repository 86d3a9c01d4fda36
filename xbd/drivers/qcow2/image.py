"""An open qcow2 image: who uses what of it, flushing, and its header.

Blocking and thread-safe.  Reading is in `reading`, what lies where in `resolving`, writing in
`writing`, discarding and zeroing in `zeroing`; they share the locks and tables kept here.

Who uses host clusters without holding the lock (a read that is under way, I/O through resolved
extents) holds a token from `enter` until `leave`: released clusters are not used again as long as
anyone may still look at what they held before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol

import attrs

from xbd.core.driver import BlockStatus, DriverError, HostExtent, MediaError, ReadRequest
from xbd.core.driver.buffers import aligned_buffer
from xbd.core.hostio.failures import shown
from xbd.core.units import MIB
from xbd.drivers.qcow2.compressed import ClusterCache, Codec, codec_for
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header, pack_header
from xbd.drivers.qcow2.host import PAGE, Host
from xbd.drivers.qcow2.layout import Incompatible
from xbd.drivers.qcow2.metadata import locate_metadata
from xbd.drivers.qcow2.metadata_map import MetadataMap
from xbd.drivers.qcow2.moved import Moved
from xbd.drivers.qcow2.reading import Reader
from xbd.drivers.qcow2.refcounts import Refcounts
from xbd.drivers.qcow2.resolving import Resolver
from xbd.drivers.qcow2.tables import Kind, Piece, Tables
from xbd.drivers.qcow2.unpacking import Unpacker

DEFAULT_CACHE_BYTES: Final = 8 * MIB
"""L2 tables in memory: 64 GiB of clusters of 64 KiB."""

MOST_RELEASED: Final = 256
"""Runs of released clusters that wait for the guest to flush, before the image does."""


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
        reader = Reader(self)
        self.read = reader.read
        self.read_known = reader.read_known
        resolver = Resolver(self)
        self.resolve = resolver.resolve
        self.resolve_all = resolver.resolve_all
        self.zeroes = resolver.zeroes
        self.in_memory = resolver.in_memory
        self.load = resolver.load
        self.simply_lies = resolver.simply_lies
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

    def remap(
        self, index: int, words: Mapping[int, int], moved: list[tuple[int, int]] | None = None
    ) -> None:
        """`Tables.change`, by which clusters of the disk lie elsewhere.  Locked.

        Their ranges (offset and length) go into `moved`, also if it fails.
        """
        tables, width = self.tables, 2 if self.tables.extended else 1
        clusters = {index * tables.l2_entries + word // width for word in words}
        if moved is not None:
            moved.extend((number << tables.bits, tables.cluster_size) for number in clusters)
        if self.moved is not None:
            self.moved.note(clusters)
        try:
            tables.change(index, words)
        finally:
            if self.moved is not None:
                # Who has forgotten them meanwhile may have found them where they were.
                self.moved.note(clusters)

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


def _try(reserve: Callable[[], None]) -> None:
    with suppress(DriverError):  # whoever needs a cluster hears of it
        reserve()
