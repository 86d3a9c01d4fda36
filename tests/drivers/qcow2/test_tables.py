"""L1 and L2 tables: what they say of the disk, and what of them is written."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcow2_crashes import open_recorded
from qcow2_recipes import NAMED
from qcow2_tape import RecordingHost, Tape

from xbd.core.driver import DriverError, WriteRequest
from xbd.core.units import KIB
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO, Incompatible
from xbd.drivers.qcow2.tables import Kind, Piece, Tables
from xbd.drivers.qcow2.writing import Writer

pytestmark = pytest.mark.usefixtures("no_power_cuts")

BITS = 14
CLUSTER = 1 << BITS
SUBCLUSTER = CLUSTER // 32


class OneTable(Host):
    """A host file of an L1 table at 16 KiB with one entry, and its L2 table at 32 KiB."""

    def __init__(self, l2: array[int], *, shared: bool) -> None:
        self.l1 = array("Q", [2 * CLUSTER | (0 if shared else COPIED), 0])
        self.l2 = l2

    def read(self, offset: int, length: int) -> bytearray:
        table = array("Q", self.l1 if offset == CLUSTER else self.l2)
        table.byteswap()
        return bytearray(table.tobytes()[:length])


def tables_of(entries: list[int], *, extended: bool, shared: bool = False) -> Tables:
    header = Header(
        cluster_bits=BITS,
        size=2 * (CLUSTER // (16 if extended else 8)) * CLUSTER,
        l1_size=2,
        l1_table_offset=CLUSTER,
        incompatible=Incompatible.EXTENDED_L2 if extended else 0,
    )
    l2 = array("Q", entries + [0] * (CLUSTER // 8 - len(entries)))
    return Tables(OneTable(l2, shared=shared), header, 1 << 20)


def spread(pieces: list[Piece]) -> list[tuple[Kind, int, bool]]:
    """For each sector: its kind, where it lies (or the compressed entry), and if in place."""
    told = []
    for piece in pieces:
        for at in range(0, piece.length, 512):
            host = piece.host + at if piece.kind is Kind.NORMAL else piece.host
            told.append((piece.kind, host, piece.writable))
    return told


ENTRIES = st.one_of(
    st.just(0),
    st.just(ZERO),
    st.integers(3, 9).map(lambda cluster: cluster * CLUSTER | COPIED),
    st.integers(3, 9).map(lambda cluster: cluster * CLUSTER),
    st.integers(3, 9).map(lambda cluster: cluster * CLUSTER | COPIED | ZERO),
    st.integers(0, 1 << 40).map(lambda rest: COMPRESSED | rest),
)


@given(
    entries=st.lists(ENTRIES, min_size=1, max_size=6),
    first=st.integers(0, 100),
    length=st.integers(1, 150),
    shared=st.booleans(),
)
def test_pieces(entries: list[int], first: int, length: int, shared: bool) -> None:
    """Neighbours are joined, and nothing is lost, added or moved by that."""
    tables = tables_of(entries, extended=False, shared=shared)
    wanted = []
    for sector in range(first, first + length):
        cluster, at = divmod(sector * 512, CLUSTER)
        entry = entries[cluster] if cluster < len(entries) else 0
        if entry & COMPRESSED:
            wanted.append((Kind.COMPRESSED, entry, False))
        elif entry & ZERO:
            wanted.append((Kind.ZERO, 0, False))
        elif entry:
            host = (entry & OFFSET_MASK) + at
            wanted.append((Kind.NORMAL, host, bool(entry & COPIED) and not shared))
        else:
            wanted.append((Kind.UNALLOCATED, 0, False))
    pieces = list(tables.pieces(first * 512, length * 512))
    assert spread(pieces) == wanted
    assert pieces[0].offset == first * 512
    for one, two in pairwise(pieces):
        assert one.offset + one.length == two.offset
        joined = one.kind is two.kind and one.writable == two.writable
        if joined and one.kind is Kind.NORMAL:
            assert one.host + one.length != two.host
        assert not joined or one.kind in (Kind.NORMAL, Kind.COMPRESSED)


def bitmap(states: list[int]) -> int:
    """Of 32 subclusters: 0 unallocated, 1 allocated, 2 zero."""
    return sum(
        (1 << n if state == 1 else 1 << 32 + n if state else 0) for n, state in enumerate(states)
    )


@given(
    clusters=st.lists(
        st.tuples(
            st.one_of(st.just(0), st.integers(3, 9)),
            st.booleans(),
            st.lists(st.integers(0, 2), min_size=32, max_size=32),
        ),
        min_size=1,
        max_size=3,
    ),
    first=st.integers(0, 60),
    length=st.integers(1, 60),
)
def test_pieces_of_subclusters(
    clusters: list[tuple[int, bool, list[int]]], first: int, length: int
) -> None:
    words: list[int] = []
    states_of: list[list[int]] = []
    for host, copied, told in clusters:
        states = told if host else [2 if state == 1 else state for state in told]
        states_of.append(states)
        words += [host * CLUSTER | (COPIED if copied and host else 0), bitmap(states)]
    tables = tables_of(words, extended=True)
    wanted = []
    for sector in range(first, first + length):
        cluster, at = divmod(sector * 512, CLUSTER)
        state = states_of[cluster][at // SUBCLUSTER] if cluster < len(clusters) else 0
        if state == 2:
            wanted.append((Kind.ZERO, 0, False))
        elif state == 1:
            host, copied, _ = clusters[cluster]
            wanted.append((Kind.NORMAL, host * CLUSTER + at, copied))
        else:
            wanted.append((Kind.UNALLOCATED, 0, False))
    assert spread(list(tables.pieces(first * 512, length * 512))) == wanted


@pytest.mark.parametrize(
    ("words", "extended"),
    [
        ([3 * CLUSTER + 512 | COPIED], False),
        ([3 * CLUSTER + 512 | COPIED, 1], True),
        ([0, 1], True),
        ([3 * CLUSTER | COPIED, 1 | 1 << 32], True),
    ],
)
def test_what_can_not_be(words: list[int], extended: bool) -> None:
    tables = tables_of(words, extended=extended)
    with pytest.raises(CorruptImage):
        list(tables.pieces(0, CLUSTER))
    tables.l1[0] = 2 * CLUSTER + 512 | COPIED
    with pytest.raises(CorruptImage):
        list(tables.pieces(0, CLUSTER))


def test_nothing_is_read_where_waiting_is_not_allowed() -> None:
    tables = tables_of([3 * CLUSTER | COPIED], extended=False)
    assert list(tables.pieces(0, CLUSTER, wait=False)) == []
    reach = tables.l2_entries * CLUSTER
    (hole,) = tables.pieces(reach, CLUSTER, wait=False)
    assert hole.kind is Kind.UNALLOCATED
    assert list(tables.pieces(0, CLUSTER)) == list(tables.pieces(0, CLUSTER, wait=False))


# -- of images ----------------------------------------------------------------------------------


def write(image: Image, offset: int, data: bytes) -> None:
    request = WriteRequest(offset, [memoryview(bytearray(data))])
    Writer(image).write([request])
    if request.error is not None:
        raise request.error


def test_tables_in_memory_are_bounded(tmp_path: Path) -> None:
    """With room for a few tables all the others are read again when they are needed."""
    made = NAMED["512"].make(tmp_path)
    tape = Tape()
    image, (host,) = open_recorded(made, tape)
    image.tables._most = 3
    chance = random.Random(1)
    for _ in range(60):
        at = chance.randrange(made.size // 512) * 512
        data = chance.randbytes(512)
        write(image, at, data)
        made.content[at : at + 512] = data
    assert len(image.tables._cache) <= 3
    assert host.calls["read"] > 20
    image.close()
    made.agree()


def test_only_sectors_with_changes_are_written(tmp_path: Path) -> None:
    made = NAMED["default"].make(tmp_path)
    tape = Tape()
    image, _ = open_recorded(made, tape)
    write(image, 0, b"\x11" * 512)
    before = tape.now()
    write(image, 64 * KIB, b"\x22" * 512)
    lengths = [event.length for event in tape.events[before:] if hasattr(event, "length")]
    assert lengths == [512, 512], "a sector of data and one of the table"
    image.close()


def test_what_the_host_refused_is_not_believed(tmp_path: Path) -> None:
    """A table that could not be written is what the host has, in memory as well."""
    made = NAMED["4k"].make(tmp_path)
    image, (host,) = open_recorded(made, Tape())
    write(image, 0, b"\x11" * 4096)
    for what, fails in (("write", 1), ("writev", 1), ("write", 2)):
        calls = 0

        def fault(call: str, what: str = what, fails: int = fails) -> DriverError | None:
            nonlocal calls
            calls += call == what
            return DriverError("no", errno=5) if call == what and calls == fails else None

        host.fault = fault
        failed = 0
        for cluster in (1, 200):
            try:
                write(image, cluster * 4096, b"\x33" * 4096)
            except DriverError:
                failed += 1
        assert failed == (1 if calls >= fails else 0)
    host.fault = lambda call: None
    again = array("Q", image.tables.l1)
    there = bytearray(made.size)
    image.readv(0, [memoryview(there)])
    image.tables.forget_cached()
    fresh = bytearray(made.size)
    image.readv(0, [memoryview(fresh)])
    assert there == fresh
    assert again == image.tables.l1
    image.close()
    made.content[:] = fresh
    made.agree()


def test_what_has_moved_is_told_even_if_a_flush_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the data path would go on reading where the cluster was."""
    made = NAMED["snapshots"].make(tmp_path)
    image, _ = open_recorded(made, Tape())
    shared = next(
        piece
        for piece in image.pieces(0, made.size)
        if piece.kind is Kind.NORMAL and not piece.writable
    )

    def flush() -> None:
        raise DriverError("no", errno=5)

    monkeypatch.setattr("xbd.drivers.qcow2.image.MOST_RELEASED", 0)
    monkeypatch.setattr(image, "flush", flush)
    request = WriteRequest(shared.offset, [memoryview(bytearray(b"new" + bytes(509)))])
    moved = Writer(image).write([request])
    assert request.error is not None
    assert moved == [(shared.offset - shared.offset % 4096, 4096)]
    there = bytearray(512)
    image.readv(shared.offset, [memoryview(there)])
    assert there.startswith(b"new")
    monkeypatch.undo()
    image.close()


def test_writing_in_place_asks_only_once(tmp_path: Path) -> None:
    """Where nothing is allocated, no table and no count is written."""
    made = NAMED["4k"].make(tmp_path)
    tape = Tape()
    image, (host,) = open_recorded(made, tape)
    write(image, 0, b"\x11" * 4096)
    calls = dict(host.calls)
    write(image, 512, b"\x22" * 512)
    assert isinstance(host, RecordingHost)
    assert host.calls["writev"] == calls["writev"] + 1
    assert host.calls["write"] == calls["write"]
    assert host.calls["flush"] == calls.get("flush", 0)
    image.close()
