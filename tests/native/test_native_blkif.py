"""blkif.c against the modules it is the twin of: whatever a guest writes, both answer alike."""

from __future__ import annotations

import functools
import struct

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from native_build import declarations

from xbd.core.blkif import (
    X86_32,
    X86_64,
    BackRing,
    Decoder,
    Discard,
    Flush,
    FrontRing,
    Indirect,
    Limits,
    Rejected,
    Transfer,
    constants,
    whole,
)
from xbd.core.blkif.abi import RING_HEADER_BYTES, entries
from xbd.core.errors import GuestError, RingCorrupt

ABIS = (X86_64, X86_32)
U64_END = 1 << 64
U32_END = 1 << 32

BYTE = st.integers(0, 255)
U32 = st.integers(0, U32_END - 1)
U64 = st.integers(0, U64_END - 1)
SIZES = (0, 512, 1 << 20, (1 << 20) + 512, 1 << 40, 1 << 63, U64_END - 512, U64_END - 1)
LIMITS = st.builds(
    Limits,
    size=st.sampled_from(SIZES),
    logical_block=st.sampled_from([512, 512, 512, 4096]),
    read_only=st.sampled_from([False, False, False, True]),
    flush=st.sampled_from([True, True, False]),
    barrier=st.sampled_from([True, True, False]),
    discard=st.sampled_from([True, True, False]),
    discard_secure=st.booleans(),
    max_indirect_segments=st.sampled_from([0, 1, 11, 256, 512, 513, 4096, 4097, U32_END - 1]),
)
EVERYTHING = Limits(
    size=1 << 40,
    logical_block=512,
    read_only=False,
    flush=True,
    barrier=True,
    discard=True,
    discard_secure=True,
    max_indirect_segments=4096,
)
# Where disks end, and where sectors in bytes leave 63 and 64 bits, and a little around it.
SECTOR = st.one_of(
    U64,
    st.builds(
        lambda edge, apart: max(0, min(U64_END - 1, edge + apart)),
        st.sampled_from([0, *(size // 512 for size in SIZES), 1 << 54, 1 << 55, U64_END - 1]),
        st.one_of(st.integers(-90, 90), st.integers(-12, 12).map(lambda count: count * 8)),
    ),
)
GOOD_BOUNDS = st.integers(0, 7).flatmap(
    lambda first: st.integers(first, 7).map(lambda last: (first, last))
)
BOUNDS = st.one_of(st.just((0, 7)), GOOD_BOUNDS)
WRONG_BOUNDS = st.tuples(st.sampled_from([0, 1, 7, 8, 255]), st.sampled_from([0, 7, 8, 9, 255]))
SEGMENT = struct.Struct("<IBBH")


@st.composite
def tables(draw, count):
    """So many segments; now and then one of them is wrong."""
    some = draw(st.lists(st.tuples(U32, BOUNDS, st.integers(0, 0xFFFF)), min_size=1, max_size=12))
    table = (some * (count // len(some) + 1))[:count]
    if table and draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, count - 1))
        table[at] = (table[at][0], draw(WRONG_BOUNDS), table[at][2])
    return b"".join(SEGMENT.pack(gref, *bounds, padding) for gref, bounds, padding in table)


@st.composite
def direct_entries(draw, abi):
    """Any operation but indirect ones, laid out as a transfer."""
    operation = draw(st.one_of(st.integers(0, 3), st.integers(0, 3), BYTE))
    count = draw(st.one_of(st.integers(1, 11), st.integers(0, 13), BYTE))
    entry = bytearray(abi.request_size)
    struct.pack_into("<BBH", entry, 0, operation, count, draw(st.integers(0, 0xFFFF)))
    struct.pack_into("<QQ", entry, abi.id_offset, draw(U64), draw(SECTOR))
    entry[abi.segments_offset : abi.segments_offset + 88] = draw(tables(11))
    return bytes(entry)


@st.composite
def discard_entries(draw, abi):
    flag = draw(st.one_of(st.integers(0, 3), BYTE))
    count = draw(st.one_of(st.integers(0, 40), SECTOR))
    return abi.discard.pack(constants.DISCARD, flag, 7, draw(U64), draw(SECTOR), count)


@st.composite
def indirect_entries(draw, abi):
    inner = draw(st.one_of(st.integers(0, 1), st.integers(0, 7), BYTE))
    count = draw(
        st.one_of(
            st.integers(1, 30),
            st.sampled_from([0, 1, 11, 256, 511, 512, 513, 1024, 1025, 4096, 4097, 65535]),
        )
    )
    refs = draw(st.lists(U32, min_size=8, max_size=8))
    sector = draw(SECTOR)
    return abi.indirect.pack(constants.INDIRECT, inner, count, draw(U64), sector, 7, *refs)


def any_entries(abi):
    return st.one_of(
        direct_entries(abi),
        direct_entries(abi),
        discard_entries(abi),
        indirect_entries(abi),
        st.binary(min_size=abi.request_size, max_size=abi.request_size),
    )


class Native:
    """blkif.c, with the answers put as Python would put them."""

    def __init__(self, ffi, lib):
        self.ffi = ffi
        self.lib = lib

    def abi(self, abi):
        return self.ffi.addressof(self.lib.ABIS, ABIS.index(abi))

    def limits(self, limits):
        return self.ffi.new("struct xbd_limits *", attrs.asdict(limits))

    def decode(self, abi, limits, entry):
        """The request as an object, and as C has it."""
        request = self.ffi.new("struct request *")
        # What it does not set must not be looked at.
        self.ffi.memmove(
            request, b"\xa5" * self.ffi.sizeof(request[0]), self.ffi.sizeof(request[0])
        )
        segments = self.ffi.new("struct segment[]", self.lib.MAX_SEGMENTS)
        table = self.ffi.from_buffer("uint8_t[]", entry)
        self.lib.decode(self.abi(abi), self.limits(limits), table, request, segments)
        return self.told(request, segments), request

    def expand(self, limits, request, table):
        segments = self.ffi.new("struct segment[]", request.nr_segments)
        self.lib.expand(
            self.limits(limits), request, self.ffi.from_buffer("uint8_t[]", table), segments
        )
        return self.told(request, segments)

    def told(self, request, segments):
        lib = self.lib
        if request.kind == lib.TRANSFER:
            found = [(s.gref, s.start, s.length) for s in segments[0 : request.nr_segments]]
            return Transfer(request.id, request.operation, request.offset, request.length, found)
        if request.kind == lib.FLUSH:
            return Flush(request.id, request.operation)
        if request.kind == lib.DISCARD:
            place = (request.offset, request.length)
            return Discard(request.id, request.operation, *place, request.secure)
        if request.kind == lib.INDIRECT:
            refs = tuple(request.refs[0 : request.nr_refs])
            return Indirect(
                request.id, request.operation, request.offset, request.nr_segments, refs
            )
        assert request.kind == lib.REJECTED
        return Rejected(request.id, request.operation, request.status, "")


@pytest.fixture(scope="session")
def native(native_library):
    return Native(*native_library(["blkif.c"], declarations("api.h", "blkif.h")))


def assert_alike(found, wanted):
    if isinstance(wanted, Rejected):
        wanted = attrs.evolve(wanted, reason="")
    assert type(found) is type(wanted)
    assert attrs.astuple(found) == attrs.astuple(wanted)


def judge_both(native, abi, limits, entry):
    [wanted] = Decoder(abi, limits).decode_batch(entry)
    found, _ = native.decode(abi, limits, entry)
    assert_alike(found, whole(wanted))


def test_the_layouts_are_those_of_python(native):
    for at, abi in enumerate(ABIS):
        layout = native.lib.ABIS[at]
        assert layout.entry_size == abi.request_size
        assert layout.response_size == abi.response_size
        assert layout.id == layout.indirect_id == abi.id_offset
        assert layout.sector == layout.indirect_sector == abi.sector_offset
        assert layout.segments == abi.segments_offset
    assert native.lib.RING_HEADER == RING_HEADER_BYTES
    assert native.lib.MAX_SEGMENTS == constants.MAX_SEGMENTS
    assert native.lib.MAX_INDIRECT_PAGES == constants.MAX_INDIRECT_PAGES
    assert native.lib.SEGMENTS_PER_INDIRECT_PAGE == constants.SEGMENTS_PER_INDIRECT_PAGE


@pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)
@given(data=st.data(), limits=LIMITS)
@settings(max_examples=4 * settings.default.max_examples)
def test_every_entry_is_judged_alike(native, abi, data, limits):
    judge_both(native, abi, limits, data.draw(any_entries(abi)))


@pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)
@given(data=st.data(), limits=LIMITS, later=st.none() | LIMITS)
@settings(max_examples=4 * settings.default.max_examples)
def test_indirect_pages_are_judged_alike(native, abi, data, limits, later):
    """Also when the limits have changed since the request was decoded."""
    entry = data.draw(indirect_entries(abi))
    limits = attrs.evolve(limits, max_indirect_segments=4096, read_only=False)
    decoder = Decoder(abi, limits)
    try:
        indirect = decoder.decode(entry)
    except GuestError:
        judge_both(native, abi, limits, entry)  # refused before its pages are looked at
        return
    found, request = native.decode(abi, limits, entry)
    assert_alike(found, indirect)
    decoder.limits = later or limits
    table = data.draw(tables(indirect.nr_segments))
    try:
        wanted = decoder.expand(indirect, [table])
    except GuestError:
        wanted = Rejected(indirect.id, indirect.operation, constants.RSP_ERROR, "")
    assert_alike(native.expand(decoder.limits, request, table), wanted)


@pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)
def test_every_first_two_bytes_are_judged_alike(native, abi):
    """Operations with every number of segments, flag and inner operation."""
    whole_pages = SEGMENT.pack(5, 0, 7, 0) * 11
    for operation in (*range(9), 255):
        for second in range(256):
            entry = bytearray(abi.request_size)
            entry[:4] = operation, second, 1, 0
            entry[abi.segments_offset : abi.segments_offset + 88] = whole_pages
            judge_both(native, abi, EVERYTHING, bytes(entry))


@pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)
def test_all_bounds_of_segments_are_judged_alike(native, abi):
    for first in (*range(11), 255):
        for last in (*range(11), 255):
            entry = bytearray(abi.request_size)
            entry[1] = 1
            SEGMENT.pack_into(entry, abi.segments_offset, 5, first, last, 0xFFFF)
            judge_both(native, abi, EVERYTHING, bytes(entry))


@pytest.mark.parametrize("sectors", [1 << 54, 1 << 55, (1 << 55) + 1, 1 << 63, U64_END - 1])
@pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)
def test_bytes_that_leave_64_bits_are_out_of_range(native, abi, sectors):
    """Modulo 2**64 some of these would be the disk's first bytes."""
    head = struct.Struct("<QQ")
    for operation, count in [(0, 1), (1, 1), (2, 1), (3, 1), (5, 0), (6, 0)]:
        entry = bytearray(abi.request_size)
        entry[:2] = operation, count
        if operation == constants.INDIRECT:
            entry[2] = 1
        head.pack_into(entry, abi.id_offset, 9, sectors)
        found, _ = native.decode(abi, EVERYTHING, bytes(entry))
        assert_alike(found, Rejected(9, count if operation == 6 else operation, -1, ""))
    entry = abi.discard.pack(constants.DISCARD, 0, 0, 9, 0, sectors)
    found, _ = native.decode(abi, EVERYTHING, entry)
    assert_alike(found, Rejected(9, constants.DISCARD, -1, ""))


