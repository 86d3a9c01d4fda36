"""Use counts of host clusters: their bytes, what is reserved when, and what is free again when."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from host_storage import loop_device, sparse
from hypothesis import given
from hypothesis import strategies as st
from qcow2_bytes import ImageBytes
from qcow2_crashes import open_recorded
from qcow2_recipes import NAMED, Made, Recipe
from qcow2_tape import Change, Flushed, RecordingHost, Tape
from qcow2_walk import tool

from xbd.core.driver import DriverError, NoSpace, WriteRequest
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import refcounts, snapshots, switch
from xbd.drivers.qcow2.compressing import CompressedWriter
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.metadata_map import MetadataMap
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.refcount_block import RefcountBlock
from xbd.drivers.qcow2.refcounts import FIRST_RUN, LONGEST_RUN, RUN_BYTES, runs
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

pytestmark = pytest.mark.usefixtures("no_power_cuts")

CLUSTER = 4 * KIB


# -- blocks ------------------------------------------------------------------------------------


@given(
    order=st.integers(0, 6),
    changes=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 1 << 64)), max_size=12),
)
def test_blocks_of_all_widths(order: int, changes: list[tuple[int, int]]) -> None:
    """Written in parts where something changed, a block is what it is as a whole."""
    written = bytearray(8 << order)
    block = RefcountBlock(bytes(written), order)
    wanted = [0] * 64
    for index, number in changes:
        wanted[index] = number & block.largest
        block.set(index, wanted[index])
        if number % 3 == 0:
            continue
        change = block.take_dirty()
        assert change is not None
        at, data = change
        written[at : at + len(data)] = data
        assert block.take_dirty() is None
    change = block.dirty()
    if change is not None:
        at, data = change
        written[at : at + len(data)] = data
    assert written == block.pack(0, 64)
    assert list(RefcountBlock(written, order).counts) == wanted


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_counts_are_read_as_qemu_wrote_them(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "image.qcow2"
    options = f"refcount_bits={bits},cluster_size=4k"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "2M")
    tool("qemu-io", "-c", "write -q 0 300k", "-c", "write -q 1M 64k", path)
    for number in range(min(3, (1 << bits) - 2)):
        tool("qemu-img", "snapshot", "-c", f"s{number}", path)
    tool("qemu-io", "-c", "write -q 100k 20k", "-c", "discard -q 1M 64k", path)
    data = path.read_bytes()
    image = open_image(path, Wishes())
    try:
        counts = {cluster: image.refcounts.get(cluster) for cluster in range(len(data) // CLUSTER)}
        assert {cluster: n for cluster, n in counts.items() if n} == ImageBytes(data).counts()
        assert max(counts.values()) == min(4, (1 << bits) - 1)
        assert image.refcounts.get(1 << 40) == 0
    finally:
        image.close()


# -- the metadata map ------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 6)),
        max_size=30,
    )
)
def test_metadata_map(changes: list[tuple[bool, int, int]]) -> None:
    there = MetadataMap()
    model: set[int] = {3, 17}
    there.replace([17, 3])
    for add, first, count in changes:
        clusters = set(range(first, first + count))
        if add:
            there.add(first, count)
            model |= clusters
        else:
            there.remove(first, count)
            model -= clusters
    for first in range(48):
        assert there.overlaps(first) == (first in model)
        assert there.overlaps(first, 5) == bool(model & set(range(first, first + 5)))
    for clusters in ([], list(range(48)), [1, 3, 3, 17], list(range(20, 30)), [60]):
        assert there.find(clusters) == min(model & set(clusters), default=None)


# -- reserving and releasing -------------------------------------------------------------------


@contextmanager
def recorded(tmp_path: Path, recipe: Recipe = NAMED["4k"]) -> Iterator[tuple[Image, Tape]]:
    tape = Tape()
    image, _ = open_recorded(recipe.make(tmp_path), tape)
    try:
        yield image, tape
    finally:
        image.close()


def write(image: Image, offset: int, data: bytes) -> None:
    request = WriteRequest(offset, [memoryview(bytearray(data))])
    Writer(image).write([request])
    if request.error is not None:
        raise request.error


def discard(image: Image, offset: int, length: int) -> None:
    Zeroer(image, Writer(image)).discard(offset, length)


def host_cluster(image: Image, offset: int) -> int:
    (piece,) = image.pieces(offset, 512)
    return piece.host // CLUSTER


def test_what_is_taken_is_counted_durably(tmp_path: Path) -> None:
    with recorded(tmp_path) as (image, tape):
        cluster = image.refcounts.take()
        assert image.refcounts.get(cluster) == 1
        last = tape.events[-1]
        assert isinstance(last, Flushed) or (isinstance(last, Change) and last.durable)
        before = tape.now()
        taken = {image.refcounts.take() for _ in range(FIRST_RUN - 1)}
        assert tape.now() == before, "a reservation is made once for many clusters"
        assert len(taken | {cluster}) == FIRST_RUN


@pytest.mark.parametrize("name", ["2M", "default", "512"])
def test_no_reservation_is_too_long(tmp_path: Path, name: str) -> None:
    with recorded(tmp_path, NAMED[name]) as (image, _):
        counts, size = image.refcounts, image.header.cluster_size
        for _ in range(8):
            before = image.host.size()
            taken = [counts.take()]
            taken += [counts.take() for _ in range(counts.in_store)]
            assert (image.host.size() - before) <= RUN_BYTES + 4 * size
            assert len(taken) <= LONGEST_RUN
            counts.release(taken)


def test_what_was_used_is_zero_when_it_is_taken_again(tmp_path: Path) -> None:
    with recorded(tmp_path) as (image, _):
        write(image, 0, b"\x11" * CLUSTER)
        cluster = host_cluster(image, 0)
        discard(image, 0, CLUSTER)
        image.flush()
        assert image.refcounts.get(cluster) == 0
        image.host.write(cluster * CLUSTER, b"\x22" * CLUSTER)  # as if holes could not be made
        while image.refcounts.take() != cluster:
            pass
        assert not any(image.host.read(cluster * CLUSTER, CLUSTER))


def test_nothing_is_free_before_a_flush(tmp_path: Path) -> None:
    with recorded(tmp_path) as (image, _):
        write(image, 0, b"\x11" * CLUSTER)
        cluster = host_cluster(image, 0)
        discard(image, 0, CLUSTER)
        assert image.refcounts.get(cluster) == 1
        assert cluster not in {image.refcounts.take() for _ in range(4 * FIRST_RUN)}
        assert image.host.read(cluster * CLUSTER, CLUSTER) == b"\x11" * CLUSTER
        image.flush()
        assert image.refcounts.get(cluster) == 0


def test_nothing_is_free_while_a_reader_may_look_at_it(tmp_path: Path) -> None:
    with recorded(tmp_path) as (image, _):
        write(image, 0, b"\x11" * CLUSTER)
        cluster = host_cluster(image, 0)
        reader = image.enter()
        discard(image, 0, CLUSTER)
        late = image.enter()
        image.flush()
        after = image.enter()
        for token in (reader, late):
            assert image.refcounts.get(cluster) == 1
            image.leave(token)
            image.flush()
        assert image.refcounts.get(cluster) == 0, "who came after the flush can't know of it"
        image.leave(after)


def test_a_failed_flush_frees_nothing(tmp_path: Path) -> None:
    tape = Tape()
    image, (host,) = open_recorded(NAMED["4k"].make(tmp_path), tape)
    write(image, 0, b"\x11" * CLUSTER)
    cluster = host_cluster(image, 0)
    discard(image, 0, CLUSTER)
    host.fault = lambda what: DriverError("no", errno=5) if what == "flush" else None
    for _ in range(2):
        with pytest.raises(DriverError):
            image.flush()
        assert image.refcounts.get(cluster) == 1
    host.fault = lambda what: None
    with pytest.raises(DriverError):
        image.close()  # what was lost stays lost


def test_closing_gives_back_what_was_not_needed(tmp_path: Path) -> None:
    made = NAMED["4k"].make(tmp_path)
    clusters = -(-made.path.stat().st_size // CLUSTER)
    with opened(made) as image:
        write(image, 0, b"\x11" * CLUSTER)
        assert image.host.size() >= (clusters + FIRST_RUN) * CLUSTER
    # More are an L2 table and a cluster of data.
    assert made.path.stat().st_size == (clusters + 2) * CLUSTER
    made.qemu_checks()


@contextmanager
def opened(made: Made) -> Iterator[Image]:
    image = open_image(made.path, made.wishes())
    try:
        yield image
    finally:
        image.close()


def test_reservations_that_fail_are_tried_again(tmp_path: Path) -> None:
    """Nothing is skipped or lost for lack of space."""
    tape = Tape()
    made = NAMED["4k"].make(tmp_path)
    image, (host,) = open_recorded(made, tape)
    for what in ("truncate", "write"):
        for _ in range(5):
            host.fault = lambda call, what=what: NoSpace("full") if call == what else None
            with pytest.raises(NoSpace):
                image.refcounts.reserve(FIRST_RUN)
            host.fault = lambda what: None
            image.flush()
    taken = image.refcounts.take()
    assert taken < 10
    image.refcounts.release([taken])
    assert image.host.size() < 2 * FIRST_RUN * CLUSTER
    image.close()
    made.qemu_checks()


@pytest.mark.parametrize("clusters", [8, 20, 64])
def test_a_block_device_is_used_to_its_end(tmp_path: Path, clusters: int) -> None:
    """And is not cut off when the disk is closed."""
    backing = sparse(tmp_path / "device", clusters * 64 * KIB + 512)
    with loop_device(backing, 512) as path:
        tool("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
        for closed in range(2):
            image = open_image(path, Wishes(writable=True))
            # What is not for data: header, refcount table and block, L1 and L2 table.
            full = (clusters - 5) * 64 * KIB
            for at in range(0, full, 64 * KIB):
                write(image, at, b"\x11" * 512)
            with pytest.raises(NoSpace, match="extend it first"):
                write(image, full, b"\x11" * 512)
            with pytest.raises(NoSpace):
                image.refcounts.take_run(3)
            if not closed:
                discard(image, 0, 64 * KIB)
            image.close()
            tool("qemu-img", "check", "-q", "-f", "qcow2", path)


def test_a_count_can_not_leave_its_range(tmp_path: Path) -> None:
    with recorded(tmp_path, NAMED["1-bit"]) as (image, _):
        cluster = image.refcounts.take()
        with pytest.raises(DriverError):
            image.refcounts.change(cluster, 1)
        assert image.refcounts.get(cluster) == 1
        free = image.host.size() // image.header.cluster_size + 5
        with pytest.raises(CorruptImage):
            image.refcounts.change(free, -1)
        with pytest.raises(CorruptImage):
            image.refcounts.change(1 << 40, 1)


@given(clusters=st.lists(st.integers(0, 30), unique=True).map(sorted))
def test_runs(clusters: list[int]) -> None:
    found = runs(clusters)
    assert [
        cluster for first, count in found for cluster in range(first, first + count)
    ] == clusters
    assert all(sum(a) < b[0] for a, b in pairwise(found))


def test_runs_for_tables_lie_in_one_piece(tmp_path: Path) -> None:
    with recorded(tmp_path, NAMED["64-bit-512"]) as (image, _):
        chance = random.Random(1)
        taken: set[int] = set()
        for _ in range(40):
            count = chance.choice((1, 2, 5, 70, 200))
            first = image.refcounts.take_run(count)
            run = set(range(first, first + count))
            assert not taken & run
            assert all(image.refcounts.get(cluster) == 1 for cluster in run)
            taken |= run
            loose = image.refcounts.take()
            assert loose not in taken
            taken.add(loose)
            if chance.random() < 0.5:
                image.refcounts.release(sorted(run)[::2])
                taken -= set(sorted(run)[::2])
                image.flush()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2-bit-512", "64-bit-512"])
def test_tables_grow_far(tmp_path: Path, name: str) -> None:
    """Many blocks and several tables of counts, seen by QEMU as well."""
    path = tmp_path / "image.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", NAMED[name].options, path, "9M")
    made = Made(path, bytearray(b"\x5a" * 9 * MIB))
    with opened(made) as image:
        for offset in range(0, 9 * MIB, MIB):
            write(image, offset, b"\x5a" * MIB)
    made.agree()


def test_what_a_failed_snapshot_leaves_is_put_right_when_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was deleted in place, for lack of room, when the host failed."""
    tape = Tape()
    made = NAMED["4k"].make(tmp_path)
    image, _ = open_recorded(made, tape)
    write(image, 0, b"\x11" * CLUSTER)
    made.content[:CLUSTER] = b"\x11" * CLUSTER
    snapshots.create(image, "one")
    real = RecordingHost.write

    def no_room(*_: object) -> None:
        raise NoSpace("full")

    def refuse(self: RecordingHost, offset: int, data: bytes) -> None:
        if image.header.incompatible & 1 and offset >= CLUSTER:
            raise NoSpace("full")
        real(self, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(switch, "put_into_force", no_room)
        patch.setattr(RecordingHost, "write", refuse)
        with pytest.raises(NoSpace):
            snapshots.delete(image, "one")
    with pytest.raises(DriverError, match="open it again"):
        snapshots.create(image, "two")
    write(image, CLUSTER, b"\x22" * CLUSTER)
    made.content[CLUSTER : 2 * CLUSTER] = b"\x22" * CLUSTER
    image.close()
    assert ImageBytes(made.path.read_bytes()).dirty
    with opened(made):
        pass
    made.agree()


def test_what_was_packed_in_a_cluster_is_forgotten_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same entry of a table can mean other bytes later."""
    for name in ("FIRST_RUN", "LONGEST_RUN"):
        monkeypatch.setattr(refcounts, name, 1)  # what is free is used again at once
    made = NAMED["4k"].make(tmp_path)
    with opened(made) as image:
        entries = set()
        for byte in (1, 2, 3):
            request = WriteRequest(0, [memoryview(bytearray([byte]) * CLUSTER)])
            CompressedWriter(image, Writer(image)).write([request])
            assert request.error is None
            (piece,) = image.pieces(0, CLUSTER)
            entries.add(piece.host)
            there = bytearray(CLUSTER)
            image.readv(0, [memoryview(there)])
            assert there == bytes([byte]) * CLUSTER
            discard(image, 0, CLUSTER)
            image.flush()
        assert len(entries) == 1, "it is another cluster each time: nothing is shown"
