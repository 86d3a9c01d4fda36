"""What is done with a whole batch at once: copying it one single time, and answering it."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole_requests import whole_batch

from xbd.core.blkif import X86_32, X86_64, BackRing, Decoder, FrontRing, Rejected, Transfer, encode
from xbd.core.errors import BadRequest

U32 = 1 << 32
PAGE = (7, 0, 7)


def no_fence():
    """Both halves run in one thread."""


def make(abi, start=0):
    view = memoryview(bytearray(b"\xaa" * 4096))
    front = FrontRing(view, abi, 0, fence=no_fence, start=start)
    return view, front, BackRing(view, abi, 0, fence=no_fence, attach=True)


def ask(abi, front, count):
    for request_id in range(count):
        front.submit(encode.encode_rw(abi, 0, request_id, 0, [PAGE] * (request_id % 11 + 1)))
    front.push()


# -- copied once (XSA-155) ------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, U32 - 7])
def test_scribbling_after_the_copy(abi, limits, start):
    view, front, back = make(abi, start)
    ask(abi, front, 20)
    entries = back.take()
    view[:] = b"\xff" * len(view)
    requests = whole_batch(Decoder(abi, limits), entries)
    assert [request.id for request in requests] == list(range(20))
    assert all(isinstance(request, Transfer) for request in requests)


@pytest.mark.parametrize("claimed", [0, 1, 21, 32, 33, U32 - 1])
def test_req_prod_that_changes_while_we_look(abi, claimed):
    """Between the check of req_prod and the copy: the checked number is the one that counts."""
    view, front, back = make(abi)
    ask(abi, front, 20)
    words = view[:16].cast("I")

    def scribble():
        words[0] = claimed

    back._fence = scribble
    assert len(back.take()) == 20 * abi.request_size
    assert back.req_cons == 20


def test_slots_that_change_between_check_and_copy_are_judged_as_copied(abi, limits):
    view, front, back = make(abi)
    ask(abi, front, 20)

    def scribble():
        view[64:] = b"\xff" * (len(view) - 64)

    back._fence = scribble
    requests = whole_batch(Decoder(abi, limits), back.take())
    assert all(isinstance(request, Rejected) for request in requests)


def test_limits_that_shrink_between_an_indirect_request_and_its_pages(abi, limits):
    """A resize in between: what counts is the disk as it is when the transfer starts."""
    decoder = Decoder(abi, limits)
    indirect = decoder.decode(encode.encode_indirect(abi, 1, 9, 8, 12, [1]))
    table = encode.pack_indirect_page([PAGE] * 12)
    assert decoder.expand(indirect, [table]).length == 12 * 4096
    decoder.limits = attrs.evolve(limits, size=13 * 4096 - 512)
    with pytest.raises(BadRequest):
        decoder.expand(indirect, [table])


# -- many answers ---------------------------------------------------------------------------

ANSWERS = st.lists(
    st.tuples(
        st.integers(0, 31),
        st.integers(0, 2**64 - 1),
        st.integers(0, 255),
        st.sampled_from([0, -1, -2]),
    ),
    max_size=32,
)


@given(
    abi=st.sampled_from([X86_64, X86_32]),
    batches=st.lists(ANSWERS, max_size=4),
    start=st.sampled_from([0, 5, U32 - 9]),
)
def test_many_answers_are_what_single_ones_are(abi, batches, start):
    memories = []
    for many in (True, False):
        view, front, back = make(abi, start)
        for answers in batches:
            ask(abi, front, 32)
            back.take()
            if many:
                back.answer_many(answers)
            else:
                for _, request_id, operation, status in answers:
                    back.answer(request_id, operation, status)
            for _ in range(32 - len(answers)):
                back.answer(0, 0, 0)
            back.push()
            assert front.responses()[: len(answers)] == [answer[1:] for answer in answers]
        memories.append(bytes(view))
    assert memories[0] == memories[1]


def test_no_answers_at_all():
    view, _, back = make(X86_64)
    before = bytes(view)
    back.answer_many([])
    assert bytes(view) == before


def test_more_answers_than_requests():
    _, front, back = make(X86_64)
    ask(X86_64, front, 3)
    back.take(2)
    with pytest.raises(AssertionError, match="more answers"):
        back.answer_many([(0, 0, 0, 0)] * 3)
    back.answer_many([(0, 0, 0, 0)] * 2)