class NativeBackRing:
    """`BackRing` in C, as far as the tests use it."""

    def __init__(self, native, view, abi, order, *, req_cons, rsp_prod):
        self.native = native
        self.entry_size = abi.request_size
        self.entries = entries(order)
        self.ring = native.ffi.new("struct back_ring *")
        self.shared = native.ffi.from_buffer("uint8_t[]", view)
        native.lib.ring_attach(
            self.ring, self.shared, native.abi(abi), self.entries, req_cons, rsp_prod
        )

    @property
    def req_cons(self):
        return self.ring.req_cons

    @property
    def rsp_prod_pvt(self):
        return self.ring.rsp_prod_pvt

    def _checked(self, waiting):
        if waiting >= 0:
            return waiting
        claimed = self.native.lib.ring_claimed(self.ring)
        if claimed > self.entries:
            raise RingCorrupt(f"the frontend claims {claimed} requests in a ring of {self.entries}")
        raise RingCorrupt("the frontend took back requests that were consumed already")

    def take(self, limit=None):
        waiting = self._checked(self.native.lib.ring_waiting(self.ring))
        found = b""
        entry = self.native.ffi.new("uint8_t[]", self.entry_size)
        for _ in range(waiting if limit is None else min(waiting, limit)):
            self.native.lib.ring_take(self.ring, entry)
            found += bytes(entry)
        return found

    def answer(self, request_id, operation, status):
        self.native.lib.ring_answer(self.ring, request_id, operation, status)

    def push(self):
        return self.native.lib.ring_push(self.ring)

    def final_check(self):
        return self._checked(self.native.lib.ring_final_check(self.ring)) > 0


def outcome(action):
    try:
        return action()
    except RingCorrupt as error:
        return str(error)


