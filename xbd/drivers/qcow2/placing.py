"""Places for clusters before somebody writes to them, so that the core can do that by itself.

For clusters that lie nowhere and read as zeroes, a new one is counted and full of zeroes, durably
(`refcounts`), so the L2 entry that names it may come before the data, and reach the disk before or
after it.  Whatever a crash leaves, the disk reads as before or as written.

Where a data path can do that, tables and clusters are lent to it, and it links them by itself.
Else, who writes one cluster after the other gets more of them linked than are asked for.

Over a backing file only such a data path can do it: it copies the rest of the cluster, and links
that when it is durable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from xbd.core.driver import Claims, DriverError, Extent
from xbd.core.units import MIB
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import COPIED
from xbd.drivers.qcow2.refcounts import LONGEST_RUN, RUN_BYTES
from xbd.drivers.qcow2.writing import writable_l2

STREAK: Final = MIB
"""Bytes of clusters linked one after the other, after which more are linked ahead."""

MOST_AHEAD: Final = 4 * MIB
"""In bytes: what is linked ahead at a time, and stays so where the streak ends."""

FIRST_LOT: Final = 16
LARGEST_LOT: Final = LONGEST_RUN
"""Clusters that the data path has to link by itself: at first, and when a guest goes on.  They
are no more than `RUN_BYTES`."""

_NEAR: Final = MIB
"""In bytes: requests side by side don't come in the order of the disk."""

_Changes = dict[int, dict[int, int]]
"""New L2 entries, by L1 entry and place in the table."""


