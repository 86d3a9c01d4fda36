"""The extent cache against a map of blocks."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.datapath import extents, native
from xbd.core.datapath.extents import ExtentCache
from xbd.core.datapath.native.extents import NativeExtents
from xbd.core.driver import HostExtent
from xbd.core.units import GIB, KIB, MIB

TIB = 1024 * GIB
BLOCK = 16 * KIB  # a quarter of a chunk
SIZE = 64
range_of_disk = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda pair: (pair[0], min(pair[1], SIZE - pair[0]))
)


class Layout:
    """Where each block lies: file and position in it; None: nowhere."""

    def __init__(self, owners: list[tuple[int, int] | None]) -> None:
        self.owners = owners
        self.asked = 0

    def resolve(self, offset, length, *, for_write):
        self.asked += 1
        at, inside = divmod(offset, BLOCK)
        found = []
        while at < len(self.owners) and self.owners[at] and at * BLOCK < offset + length:
            fd, position = self.owners[at]
            end = at
            while end < len(self.owners) and self.owners[end] == (fd, position):
                end, position = end + 1, position + BLOCK
            size = (end - at) * BLOCK - inside
            found.append(HostExtent(fd=fd, offset=position - size, length=size))
            at, inside = end, 0
        return found or None

    def pieces(self, offset, length):
        """What must be found: as few pieces as possible."""
        wanted: list[tuple[int, int, int]] = []
        while length:
            owner = self.owners[offset // BLOCK]
            if owner is None:
                return None
            size = min(length, BLOCK - offset % BLOCK)
            piece = (owner[0], owner[1] + offset % BLOCK, size)
            if wanted and wanted[-1][0] == piece[0] and wanted[-1][1] + wanted[-1][2] == piece[1]:
                wanted[-1] = (piece[0], wanted[-1][1], wanted[-1][2] + size)
            else:
                wanted.append(piece)
            offset, length = offset + size, length - size
        return wanted


def runs_of_blocks(runs):
    """Blocks that follow each other on the host, several runs of them; SIZE in all."""
    owners: list[tuple[int, int] | None] = []
    for fd, position, length in runs:
        owners += [None if fd == 0 else (fd, position + i * BLOCK) for i in range(length)]
    return (owners + [None] * SIZE)[:SIZE]


positions = st.one_of(
    st.integers(0, 500).map(lambda number: number * BLOCK), st.sampled_from([1, 77, 1 << 40])
)


class PythonExtents:
    """The cache of the data path in Python."""

    def __init__(self, resolve):
        self.cache = ExtentCache(resolve)

    def find(self, offset, length, *, for_write):
        return (self.cache.writing if for_write else self.cache.reading).find(offset, length)

    def forget(self, offset, length):
        self.cache.forget(offset, length)

    def hot(self, *, for_write):
        """What is looked at first, without looking further."""
        return (self.cache.writing if for_write else self.cache.reading).hot


class CExtents:
    """That of the native one, which asks the driver where nothing is known, as the threads do."""

    def __init__(self, resolve):
        if native.why_not is not None:
            pytest.skip(f"no native data path: {native.why_not}")
        self.extents = NativeExtents(resolve)
        self.pieces = native.ffi.new("struct xbd_piece[]", SIZE)

    def find(self, offset, length, *, for_write):
        for _ in range(2):
            count = native.lib.xbd_extents_find(
                self.extents.handle, for_write, offset, length, self.pieces, SIZE
            )
            if count:
                return [(each.fd, each.position, each.length) for each in self.pieces[0:count]]
            if not self.extents.learn(offset, length, for_write=for_write):
                break
        return None

    def forget(self, offset, length):
        self.extents.forget(offset, length)

    def hot(self, *, for_write):
        return extents.NOTHING


@pytest.mark.parametrize("made", [PythonExtents, CExtents])
@given(
    runs=st.lists(st.tuples(st.integers(0, 3), positions, st.integers(1, 20))),
    steps=st.lists(
        st.tuples(st.sampled_from(["find", "forget"]), range_of_disk, st.sampled_from([0, 512])),
        max_size=40,
    ),
    for_write=st.booleans(),
)
def test_what_is_found_is_what_the_driver_says(made, runs, steps, for_write):
    layout = Layout(runs_of_blocks(runs))
    cache = made(layout.resolve)
    for step, (first, count), inside in steps:
        offset, length = first * BLOCK + inside, count * BLOCK - inside
        if step == "forget":
            moved = {at: (9, (1000 + at) * BLOCK) for at in range(first, first + count)}
            layout.owners = [moved.get(at, owner) for at, owner in enumerate(layout.owners)]
            cache.forget(first * BLOCK, count * BLOCK)
            continue
        found = cache.find(offset, length, for_write=for_write)
        if found is None:
            chunks = range(first - first % 4, first + count, 4)
            assert not all(layout.owners[at] for at in (*chunks, *range(first, first + count)))
        else:
            assert found == layout.pieces(offset, length)
        start, end, fd, delta = cache.hot(for_write=for_write)
        if end - start:
            assert layout.pieces(start, end - start) == [(fd, start + delta, end - start)]


def scattered(extent: int, size: int, *, files: int = 1, seed: int = 1):
    """A resolver for extents in any order, and the questions it was asked."""
    places = list(range(size // extent))
    random.Random(seed).shuffle(places)
    asked: list[int] = []

    def resolve(offset, length, *, for_write):
        asked.append(offset)
        number, inside = divmod(offset, extent)
        position = places[number] * extent + inside
        return [HostExtent(fd=3 + number % files, offset=position, length=extent - inside)]

    return resolve, asked


def find_all(cache, extent, size):
    return [cache.find(offset, 4 * KIB) for offset in range(0, size, extent)]


def test_an_answer_is_kept():
    resolve, asked = scattered(64 * MIB, 64 * MIB)
    cache = ExtentCache(resolve).reading
    for offset in range(0, 64 * MIB, 60 * KIB):
        assert cache.find(offset, 4 * KIB) == [(3, offset, 4 * KIB)]
    assert len(asked) == 1


def test_reading_and_writing_are_asked_for_apart():
    resolve, asked = scattered(64 * KIB, MIB)
    cache = ExtentCache(resolve)
    assert cache.writing.find(0, 4 * KIB) == cache.reading.find(0, 4 * KIB)
    assert asked == [0, 0]


@pytest.mark.parametrize(
    ("extent", "size"),
    [(64 * KIB, 2 * GIB), (2 * MIB, 16 * GIB), (512 * MIB, 13 * GIB), (4 * KIB, 256 * MIB)],
)
def test_all_of_a_scattered_disk_is_kept(extent, size):
    resolve, asked = scattered(extent, size)
    cache = ExtentCache(resolve).reading
    step = min(extent, 32 * MIB)
    first = find_all(cache, step, size)
    if extent < 64 * KIB:
        find_all(cache, step, size)  # after a while it turns to finer chunks
    asked.clear()
    assert find_all(cache, step, size) == first
    assert asked == []


def test_a_question_in_the_middle_of_a_chunk_teaches_all_of_it():
    resolve, asked = scattered(64 * KIB, MIB)
    cache = ExtentCache(resolve).reading
    [(_, position, _)] = cache.find(68 * KIB, 4 * KIB)
    assert asked == [64 * KIB]
    assert cache.find(64 * KIB, 64 * KIB) == [(3, position - 4 * KIB, 64 * KIB)]
    assert len(asked) == 1


def test_what_the_driver_moves_itself_is_asked_for_once():
    asked = []

    def resolve(offset, length, *, for_write):
        asked.append(offset)

    assert ExtentCache(resolve).reading.find(68 * KIB, 4 * KIB) is None
    assert asked == [64 * KIB]


@pytest.mark.parametrize("made", [PythonExtents, CExtents])
def test_parts_of_chunks_are_asked_for_once_extents_end_in_them(made):
    def resolve(offset, length, *, for_write):
        """The first block, and every second one."""
        number, inside = divmod(offset, BLOCK)
        if number and number % 2 == 0:
            return None
        return [HostExtent(fd=3, offset=offset * 2, length=BLOCK - inside)]

    cache = made(resolve)
    assert cache.find(63 * BLOCK, 512, for_write=False) is None  # as the beginning of its chunk
    assert cache.find(0, 512, for_write=False)
    assert cache.find(63 * BLOCK, 512, for_write=False) == [(3, 126 * BLOCK, 512)]
    assert cache.find(62 * BLOCK, 512, for_write=False) is None


@pytest.mark.parametrize("made", [PythonExtents, CExtents])
def test_an_extent_that_ends_within_a_chunk_counts_wherever_it_is_in_an_answer(made):
    """Three quarters of a chunk, and the rest of two in another file."""

    def resolve(offset, length, *, for_write):
        if offset == 0:
            return [
                HostExtent(fd=3, offset=0, length=3 * BLOCK),
                HostExtent(fd=4, offset=0, length=5 * BLOCK),
            ]
        return None if offset < 9 * BLOCK else [HostExtent(fd=5, offset=0, length=7 * BLOCK)]

    cache = made(resolve)
    assert cache.find(9 * BLOCK, 512, for_write=True) is None
    assert cache.find(0, 8 * BLOCK, for_write=True)
    assert cache.find(9 * BLOCK, 512, for_write=True) == [(5, 0, 512)]


def test_when_it_is_full_the_oldest_half_goes(monkeypatch):
    monkeypatch.setattr(extents, "MAX_PAGES", 8)  # of 32 MiB of the disk
    resolve, asked = scattered(64 * KIB, 16 * 32 * MIB)
    cache = ExtentCache(resolve).reading
    find_all(cache, 64 * KIB, 16 * 32 * MIB)
    asked.clear()
    for offset in reversed(range(0, 16 * 32 * MIB, 64 * KIB)):
        cache.find(offset, 4 * KIB)
        if asked:
            break
    assert 4 * 32 * MIB <= 16 * 32 * MIB - offset <= 8 * 32 * MIB


def test_files_beyond_those_with_maps(monkeypatch):
    resolve, asked = scattered(MIB, 64 * MIB, files=20)
    cache = ExtentCache(resolve).reading
    first = find_all(cache, MIB, 64 * MIB)
    asked.clear()
    assert find_all(cache, MIB, 64 * MIB) == first
    assert asked == []


def test_a_table_that_is_full_loses_the_half_that_is_far_away(monkeypatch):
    monkeypatch.setattr(extents, "MAX_EXTENTS", 16)
    resolve, asked = scattered(MIB, 64 * MIB, files=64)
    cache = ExtentCache(resolve).reading
    first = find_all(cache, MIB, 64 * MIB)
    asked.clear()
    assert find_all(cache, MIB, 64 * MIB)[-8:] == first[-8:]
    assert len(asked) <= 64 - 8


def test_far_out_and_out_of_memory(monkeypatch):
    """What no map reaches is in the table; so is what there is no memory for."""

    def resolve(offset, length, *, for_write):
        return [HostExtent(fd=3, offset=offset ^ 64 * KIB, length=64 * KIB - offset % (64 * KIB))]

    cache = ExtentCache(resolve).reading
    far = 1 << 62
    assert cache.find(far, 128 * KIB) == [
        (3, far + 64 * KIB, 64 * KIB),
        (3, far, 64 * KIB),
    ]
    monkeypatch.setattr(extents.ChunkMap, "_move", _no_memory)
    cache = ExtentCache(resolve).reading
    assert cache.find(0, 64 * KIB) == [(3, 64 * KIB, 64 * KIB)]


def _no_memory(self, chunks):
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("files", [1, 3, 20])
def test_forgetting_a_part_or_all(files):
    size = 256 * MIB
    resolve, asked = scattered(64 * KIB, size, files=files)
    both = ExtentCache(resolve)
    cache = both.reading
    find_all(cache, 64 * KIB, size)
    for offset, length in ((0, 64 * KIB), (100 * MIB, 70 * MIB), (0, 1 << 63)):
        asked.clear()
        both.forget(offset, length)
        find_all(cache, 64 * KIB, size)
        forgotten = range(offset, min(offset + length, size), 64 * KIB)
        assert set(forgotten) <= set(asked)
        if length < size and files == 1:
            assert len(asked) == len(forgotten)


def test_neighbours_in_both_places_are_one_entry():
    """Extents of 4 KiB that continue each other fill no table."""

    def resolve(offset, length, *, for_write):
        return [HostExtent(fd=3, offset=offset + 7, length=4 * KIB - offset % (4 * KIB))]

    cache = ExtentCache(resolve).reading
    order = list(range(0, 4 * MIB, 4 * KIB))
    random.Random(1).shuffle(order)
    for offset in order:
        cache.find(offset, 4 * KIB)
    for offset, _ in itertools.pairwise(sorted(order)):
        assert cache.known(offset, 4 * MIB) == (3, offset + 7, 4 * MIB - offset)


# -- what is added to the native one --------------------------------------------------------------

MOST = 4096
"""In C: entries of the table, and pages of 512 chunks."""
PAGE = 32 * MIB
CHUNK = 64 * KIB


class Told(CExtents):
    """The native one, with a driver that says nothing: what is known was told."""

    def __init__(self):
        super().__init__(lambda *_, **__: None)

    def put(self, start, end, fd, position, *, for_write=False):
        assert native.lib.xbd_extents_put(self.extents.handle, for_write, start, end, fd, position)

    def add(self, start, end, fd, position, *, for_write=False, losses=None):
        if losses is None:
            losses = self.losses()
        return native.lib.xbd_extents_add(
            self.extents.handle, for_write, start, end, fd, position, losses
        )

    def losses(self):
        return native.lib.xbd_extents_losses(self.extents.handle)

    def known(self, offset, length, *, for_write=False):
        return self.find(offset, length, for_write=for_write)


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["put", "add", "add", "forget"]),
            range_of_disk,
            st.integers(3, 5),
            positions,
        ),
        max_size=40,
    ),
    for_write=st.booleans(),
)
def test_what_is_added_goes_where_nothing_is_known(steps, for_write):
    """Beside what was put last, of which the rest of a chunk may be dropped."""
    told, model = Told(), Layout([None] * SIZE)
    for step, (first, count), fd, position in steps:
        offset, length = first * BLOCK, count * BLOCK
        new = {first + i: (fd, position + i * BLOCK) for i in range(count)}
        if step == "forget":
            told.forget(offset, length)
            model.owners = [None if at in new else owner for at, owner in enumerate(model.owners)]
        elif step == "put":
            told.put(offset, offset + length, fd, position, for_write=for_write)
            model.owners = [new.get(at, owner) for at, owner in enumerate(model.owners)]
        else:
            for at in list(new):
                if told.known(at * BLOCK, BLOCK, for_write=for_write):
                    del new[at]
            assert told.add(offset, offset + length, fd, position, for_write=for_write)
            model.owners = [new.get(at, owner) for at, owner in enumerate(model.owners)]
            assert told.known(offset, length, for_write=for_write) == model.pieces(offset, length)
        for at in range(SIZE):
            found = told.known(at * BLOCK, BLOCK, for_write=for_write)
            assert found is None or found == model.pieces(at * BLOCK, BLOCK)
        assert told.known(0, SIZE * BLOCK, for_write=not for_write) is None


def test_gaps_between_chunks_and_what_is_smaller():
    told = Told()
    told.put(64 * KIB, 128 * KIB, 3, 5 * MIB)
    told.put(148 * KIB, 152 * KIB, 4, 6 * MIB)
    told.put(250 * KIB, 330 * KIB, 5, 7 * MIB)  # a chunk, and a part of one at each side
    assert told.add(0, MIB, 9, GIB)
    assert told.known(0, MIB) == [
        (9, GIB, 64 * KIB),
        (3, 5 * MIB, 64 * KIB),
        (9, GIB + 128 * KIB, 20 * KIB),
        (4, 6 * MIB, 4 * KIB),
        (9, GIB + 152 * KIB, 98 * KIB),
        (5, 7 * MIB, 80 * KIB),
        (9, GIB + 330 * KIB, MIB - 330 * KIB),
    ]


def test_what_is_known_reaches_beyond_what_is_added():
    told = Told()
    told.put(0, 100 * KIB, 3, 0)
    told.put(200 * KIB, MIB, 3, 200 * KIB)
    assert told.add(32 * KIB, 300 * KIB, 9, GIB)
    assert told.known(0, MIB) == [
        (3, 0, 100 * KIB),
        (9, GIB + 68 * KIB, 100 * KIB),
        (3, 200 * KIB, MIB - 200 * KIB),
    ]
    assert told.add(210 * KIB, 220 * KIB, 9, 0), "where all is known"
    assert told.known(200 * KIB, 100 * KIB) == [(3, 200 * KIB, 100 * KIB)]


@pytest.mark.parametrize("fine", [False, True])
def test_a_very_long_extent_over_what_is_known(fine):
    """Beyond what pages reach as well; with fine chunks these are 16 times as many."""
    told = Told()
    for number in range(2 * MOST if fine else 0):
        told.put(number * CHUNK, number * CHUNK + 4 * KIB, 3, number * MIB)
    told.forget(0, TIB)
    unit = native.lib.xbd_extents_chunk(told.extents.handle, False)
    assert unit == (4 * KIB if fine else CHUNK)
    known = [10 * MIB, GIB, TIB, 7 * TIB, 20 * TIB]
    for number, start in enumerate(known):
        told.put(start, start + unit, 3, number * MIB)
    began = time.thread_time()
    assert told.add(0, 64 * TIB, 9, TIB)
    assert time.thread_time() - began < 1
    wanted = []
    at = 0
    for number, start in enumerate(known):
        wanted += [(9, TIB + at, start - at), (3, number * MIB, unit)]
        at = start + unit
    assert told.known(0, 64 * TIB) == [*wanted, (9, TIB + at, 64 * TIB - at)]


def fill_table(told, count=MOST):
    """With parts of two chunks each, which continue nothing."""
    starts = [number * 4 * CHUNK + CHUNK // 2 for number in range(count)]
    for number, start in enumerate(starts):
        told.put(start, start + CHUNK, 3, GIB + number * 3 * MIB)
    return starts


def fill_pages(told, count=MOST):
    """With one chunk each, from the second page on."""
    starts = [number * PAGE + 5 * CHUNK for number in range(1, count + 1)]
    for number, start in enumerate(starts):
        told.put(start, start + CHUNK, 3, GIB + number * 3 * MIB)
    return starts


@pytest.mark.parametrize("fill", [fill_table, fill_pages])
def test_nothing_is_added_once_something_was_dropped(fill):
    """By whoever asked before: what was dropped may have been newer than his answer."""
    told = Told()
    before = told.losses()
    *_, last = fill(told)
    assert told.losses() == before, "there was room for so much"
    far = 1 << 42
    told.put(far + 4 * KIB, far + 8 * KIB + CHUNK, 3, 0)
    told.put(far + PAGE, far + PAGE + CHUNK, 3, 0)
    after = told.losses()
    assert after != before
    assert not told.add(far, far + MIB, 9, 0, losses=before)
    assert not told.add(far, far + MIB, 9, 0, for_write=True, losses=before)
    assert told.known(far, 4 * KIB) is None
    assert told.known(far, 4 * KIB, for_write=True) is None
    assert told.known(last, CHUNK) == [(3, GIB + (MOST - 1) * 3 * MIB, CHUNK)]
    assert told.add(far, far + MIB, 9, 0, losses=after)
    assert told.known(far, 4 * KIB) == [(9, 0, 4 * KIB)]


@pytest.mark.parametrize(("fill", "first"), [(fill_table, 0), (fill_pages, 256 * CHUNK)])
def test_what_an_addition_drops_itself_is_not_added_instead(fill, first):
    """For want of room: what is known stays, or nothing is known any more."""
    told = Told()
    starts = fill(told)
    before = told.losses()
    told.add(first, starts[-1] + CHUNK, 9, 0)
    assert told.losses() != before, "there was not room for this"
    for number, start in enumerate(starts):
        assert told.known(start, CHUNK) in (None, [(3, GIB + number * 3 * MIB, CHUNK)])


@pytest.mark.parametrize("how", ["put", "forget"])
def test_the_end_that_a_full_table_has_no_room_for_counts_as_dropped(how):
    """Of what is cut in two."""
    told = Told()
    fill_table(told, MOST - 1)
    start, end = 2 * GIB, 2 * GIB + MIB
    told.put(start, end, 3, 1)  # no sector begins there: so it is in the table
    losses = told.losses()
    middle = start + 4 * CHUNK
    if how == "put":
        told.put(middle, middle + CHUNK, 3, 0)
    else:
        told.forget(middle, CHUNK)
    told.add(middle + CHUNK, end, 9, 0, losses=losses)
    assert told.known(middle + CHUNK, CHUNK) in (None, [(3, 1 + 5 * CHUNK, CHUNK)])
