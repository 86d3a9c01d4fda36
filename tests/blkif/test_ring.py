"""The two halves of a ring, rule by rule."""

from __future__ import annotations

import pytest

from xbd.core.blkif import X86_64, BackRing, FrontRing, encode
from xbd.core.errors import RingCorrupt

REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = range(4)
U32 = 1 << 32
STARTS = [0, 5, U32 - 1, U32 - 20, U32 - 32]


def no_fence():
    """Both halves run in one thread."""


class Ring:
    """Shared memory with both halves on it."""

    def __init__(self, abi, order=0, start=0, fence=no_fence):
        self.memory = bytearray(b"\xaa" * (4096 << order))
        self.view = memoryview(self.memory)
        self.words = self.view[:16].cast("I")
        self.abi = abi
        self.front = FrontRing(self.view, abi, order, fence=fence, start=start)
        self.back = BackRing(self.view, abi, order, fence=fence, attach=True)

    def ask(self, *ids):
        for request_id in ids:
            self.front.submit(encode.encode_rw(self.abi, 0, request_id, 0, [(1, 0, 7)]))
        return self.front.push()

    def ids(self, entries):
        size, at = self.abi.request_size, self.abi.id_offset
        assert len(entries) % size == 0
        return [
            int.from_bytes(entries[n + at : n + at + 8], "little")
            for n in range(0, len(entries), size)
        ]


@pytest.fixture
def ring(abi):
    return Ring(abi)


@pytest.fixture(params=STARTS, ids=hex)
def wrapping(abi, request):
    return Ring(abi, start=request.param)


def test_the_frontend_makes_the_page(abi):
    ring = Ring(abi)
    assert list(ring.words) == [0, 1, 0, 1]
    assert ring.memory[16:64] == bytes(48)


def test_a_new_ring_is_empty(ring):
    assert ring.back.take() == b""
    assert ring.front.responses() == []
    assert not ring.back.push()
    assert not ring.front.push()
    assert ring.front.free == ring.back.entries == 32


def test_requests_are_taken_in_order_and_once(wrapping):
    wrapping.ask(*range(20))
    assert wrapping.ids(wrapping.back.take()) == list(range(20))
    assert wrapping.back.take() == b""


def test_take_is_bounded(wrapping):
    wrapping.ask(*range(20))
    assert wrapping.ids(wrapping.back.take(7)) == list(range(7))
    assert wrapping.back.take(0) == b""
    assert wrapping.ids(wrapping.back.take(100)) == list(range(7, 20))


def test_what_was_taken_does_not_change_any_more(ring):
    """XSA-155."""
    ring.ask(1, 2)
    entries = ring.back.take()
    ring.view[64:] = bytes(len(ring.view) - 64)
    assert ring.ids(entries) == [1, 2]


def test_requests_that_are_not_pushed_are_not_seen(ring):
    ring.front.submit(bytes(ring.abi.request_size))
    assert ring.back.take() == b""
    assert not ring.back.final_check()


def test_answers_in_any_order(wrapping):
    wrapping.ask(*range(10))
    wrapping.back.take()
    for request_id in (7, 2, 2**64 - 1):
        wrapping.back.answer(request_id, 3, -2)
    assert wrapping.front.responses() == []
    wrapping.back.push()
    assert wrapping.front.responses() == [(7, 3, -2), (2, 3, -2), (2**64 - 1, 3, -2)]
    assert wrapping.front.responses() == []


def test_an_answer_has_zero_padding_and_touches_nothing_else(ring):
    """XSA-216."""
    ring.ask(1)
    ring.back.take()
    ring.view[64:] = b"\xff" * (len(ring.view) - 64)
    ring.back.answer(0, 0, 0)
    size = ring.abi.response_size
    assert ring.memory[64 : 64 + size] == bytes(size)
    assert set(ring.memory[64 + size :]) == {0xFF}


def test_more_answers_than_requests_are_our_own_mistake(ring):
    ring.ask(1)
    ring.back.take()
    ring.back.answer(1, 0, 0)
    with pytest.raises(AssertionError):
        ring.back.answer(1, 0, 0)