class Placer:
    """Places for the clusters of one image."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._tables = image.tables
        self._bits = image.header.cluster_bits
        plain = (
            image.writable
            and image.cipher is None
            and image.data_host is image.host
            and not image.tables.extended
        )
        self._possible = plain and image.backing is None
        """Whether a new cluster reads as what was not there, and is all there is to it."""
        self._behind = plain and image.backing is not None
        """Whether it is so where what lies behind reads as zeroes."""
        self._streak = 0
        """Clusters linked one after the other, and `_next` behind them."""
        self._next = 0
        self._claims: Claims | None = None
        """What tables and clusters are lent to."""
        self._largest_lot = min(LARGEST_LOT, max(1, RUN_BYTES >> self._bits))
        self._lot = min(FIRST_LOT, self._largest_lot)
        """Clusters to supply next time."""

    def useful(self, offset: int, length: int, claims: Claims | None = None) -> bool:
        """Whether `place` may find places in this range.  Looks at tables in memory only."""
        if self.image.broken is not None:
            return False
        if self._behind:
            return (
                claims is not None
                and claims.largest_copy > 0
                and self._can_be_claimed(offset, length, self._copying(claims))
            )
        if not self._possible:
            return False
        clusters = self._clusters(offset, length)
        index, place = divmod(clusters.start, self._tables.l2_entries)
        try:
            table = self._tables.cached(index)
        except CorruptImage:
            return False  # writing says what is wrong
        return table is None or 0 in table[place : place + len(clusters)]

    def _clusters(self, offset: int, length: int) -> range:
        """Of the disk, that the range touches."""
        return range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1)

    def _copying(self, claims: Claims) -> bool:
        """Whether a new cluster is what was not there, as soon as it is copied."""
        # Whoever syncs a descriptor of its own leaves it to others to see that this failed.
        direct = self.image.data_host.direct
        return self._behind and direct and 1 << self._bits <= claims.largest_copy

    def _can_be_claimed(self, offset: int, length: int, copying: bool) -> bool:
        """Whether nothing of the range is here, and what lies behind is no obstacle.

        True also if that can't be said yet: `place` loads what tells it.
        """
        image, tables = self.image, self._tables
        clusters = self._clusters(offset, length)
        index, place = divmod(clusters.start, tables.l2_entries)
        count = len(clusters)
        start, size = clusters.start << self._bits, count << self._bits
        if place + count > tables.l2_entries or start + size > image.size:
            return False
        try:
            if not image.in_memory(start, size):
                return True
            table = tables.cached(index)
        except CorruptImage:
            return False  # writing says what is wrong
        if table is not None and any(table[place : place + count]):
            return False
        return image.zeroes(start, size) >= size or (copying and image.simply_lies(start, size))

    def place(
        self,
        extents: Sequence[Extent],
        claims: Claims | None = None,
        moved: list[tuple[int, int]] | None = None,
    ) -> None:
        """Link new clusters to what has none, in the host's hands on return.  Raises `DriverError`.

        What is there already stays as it is, and so do clusters whose mapping is just changing.
        With `claims`, whoever uses these links clusters near these by itself from now on.  The
        ranges (offset and length) that have a place now are added to `moved`.
        """
        image = self.image
        with image.lock:
            image.require_writable()
            new: _Changes = {}
            try:
                for extent in extents:
                    if self._behind:
                        image.load(extent.offset, extent.length)
                    else:
                        self._take(extent, new)
                if claims is None:
                    self._take_ahead(new)
                while new:
                    index, words = next(iter(new.items()))
                    try:
                        image.remap(index, words, moved)
                    except DriverError:
                        self._keep_what_is_linked(index, words)
                        raise
                    del new[index]
                if claims is not None:
                    self._lend(extents, claims)
            except CorruptImage as error:
                image.mark_corrupt(error)
                raise
            finally:
                for words in new.values():
                    self._release(words)
        image.stock_up()

    def _take(self, extent: Extent, new: _Changes) -> None:
        """For all clusters of a range that have no entry."""
        image, entries = self.image, self._tables.l2_entries
        for number in self._clusters(extent.offset, extent.length):
            index, place = divmod(number, entries)
            if number in image.allocating or place in new.get(index, ()):
                continue
            if not writable_l2(image, index)[place]:
                entry = image.refcounts.take() << self._bits | COPIED
                new.setdefault(index, {})[place] = entry

    def _take_ahead(self, new: _Changes) -> None:
        """For clusters behind these, if this is a streak; no more than are in store."""
        image, entries = self.image, self._tables.l2_entries
        numbers = [index * entries + place for index, words in new.items() for place in words]
        if not numbers:
            return
        if abs(min(numbers) - self._next) > max(1, _NEAR >> self._bits):
            self._streak = 0
        self._streak += len(numbers)
        self._next = max(numbers) + 1
        if self._streak << self._bits < STREAK:
            return
        index, last = divmod(self._next - 1, entries)
        words, table = new[index], writable_l2(image, index)
        most = min(self._streak, max(1, MOST_AHEAD >> self._bits), image.refcounts.in_store)
        stop = min(last + 1 + most, entries, -(-image.size >> self._bits) - index * entries)
        for place in range(last + 1, stop):
            if table[place] or self._next in image.allocating:
                break
            words[place] = image.refcounts.take() << self._bits | COPIED
            self._streak += 1
            self._next += 1

    def _lend(self, extents: Sequence[Extent], claims: Claims) -> None:
        """The tables of these ranges, and clusters that are in store."""
        image = self.image
        if self._claims is None:
            fd = image.host.fd
            unit = image.header.cluster_size
            table_fd = image.host.metadata_fd
            behind, copying = self._behind, self._copying(claims)
            claims.begin(fd, table_fd, unit, COPIED, behind=behind, copying=copying)
            self._claims = claims
            image.before_closing.append(self._end)
        clusters = [self._clusters(extent.offset, extent.length) for extent in extents]
        entries = self._tables.l2_entries
        indexes = {end // entries for some in clusters for end in (some[0], some[-1])}
        self._give_back_spoilt(claims)
        if self._behind:
            for index in indexes:
                writable_l2(image, index)
        # What was placed has its clusters; others need them now, and more is to come.
        needed = sum(map(len, clusters)) if self._behind else 0
        left = claims.supplied
        if left <= max(needed, self._lot // 2):
            wanted = max(self._lot, 2 * needed) - left
            more = max(min(wanted, image.refcounts.in_store), needed - left)
            fresh = image.refcounts.take_many(more)
            taken = claims.supply([cluster << self._bits for cluster in fresh])
            image.refcounts.put_back(fresh[taken:])
            self._lot = min(2 * self._lot, self._largest_lot)
        for index in indexes:
            self._tables.lend(index, claims)

    def _give_back_spoilt(self, claims: Claims) -> None:
        self.image.refcounts.release(sorted(place >> self._bits for place in claims.spoilt()))

    def _end(self) -> None:
        """Take back what was lent and not used."""
        assert self._claims is not None
        with self.image.lock:
            self._tables.take_all_back()
            self._give_back_spoilt(self._claims)
            places = self._claims.end()
            self.image.refcounts.put_back([place >> self._bits for place in places])

    def _keep_what_is_linked(self, index: int, words: dict[int, int]) -> None:
        """The table could not be written, or not all of it: leave what is not in it in `words`."""
        try:
            table = self._tables.l2(index)
        except DriverError:
            words.clear()  # nothing is known, so nothing is given up
            return
        for place, entry in tuple(words.items()):
            if table is not None and table[place] == entry:
                del words[place]

    def _release(self, words: Mapping[int, int]) -> None:
        self.image.refcounts.release((entry ^ COPIED) >> self._bits for entry in words.values())
