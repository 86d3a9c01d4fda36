"""Messages and grant tables, byte for byte as docs/embedded.md has them."""

from __future__ import annotations

import contextlib
import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.hypervisor.embedded_memory import contiguous, runs
from xbd.core.hypervisor.embedded_wire import (
    Hello,
    Kind,
    Offer,
    Reply,
    WireError,
    Withdraw,
    decode_reply,
    decode_request,
    grant_entry,
    refusal,
)
from xbd.core.units import Domid, GrantRef, Port

u32 = st.integers(0, 0xFFFFFFFF)
requests = st.one_of(
    st.builds(Hello, u32, st.one_of(st.none(), st.integers(1, 0x7FEF)), u32),
    st.builds(Offer, u32, u32, u32),
    st.builds(Withdraw, u32, u32),
)


@given(requests)
def test_requests_survive_the_wire(request_):
    assert decode_request(request_.encode()) == request_


@given(st.builds(Reply, st.sampled_from(Kind), u32, u32, u32, u32, u32, st.text(max_size=200)))
def test_replies_survive_the_wire(reply):
    packet = reply.encode()
    assert len(packet) == 160
    assert packet[-1] == 0
    decoded = decode_reply(packet)
    assert reply.text.startswith(decoded.text) or "\0" in reply.text
    numbers = (reply.kind, reply.id, reply.errno, reply.domid, reply.max_pages, reply.max_ports)
    assert numbers == (
        decoded.kind,
        decoded.id,
        decoded.errno,
        decoded.domid,
        decoded.max_pages,
        decoded.max_ports,
    )


@given(st.binary(max_size=64))
def test_rubbish_raises_only_wire_errors(packet):
    for decode in (decode_request, decode_reply):
        with contextlib.suppress(WireError):
            decode(packet)
    assert len(refusal(packet, WireError(errno.EPROTO, "why")).encode()) == 160


@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 0x48444258, 0xFFFFFFFF]), min_size=8, max_size=8))
def test_almost_right_requests_raise_only_wire_errors(words):
    try:
        request_ = decode_request(struct.pack("<8I", *words))
    except WireError:
        return
    assert struct.pack("<8I", *words) == request_.encode()


def test_the_documented_bytes():
    assert Hello(7, None, 16).encode().hex() == (
        "01000000070000005842444801000000ffffffff100000000000000000000000"
    )
    assert Offer(8, Port(1), Domid(0)).encode()[:16].hex() == "02000000080000000100000000000000"
    assert Withdraw(9, Port(1)).encode()[:12].hex() == "030000000900000001000000"
    reply = Reply(Kind.HELLO, 7, 0, Domid(3), 100, 10).encode()
    assert reply[:32].hex() == ("01000080070000000000000003000000640000000a0000000100000000000000")


def test_grant_entries_begin_as_xens_do():
    assert struct.pack("<Q", grant_entry(Domid(0), readonly=False)).hex() == "0100000000000000"
    assert struct.pack("<Q", grant_entry(Domid(5), readonly=True)).hex() == "0500050000000000"


@pytest.mark.parametrize("domid", [0, 0x7FF0, 0x7FFF, 0xFFFFFFFE])
def test_reserved_domids_are_refused(domid):
    with pytest.raises(WireError) as caught:
        decode_request(Hello(1, Domid(domid), 1).encode())
    assert caught.value.errno == errno.EINVAL


@given(st.lists(st.integers(0, 12), min_size=1, max_size=20))
def test_runs_are_the_same_pages_in_the_same_order(numbers):
    refs = [GrantRef(number) for number in numbers]
    found = runs(refs)
    assert [first + index for _, first, pages in found for index in range(pages)] == refs
    assert [position for position, _, _ in found] == [
        sum(pages for _, _, pages in found[:index]) for index in range(len(found))
    ]
    assert contiguous(refs) == (len(found) == 1)