class RingMachine(RuleBasedStateMachine):
    """A frontend before two backends, each with a page of its own: they never differ in a bit.

    An honest frontend also gets what it is due; one that has become hostile writes anything.
    """

    def __init__(self, native):
        super().__init__()
        self.native = native
        self.honest = True
        self.sent = []
        self.open = []
        self.written = []
        self.due = []

    @initialize(
        abi=st.sampled_from(ABIS),
        order=st.integers(0, 2),
        start=st.one_of(st.integers(0, 140).map(lambda back: -back % U32_END), U32),
        owed=st.one_of(st.just(0), st.integers(0, 128)),
    )
    def connect(self, abi, order, start, owed):
        self.abi = abi
        self.page = bytearray(4096 << order)
        self.front = FrontRing(memoryview(self.page), abi, order, fence=int, start=start)
        self.next_id = 0
        owed = min(owed, self.front.entries)
        for _ in range(owed):
            self.submit()
        self.front.push()
        self.twin_page = bytearray(self.page)
        self.twin = BackRing(memoryview(self.twin_page), abi, order, fence=int, attach=True)
        self.twin.resume(owed)
        self.back = NativeBackRing(
            self.native,
            self.page,
            abi,
            order,
            req_cons=(start + owed) % U32_END,
            rsp_prod=start,
        )
        self.open, self.sent = self.sent, []

    def submit(self):
        entry = self.next_id.to_bytes(4, "little") * (self.abi.request_size // 4)
        self.front.submit(entry)
        self.sent.append((self.next_id, entry))
        self.next_id += 1

    def show(self):
        """What the frontend has written, the second backend sees too."""
        self.twin_page[:] = self.page

    @precondition(lambda self: self.honest)
    @rule(count=st.integers(0, 128))
    def ask(self, count):
        for _ in range(min(count, self.front.free)):
            self.submit()
        self.front.push()
        self.show()

    @precondition(lambda self: self.honest)
    @rule()
    def look(self):
        assert self.front.responses() == self.due
        self.due = []
        self.front.final_check()
        self.show()

    @rule(
        word=st.integers(0, 3),
        value=U32 | st.integers(-200, 200),
        near=st.booleans(),
    )
    def write_an_index(self, word, value, near):
        self.honest = False
        if near:
            value += self.back.req_cons
        struct.pack_into("=I", self.page, 4 * word, value % U32_END)
        self.show()

    @rule(at=st.integers(0, 1 << 14), junk=st.binary(min_size=1, max_size=120))
    def write_anything(self, at, junk):
        self.honest = False
        at = RING_HEADER_BYTES + at % (len(self.page) - RING_HEADER_BYTES)
        junk = junk[: len(self.page) - at]
        self.page[at : at + len(junk)] = junk
        self.show()

    @rule(limit=st.none() | st.integers(0, 40))
    def take(self, limit):
        found = outcome(lambda: self.back.take(limit))
        assert found == outcome(lambda: self.twin.take(limit))
        if isinstance(found, str):
            assert not self.honest
            return
        size = self.abi.request_size
        taken = [found[at : at + size] for at in range(0, len(found), size)]
        if self.honest:
            assert taken == [entry for _, entry in self.sent[: len(taken)]]
            self.open += self.sent[: len(taken)]
            del self.sent[: len(taken)]
        else:
            self.open += [(int.from_bytes(entry[8:16], "little"), entry) for entry in taken]

    @precondition(lambda self: self.open)
    @rule(at=st.integers(0, 1 << 16), operation=BYTE, status=st.sampled_from([0, -1, -2, 77]))
    def answer(self, at, operation, status):
        request_id, _ = self.open.pop(at % len(self.open))
        self.back.answer(request_id, operation, status)
        self.twin.answer(request_id, operation, status)
        self.written.append((request_id, operation, status))

    @precondition(lambda self: self.open)
    @rule()
    def answer_all(self):
        while self.open:
            self.answer(0, 1, 0)

    @rule()
    def push(self):
        assert self.back.push() == self.twin.push()
        self.due += self.written
        self.written = []

    @precondition(lambda self: self.honest)
    @rule()
    def push_and_look(self):
        self.push()
        self.look()

    @rule()
    def final_check(self):
        found = outcome(self.back.final_check)
        assert found == outcome(self.twin.final_check)
        assert not (self.honest and isinstance(found, str))

    @invariant()
    def both_are_alike(self):
        assert self.page == self.twin_page
        assert (self.back.req_cons, self.back.rsp_prod_pvt) == (
            self.twin.req_cons,
            self.twin.rsp_prod_pvt,
        )
        open_ = (self.back.req_cons - self.back.rsp_prod_pvt) % U32_END
        assert open_ == len(self.open) <= self.back.entries


def test_rings_are_served_alike(native):
    run_state_machine_as_test(
        functools.partial(RingMachine, native),
        settings=settings(max_examples=2 * settings.default.max_examples, stateful_step_count=40),
    )


@pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)
def test_a_response_is_written_whole_and_no_further(native, abi):
    page = bytearray(b"\xff" * 4096)
    page[:16] = struct.pack("=4I", 1, 0, 0, 1)
    back = NativeBackRing(native, page, abi, 0, req_cons=0, rsp_prod=0)
    assert len(back.take()) == abi.request_size
    back.answer(U64_END - 2, 1, -2)
    response = page[RING_HEADER_BYTES : RING_HEADER_BYTES + abi.response_size]
    assert response == abi.response.pack(U64_END - 2, 1, -2)
    assert set(page[RING_HEADER_BYTES + abi.response_size :]) == {0xFF}
    assert page[:16] == struct.pack("=4I", 1, 0, 0, 1), "nobody sees it before the push"
    assert back.push()
    assert page[:16] == struct.pack("=4I", 1, 0, 1, 1)
    assert not back.push()