def test_a_full_ring(wrapping):
    wrapping.ask(*range(32))
    assert wrapping.front.free == 0
    with pytest.raises(AssertionError):
        wrapping.front.submit(bytes(wrapping.abi.request_size))
    assert wrapping.ids(wrapping.back.take()) == list(range(32))
    assert not wrapping.back.final_check()
    for request_id in range(32):
        wrapping.back.answer(request_id, 0, 0)
    assert wrapping.back.push()
    assert len(wrapping.front.responses()) == 32
    assert wrapping.front.free == 32


@pytest.mark.parametrize("order", range(6))
def test_every_slot_of_a_ring_of_several_pages(abi, order):
    ring = Ring(abi, order, start=U32 - 3)
    count = 32 << order
    ring.ask(*range(count))
    assert ring.ids(ring.back.take()) == list(range(count))
    for request_id in range(count):
        ring.back.answer(request_id, 1, 0)
    ring.back.push()
    assert ring.front.responses() == [(n, 1, 0) for n in range(count)]


def test_memory_that_is_too_small(abi):
    with pytest.raises(ValueError, match="too few"):
        BackRing(memoryview(bytearray(4096)), abi, 1, fence=no_fence)


def test_release_lets_the_memory_go():
    ring = Ring(X86_64)
    for half in (ring.front, ring.back):
        half.release()
    ring.words.release()
    ring.view.release()
    ring.memory.clear()  # BufferError if any view were left


# -- hostile indices ------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [33, 34, 1 << 16, 1 << 31, U32 - 1])
def test_req_prod_too_far_ahead(wrapping, ahead):
    wrapping.words[REQ_PROD] = (wrapping.back.req_cons + ahead) % U32
    for use in (wrapping.back.take, wrapping.back.final_check):
        with pytest.raises(RingCorrupt):
            use()


def test_req_prod_too_far_ahead_of_the_answers(wrapping):
    """32 entries, 10 of them taken and not answered: room for 22 more."""
    wrapping.ask(*range(10))
    wrapping.back.take()
    wrapping.words[REQ_PROD] = (wrapping.back.req_cons + 22) % U32
    assert wrapping.back.final_check()
    wrapping.words[REQ_PROD] = (wrapping.back.req_cons + 23) % U32
    with pytest.raises(RingCorrupt, match="33 requests in a ring of 32"):
        wrapping.back.take()


@pytest.mark.parametrize("back", [1, 5, 10])
def test_req_prod_going_back(wrapping, back):
    """Back, but still ahead of the answers: ring.h's own overflow check would not see it."""
    wrapping.ask(*range(10))
    wrapping.back.take()
    wrapping.words[REQ_PROD] = (wrapping.back.req_cons - back) % U32
    with pytest.raises(RingCorrupt, match="took back"):
        wrapping.back.take()


def test_scribbling_over_the_backends_indices_changes_nothing(wrapping):
    wrapping.ask(1, 2, 3)
    wrapping.back.take()
    wrapping.words[RSP_PROD] = 12345
    wrapping.words[REQ_EVENT] = 54321
    for request_id in (1, 2, 3):
        wrapping.back.answer(request_id, 0, 0)
    wrapping.back.push()
    assert [request_id for request_id, _, _ in wrapping.front.responses()] == [1, 2, 3]


@pytest.mark.parametrize("ahead", [3, 33, 1 << 31, U32 - 1])
def test_a_backend_that_claims_too_many_answers(wrapping, ahead):
    wrapping.ask(1, 2)
    wrapping.words[RSP_PROD] = (wrapping.front.rsp_cons + ahead) % U32
    with pytest.raises(RingCorrupt):
        wrapping.front.responses()


class CountedWords:
    """The shared indices, counting the loads of each."""

    def __init__(self, words):
        self.words = words
        self.loads = [0] * 4

    def __getitem__(self, index):
        self.loads[index] += 1
        return self.words[index]

    def __setitem__(self, index, value):
        self.words[index] = value


def test_no_index_is_read_twice_for_one_decision(ring):
    ring.ask(1, 2)
    counted = ring.back._words = CountedWords(ring.words)
    ring.back.take()
    assert counted.loads == [1, 0, 0, 0]
    ring.back.answer(1, 0, 0)
    ring.back.push()
    assert counted.loads == [1, 0, 0, 1]


