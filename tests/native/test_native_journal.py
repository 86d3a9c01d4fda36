"""journal.c in a journal that Python made: whenever it is left, Python reads what is owed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_build import declarations

from xbd.core.blkif import X86_32, X86_64
from xbd.core.datapath.journal import (
    Debt,
    Journal,
    JournalMemory,
    OpenRequest,
    RingIdentity,
    read_journal,
)

U32_END = 1 << 32
IDENTITY = RingIdentity(
    domid=3,
    devid=51712,
    queue=0,
    ring_order=0,
    event_channel=7,
    ring_refs=(8,),
    protocol="x86_64-abi",
    cookie="a-cookie",
)
ENTRIES = 32


@pytest.fixture(scope="session")
def native(native_library):
    return native_library(["journal.c"], declarations("journal.h"))


class NativeJournal:
    """A journal that Python makes and C keeps."""

    def __init__(self, native, path, size, debt):
        self.ffi, self.lib = native
        self.size = size
        self.made = JournalMemory(IDENTITY, ENTRIES, size, path, debt)
        marks, indices, copies = self.made.arrays
        self.buffers = [
            self.ffi.from_buffer("uint64_t[]", marks),
            self.ffi.from_buffer("uint32_t[]", indices),
            self.ffi.from_buffer("uint8_t[]", copies),
        ]
        self.journal = self.ffi.new("struct journal *")
        owed = len(debt.requests)
        assert self.lib.journal_open(self.journal, *self.buffers, ENTRIES, size, owed)

    def record(self, index, entry):
        self.ffi.memmove(self.lib.journal_next(self.journal), entry, self.size)
        return self.lib.journal_record(self.journal, index)

    def answering(self, slot, response):
        self.lib.journal_answering(self.journal, slot, response)

    def clear(self, slot):
        self.lib.journal_clear(self.journal, slot)

    def close(self):
        self.lib.journal_close(self.journal)
        for buffer in self.buffers:
            self.ffi.release(buffer)
        self.made.close()


class World:
    """The same life of a ring in two journals, kept by C and by Python."""

    def __init__(self, native, folder, size, start, owed):
        self.size = size
        self.copies = 0
        self.consumed = (start + owed) % U32_END
        self.published = self.answered = start
        debt = Debt([OpenRequest((start + i) % U32_END, self.entry()) for i in range(owed)], start)
        self.paths = (folder / "native", folder / "python")
        self.native = NativeJournal(native, self.paths[0], size, debt)
        self.python = Journal(IDENTITY, ENTRIES, size, self.paths[1], debt)
        self.open = [(slot, slot) for slot in range(owed)]
        self.answering: list[tuple[int, int]] = []

    def entry(self):
        self.copies += 1
        return self.copies.to_bytes(4, "little") * (self.size // 4)

    def record(self):
        """False: the ring has no room."""
        if len(self.open) + len(self.answering) == ENTRIES:
            return False
        entry = self.entry()
        slot = self.native.record(self.consumed, entry)
        taken = {slot for slot, _ in self.open + self.answering}
        assert slot < ENTRIES
        assert slot not in taken
        [twin] = self.python.record(self.consumed, entry)
        self.open.append((slot, twin))
        self.consumed = (self.consumed + 1) % U32_END
        return True

    def answer(self, which):
        slot, twin = self.open.pop(which % len(self.open))
        self.native.answering(slot, self.answered)
        self.python.answering([twin], self.answered)
        self.answering.append((slot, twin))
        self.answered = (self.answered + 1) % U32_END

    def publish(self):
        """The responses are; each of them is cleared, and each time may be the last."""
        self.published = self.answered
        self.compare()
        while self.answering:
            slot, twin = self.answering.pop(0)
            self.native.clear(slot)
            self.python.clear([twin])
            self.compare()

    def compare(self):
        """What the next backend would read, wherever rsp_prod was when this one died."""
        marks = self.native.made.arrays[0]
        taken = {slot for slot, _ in self.open + self.answering}
        assert {slot for slot, mark in enumerate(marks) if mark} == taken
        unpublished = (self.answered - self.published) % U32_END
        for further in range(unpublished + 1):
            rsp_prod = (self.published + further) % U32_END
            debt = read_journal(self.paths[0], IDENTITY, rsp_prod)
            assert debt is not None
            assert debt == read_journal(self.paths[1], IDENTITY, rsp_prod)
            assert len(debt.requests) == len(self.open) + unpublished - further

    def close(self):
        self.native.close()
        self.python.close()


@given(
    size=st.sampled_from([X86_64.request_size, X86_32.request_size]),
    start=st.one_of(st.integers(0, 40).map(lambda back: -back % U32_END), st.just(7)),
    owed=st.integers(0, ENTRIES),
    script=st.lists(
        st.one_of(
            st.tuples(st.just("record"), st.integers(1, ENTRIES)),
            st.tuples(st.just("answer"), st.integers(0, 1 << 16)),
            st.tuples(st.just("answer all"), st.integers(0, 1 << 16)),
            st.tuples(st.just("publish"), st.just(0)),
        ),
        max_size=30,
    ),
)
def test_the_debt_is_what_python_would_leave(native, tmp_path_factory, size, start, owed, script):
    world = World(native, tmp_path_factory.mktemp("journals"), size, start, owed)
    world.compare()
    for what, number in script:
        if what == "record":
            for _ in range(number):
                if not world.record():
                    break
        elif what == "publish":
            world.publish()
        elif world.open:
            for _ in range(len(world.open) if what == "answer all" else 1):
                world.answer(number)
        world.compare()
    world.publish()
    assert world.python.open_requests == len(world.open)
    world.close()


def test_what_was_owed_is_kept_until_it_is_cleared(native, tmp_path):
    size = X86_64.request_size
    debt = Debt([OpenRequest(40 + i, bytes([i]) * size) for i in range(3)], 40)
    journal = NativeJournal(native, tmp_path / "ring", size, debt)
    others = [journal.record(43 + i, bytes([43 + i]) * size) for i in range(ENTRIES - 3)]
    assert sorted(others) == list(range(3, ENTRIES))
    journal.answering(1, 40)
    journal.clear(1)
    assert journal.record(43 + ENTRIES - 3, b"\xff" * size) == 1, "the only one that is free"
    left = read_journal(tmp_path / "ring", IDENTITY, 41)
    assert left is not None
    assert [request.index for request in left.requests] == [40, *range(42, 44 + ENTRIES - 3)]
    assert left.requests[-1].entry == b"\xff" * size
    journal.close()
