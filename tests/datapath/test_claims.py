"""Tables that a driver lends, in which entries are made: the claims in C, and NBD's in Python."""

from __future__ import annotations

import os
import sys
from array import array

import pytest
import trio

from xbd.core.datapath import native
from xbd.core.datapath.native.extents import NativeExtents
from xbd.core.nbd.claims import TableClaims

UNIT = 4096
ENTRIES = 100
BITS = 1 << 63
TABLES = 3
MOST_UNITS = 64
"""In C: that one request may need places for."""


class Both:
    """Three tables in a file, one after the other, and claims that know what is found there."""

    def __init__(self, kind: str) -> None:
        self.fd = os.memfd_create("tables")
        self.data_fd = os.memfd_create("data")
        os.truncate(self.fd, TABLES * ENTRIES * 8)
        self.tables = [array("Q", bytes(ENTRIES * 8)) for _ in range(TABLES)]
        self.extents = None
        if kind == "python":
            self.claims = TableClaims()
        else:
            if native.why_not is not None:
                pytest.skip(f"no native data path: {native.why_not}")
            self.extents = NativeExtents(lambda *_, **__: None)
            self.claims = self.extents.claims
        self.claims.begin(self.data_fd, self.fd, UNIT, BITS)

    def lend(self, *numbers):
        for number in numbers:
            position = number * ENTRIES * 8
            self.claims.lend(number * ENTRIES * UNIT, self.tables[number], position)

    def take(self, unit, count=1):
        return self.claims.take(unit * UNIT + 512, (unit + count) * UNIT - 512)

    def written(self):
        words = array("Q", os.pread(self.fd, TABLES * ENTRIES * 8, 0))
        if sys.byteorder == "little":
            words.byteswap()
        return list(words)

    def entries(self):
        return [word for table in self.tables for word in table]

    def used(self):
        """Places by unit, the same in memory and in the file."""
        words = self.entries()
        assert words == self.written()
        assert all(word & BITS for word in words if word)
        return {unit: (word ^ BITS) // UNIT for unit, word in enumerate(words) if word}

    def close(self):
        os.close(self.fd)
        os.close(self.data_fd)


@pytest.fixture(params=["python", "native"])
def both(request):
    both = Both(request.param)
    yield both
    both.claims.end()
    both.close()


def places(first, count):
    return [place * UNIT for place in range(first, first + count)]


def test_entries_are_made_where_there_are_none(both):
    both.lend(0, 2)
    assert both.claims.supply(places(50, 8)) == 8
    assert both.take(3)
    assert both.take(ENTRIES * 2 + 1, 3)
    assert both.used() == {3: 50, 201: 51, 202: 52, 203: 53}
    assert both.claims.supplied == 4
    assert both.claims.end() == places(54, 4)


def test_what_was_taken_is_known(both):
    both.lend(0)
    both.claims.supply(places(50, 8))
    assert both.take(3, 2)
    assert both.take(2, 4), "the two in the middle have places"
    assert both.used() == {2: 52, 3: 50, 4: 51, 5: 53}
    if both.extents is not None:
        pieces = native.ffi.new("struct xbd_piece[]", 8)
        for for_write in (False, True):
            count = native.lib.xbd_extents_find(
                both.extents.handle, for_write, 2 * UNIT, 4 * UNIT, pieces, 8
            )
            found = [(piece.fd, piece.position, piece.length) for piece in pieces[0:count]]
            assert found == [
                (both.data_fd, 52 * UNIT, UNIT),
                (both.data_fd, 50 * UNIT, 2 * UNIT),
                (both.data_fd, 53 * UNIT, UNIT),
            ]


def test_a_range_can_cross_tables(both):
    both.lend(0, 1)
    both.claims.supply(places(1, 4))
    assert both.take(ENTRIES - 2, 4)
    assert both.used() == {98: 1, 99: 2, 100: 3, 101: 4}


def test_all_or_nothing():
    """In C: whatever is missing for one unit, none gets a place."""
    both = Both("native")
    both.lend(0, 2)
    both.claims.supply(places(1, 3))
    both.tables[0][5] = 7  # the driver's own: nobody knows where it lies
    assert not both.take(5)
    assert not both.take(4, 3)
    assert not both.take(ENTRIES - 1, 2), "the second table is not lent"
    assert not both.take(10, 4), "there are three places"
    both.claims.supply(places(4, 100))
    assert not both.take(10, MOST_UNITS + 1)
    both.tables[0][5] = 0
    assert both.used() == {}
    assert both.take(10, MOST_UNITS)
    assert list(both.used().values()) == list(range(1, MOST_UNITS + 1))
    both.claims.end()
    both.close()


def test_nothing_changes_in_what_was_taken_back(both):
    both.lend(0, 1)
    both.claims.supply(places(1, 8))
    both.claims.take_back(0)
    both.claims.take_back(0)
    assert not both.take(3)
    assert both.take(ENTRIES)
    both.tables[0].append(1)  # memory that nobody uses may move
    both.tables[0].pop()
    both.lend(0)
    assert both.take(3)
    assert both.used() == {3: 2, ENTRIES: 1}


def test_the_memory_stays_while_it_is_lent():
    """To C, which would not notice that it has moved."""
    both = Both("native")
    both.lend(0)
    with pytest.raises(BufferError):
        both.tables[0].append(1)
    both.claims.end()
    both.tables[0].append(1)
    both.close()


def test_nothing_is_taken_after_the_end(both):
    both.lend(0)
    both.claims.supply(places(1, 8))
    assert both.take(0)
    assert both.claims.end() == places(2, 7)
    assert not both.take(1)
    assert both.claims.end() == []
    both.claims.begin(both.data_fd, both.fd, UNIT, BITS)
    both.lend(0)
    both.claims.supply(places(9, 1))
    assert both.take(1)
    assert both.used() == {0: 1, 1: 9}


def test_places_that_there_is_no_room_for_stay_with_the_driver(both):
    many = places(1, 5000)
    taken = both.claims.supply(many)
    assert 1024 <= taken < 5000
    assert both.claims.supply(many[taken:]) == 0
    assert both.claims.end() == many[:taken]


async def test_nothing_is_taken_while_somebody_has_paused(both):
    both.lend(0)
    both.claims.supply(places(1, 8))
    async with both.claims.paused():
        assert not both.take(1)
        async with both.claims.paused():
            assert not both.take(1)
        assert not both.take(1)
    assert both.take(1)
    await trio.lowlevel.checkpoint()


def test_a_table_that_cannot_be_written_is_not_used_any_more(both):
    """Nobody knows what is in it: the place is not used for anything else."""
    both.claims.supply(places(1, 2))
    read_only = os.open(f"/proc/self/fd/{both.fd}", os.O_RDONLY)
    both.claims.begin(both.data_fd, read_only, UNIT, BITS)
    both.claims.supply(places(1, 2))
    both.lend(0)
    assert not both.take(1)
    assert both.used() == {}
    assert not both.take(1)
    assert both.claims.end() == places(2, 1)
    os.close(read_only)


def test_drivers_that_make_mistakes_are_told():
    """They share a process with everybody."""
    if native.why_not is not None:
        pytest.skip(f"no native data path: {native.why_not}")
    claims = NativeExtents(lambda *_, **__: None).claims
    entries = array("Q", bytes(64))
    for mistake in (
        lambda: claims.lend(0, entries, 0),
        lambda: claims.supply([0]),
        lambda: claims.begin(0, 0, 0, 0),
        lambda: claims.begin(0, 0, 3 * 4096, 0),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            mistake()
    claims.take_back(0)
    assert not claims.take(0, UNIT)
    assert claims.end() == []
    claims.begin(0, 0, UNIT, 0)
    with pytest.raises(ValueError, match="units of 4096"):
        claims.lend(512, entries, 0)