# -- attaching ------------------------------------------------------------------------------


def test_attaching_goes_on_at_the_last_answer(wrapping):
    wrapping.ask(*range(6))
    wrapping.back.take()
    for request_id in range(4):
        wrapping.back.answer(request_id, 0, 0)
    wrapping.back.push()
    back = BackRing(wrapping.view, wrapping.abi, 0, fence=no_fence, attach=True)
    assert wrapping.ids(back.take()) == [4, 5]
    back.answer(4, 0, 0)
    back.push()
    assert len(wrapping.front.responses()) == 5


def test_without_attaching_a_ring_begins_at_zero(ring):
    ring.words[RSP_PROD] = 7
    back = BackRing(ring.view, ring.abi, 0, fence=no_fence)
    assert (back.req_cons, back.rsp_prod_pvt) == (0, 0)


def test_attaching_to_nonsense(ring):
    ring.words[RSP_PROD] = 1000
    back = BackRing(ring.view, ring.abi, 0, fence=no_fence, attach=True)
    with pytest.raises(RingCorrupt):
        back.take()


# -- events ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS, ids=hex)
@pytest.mark.parametrize("event", range(-3, 6))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_push_wants_an_event_iff_the_other_side_waits_for_one_of_these(start, event, count):
    ring = Ring(X86_64, start=start)
    ring.words[REQ_EVENT] = (start + event) % U32
    assert ring.ask(*range(count)) == (1 <= event <= count)
    ring.back.take()
    ring.words[RSP_EVENT] = (start + event) % U32
    for request_id in range(count):
        ring.back.answer(request_id, 0, 0)
    assert ring.back.push() == (1 <= event <= count)
    assert not ring.back.push()


def test_final_check_asks_for_the_next_request(wrapping):
    wrapping.ask(1)
    wrapping.back.take()
    assert not wrapping.back.final_check()
    assert wrapping.words[REQ_EVENT] == (wrapping.back.req_cons + 1) % U32
    assert wrapping.ask(2)
    assert not wrapping.ask(3), "one event is enough until the backend looks again"
    assert wrapping.back.final_check()


def test_final_check_asks_for_the_next_response(wrapping):
    wrapping.ask(1, 2)
    wrapping.back.take()
    assert not wrapping.front.final_check()
    wrapping.back.answer(1, 0, 0)
    assert wrapping.back.push()
    assert wrapping.front.final_check()
    wrapping.front.responses()
    assert not wrapping.front.final_check()
    assert wrapping.words[RSP_EVENT] == (wrapping.front.rsp_cons + 1) % U32


def test_a_request_that_comes_at_the_instant_of_the_final_check(abi):
    """After req_event was stored, before req_prod is looked at again."""
    ring = Ring(abi)
    pushed = []
    ring.back._fence = lambda: pushed.append(ring.ask(1)) if not pushed else None
    found = ring.back.final_check()
    assert len(pushed) == 1
    assert found or pushed[0]
    assert ring.ids(ring.back.take()) == [1]


def test_a_final_check_at_the_instant_of_a_push(abi):
    """At each of the fences of a push the other side goes to sleep: it is woken or has seen it."""
    for instant in range(2):
        ring = Ring(abi)
        fences = []
        seen = []

        def fence(ring=ring, fences=fences, seen=seen, instant=instant):
            if len(fences) == instant:
                seen.append(ring.back.final_check())
            fences.append(instant)

        ring.front._fence = fence
        wanted = ring.ask(1)
        assert len(fences) == 2
        assert seen[0] or wanted


def test_stores_are_published_in_order(abi):
    """Entries before their index; a fence between them, and one between index and event."""
    ring = Ring(abi)
    indices = []
    ring.front._fence = lambda: indices.append(ring.words[REQ_PROD])
    ring.ask(1)
    assert indices == [0, 1]
    ring.back._fence = lambda: indices.append(ring.words[RSP_PROD])
    ring.back.take()
    ring.back.answer(1, 0, 0)
    ring.back.push()
    assert indices == [0, 1, 0, 0, 1]
