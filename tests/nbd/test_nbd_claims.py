"""Tables that a driver lends to the NBD server, which finds places for first writes there."""

from __future__ import annotations

import os
import sys
from array import array
from pathlib import Path

import pytest
import trio
from nbd_client import TRIM, WRITE
from nbd_rig import memory, serving

from xbd.core.driver import DeviceAccess, DiskSpec, open_disk
from xbd.core.nbd.claims import MOST_PLACES, TableClaims
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2.create import create
from xbd.drivers.qcow2.create_options import CreateOptions

UNIT = 4 * KIB
ENTRIES = 16
"""In each of the tables."""
BITS = 1 << 63


class Lent:
    """Two tables in a file, one after the other, with a hole of as many units between them."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("tables")
        os.truncate(self.fd, 2 * ENTRIES * 8)
        self.tables = [array("Q", bytes(ENTRIES * 8)) for _ in range(2)]
        self.claims = TableClaims()
        self.claims.begin(100, self.fd, UNIT, BITS)
        for number in range(2):
            self.lend(number)

    def lend(self, number: int) -> None:
        position = number * ENTRIES * 8
        self.claims.lend(2 * number * ENTRIES * UNIT, self.tables[number], position)

    def take(self, unit: int, count: int = 1) -> list[tuple[int, int, int, int]]:
        """For a range that does not cover its first and last unit."""
        return self.claims.take(unit * UNIT + 512, (unit + count) * UNIT - 512)

    def places(self) -> dict[int, int]:
        """By number of the entry, the same in memory and in the file."""
        words = array("Q", os.pread(self.fd, 2 * ENTRIES * 8, 0))
        if sys.byteorder == "little":
            words.byteswap()
        assert words == self.tables[0] + self.tables[1]
        assert all(word & BITS for word in words if word)
        return {number: word ^ BITS for number, word in enumerate(words) if word}


@pytest.fixture
def lent():
    lent = Lent()
    yield lent
    os.close(lent.fd)


def entry(unit: int, place: int) -> tuple[int, int, int, int]:
    return (unit * UNIT, (unit + 1) * UNIT, 100, place - unit * UNIT)


# -- the tables -----------------------------------------------------------------------------


def test_what_has_no_place_takes_the_next_ones(lent: Lent):
    assert lent.claims.supply([n * UNIT for n in range(1, 6)]) == 5
    assert lent.take(3) == [entry(3, UNIT)]
    assert lent.take(3) == []
    assert lent.take(2, 3) == [entry(2, 2 * UNIT), entry(4, 3 * UNIT)]
    assert lent.places() == {2: 2 * UNIT, 3: UNIT, 4: 3 * UNIT}
    assert lent.claims.supplied == 2
    assert lent.claims.end() == [4 * UNIT, 5 * UNIT]
    assert lent.take(5) == []


def test_units_of_which_nothing_is_known_here_are_left_to_the_driver(lent: Lent):
    lent.claims.supply([n * UNIT for n in range(1, 6)])
    assert lent.take(ENTRIES) == []
    assert lent.take(ENTRIES - 1, 2) == [entry(ENTRIES - 1, UNIT)]
    assert lent.take(2 * ENTRIES) == [entry(2 * ENTRIES, 2 * UNIT)]
    assert lent.places() == {ENTRIES - 1: UNIT, ENTRIES: 2 * UNIT}


def test_places_are_not_taken_for_a_part_of_what_needs_them(lent: Lent):
    lent.claims.supply([UNIT])
    assert lent.take(0, 2) == []
    assert lent.claims.supplied == 1


def test_what_was_taken_back_is_the_drivers(lent: Lent):
    lent.claims.supply([UNIT, 2 * UNIT])
    lent.claims.take_back(0)
    assert lent.take(0) == []
    lent.claims.take_back(0)
    assert lent.take(2 * ENTRIES) == [entry(2 * ENTRIES, UNIT)]
    lent.lend(0)
    assert lent.take(0) == [entry(0, 2 * UNIT)]


def test_where_an_entry_can_not_be_written_nothing_is_entered_any_more(lent: Lent):
    lent.claims.supply([UNIT, 2 * UNIT])
    broken = os.open("/dev/full", os.O_WRONLY)
    lent.claims._table_fd = broken
    assert lent.take(0) == []
    lent.claims._table_fd = lent.fd
    os.close(broken)
    assert lent.take(0) == []
    assert lent.places() == {}
    assert lent.take(2 * ENTRIES) == [entry(2 * ENTRIES, 2 * UNIT)]


async def test_nothing_is_claimed_while_it_is_paused(lent: Lent):
    lent.claims.supply([UNIT])
    async with lent.claims.paused():
        async with lent.claims.paused():
            assert lent.take(0) == []
        assert lent.take(0) == []
    assert lent.take(0) == [entry(0, UNIT)]


def test_places_are_bounded(lent: Lent):
    assert lent.claims.supply(range(UNIT, (MOST_PLACES + 6) * UNIT, UNIT)) == MOST_PLACES
    assert lent.claims.supply([UNIT]) == 0


# -- in use ---------------------------------------------------------------------------------


async def test_first_writes_to_an_image_need_the_driver_now_and_then(tmp_path: Path):
    image = tmp_path / "disk.qcow2"
    create(image, 64 * MIB, CreateOptions(cluster_size=4 * KIB))
    async with open_disk(DiskSpec.parse(f"qcow2:{image}"), device_id="it", writable=True) as access:
        calls = counted(access)
        async with serving(access, alone=True) as rig:
            client = await rig.client()
            for number in range(500):
                await client.write(number * 8 * KIB, b"%04d" % number * KIB)
            for number in range(500):
                assert await client.read(number * 8 * KIB, 4) == b"%04d" % number
            assert 0 < len(calls) < 20
            await client.write(100, b"x" * 100)  # a block is read, and written again
            assert not (await client.do(TRIM, 0, 32 * KIB)).error
            before = len(calls)
            for number in range(500, 600):
                await client.write(number * 8 * KIB, b"%04d" % number * KIB)
            assert len(calls) - before < 5
            await client.disconnect()


def counted(access: DeviceAccess) -> list[None]:
    """What grows with each call of `place`."""
    calls: list[None] = []
    place = access.device.place

    async def counting(extents) -> None:
        calls.append(None)
        await place(extents)

    access.device.place = counting  # type: ignore[method-assign]
    return calls


async def test_only_who_is_alone_makes_entries_and_only_by_his_own_claims():
    async with serving() as rig:
        assert rig.access.claims is None
    device = memory()
    async with serving(device, alone=True) as rig:
        claims = rig.access.claims
        assert isinstance(claims, TableClaims)
        async with serving(rig.access, alone=True):
            assert rig.access.claims is claims
        await trio.lowlevel.checkpoint()


async def test_tables_lent_to_somebody_else_are_not_touched():
    class Others:
        """A data path's, next to which the disk is exported."""

    device = memory()
    async with serving(device) as rig:
        rig.access.claims = others = Others()  # type: ignore[assignment]
        async with serving(rig.access, alone=True) as another:
            client = await another.client()
            await client.send(WRITE, 0, data=b"x" * 512)
            assert not (await client.reply())[1].error
            assert rig.access.claims is others
        rig.access.claims = None
