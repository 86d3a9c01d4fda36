"""What the front half encodes the back half decodes; and no bytes at all upset the decoder."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole_requests import whole_batch

from xbd.core.blkif import (
    ARM,
    X86_32,
    X86_64,
    Decoder,
    Discard,
    Flush,
    Indirect,
    Limits,
    Rejected,
    Transfer,
    constants,
    encode,
)
from xbd.core.errors import GuestError

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
BYTE = st.integers(0, 255)
ABI = st.sampled_from([X86_64, X86_32, ARM])
SIZE = 1 << 40
SPANS = st.tuples(U32, st.integers(0, 7), st.integers(0, 7)).map(
    lambda span: (span[0], min(span[1:]), max(span[1:]))
)
LIMITS = st.builds(
    Limits,
    size=st.sampled_from([0, 512, 1 << 20, (1 << 20) + 512, SIZE, 1 << 63]),
    logical_block=st.sampled_from([512, 4096]),
    read_only=st.booleans(),
    flush=st.booleans(),
    barrier=st.booleans(),
    discard=st.booleans(),
    discard_secure=st.booleans(),
    max_indirect_segments=st.sampled_from([0, 1, 11, 256, 512, 513, 4096, 65535]),
)
EVERYTHING = Limits(
    size=SIZE,
    logical_block=512,
    read_only=False,
    flush=True,
    barrier=True,
    discard=True,
    discard_secure=True,
    max_indirect_segments=4096,
)
SECTOR = st.integers(0, SIZE // 512 - 8 * 4096)


def in_bytes(segments):
    return [(gref, first * 512, (last - first + 1) * 512) for gref, first, last in segments]


def both_ways(decoder, entry):
    [batched] = whole_batch(decoder, entry)
    single = decoder.decode(entry)
    assert type(single) is type(batched)
    assert attrs.astuple(single) == attrs.astuple(batched)
    return single


@given(ABI, st.integers(0, 3), U64, SECTOR, st.lists(SPANS, min_size=1, max_size=11))
def test_transfers_come_back(abi, operation, request_id, sector, segments):
    entry = encode.encode_rw(abi, operation, request_id, sector, segments)
    request = both_ways(Decoder(abi, EVERYTHING), entry)
    expected = in_bytes(segments)
    length = sum(part for _, _, part in expected)
    wanted = Transfer(request_id, operation, sector * 512, length, expected)
    assert attrs.astuple(request) == attrs.astuple(wanted)
    kind = (operation != 0, operation == 2, operation == 3)
    assert (request.write, request.barrier, request.flush) == kind


@given(ABI, U64, SECTOR, st.integers(0, 8 * 4096), st.booleans())
def test_discards_come_back(abi, request_id, sector, count, secure):
    entry = encode.encode_discard(abi, request_id, sector, count, secure=secure)
    request = both_ways(Decoder(abi, EVERYTHING), entry)
    wanted = Discard(request_id, constants.DISCARD, sector * 512, count * 512, secure)
    assert attrs.astuple(request) == attrs.astuple(wanted)


@given(ABI, st.integers(0, 1), U64, SECTOR, st.data())
def test_indirect_requests_come_back(abi, operation, request_id, sector, data):
    count = data.draw(st.one_of(st.integers(1, 40), st.sampled_from([511, 512, 513, 1025, 4096])))
    some = data.draw(st.lists(SPANS, min_size=1, max_size=40))
    segments = (some * (count // len(some) + 1))[:count]
    refs = data.draw(st.lists(U32, min_size=8, max_size=8))[: -(-count // 512)]
    entry = encode.encode_indirect(abi, operation, request_id, sector, count, refs)
    decoder = Decoder(abi, EVERYTHING)
    request = both_ways(decoder, entry)
    wanted = Indirect(request_id, operation, sector * 512, count, tuple(refs))
    assert attrs.astuple(request) == attrs.astuple(wanted)
    pages = [encode.pack_indirect_page(segments[at : at + 512]) for at in range(0, count, 512)]
    transfer = decoder.expand(request, pages)
    assert transfer.segments == in_bytes(segments)
    assert (transfer.id, transfer.operation, transfer.offset) == (
        request_id,
        operation,
        sector * 512,
    )


def check(request, limits):
    """What no request that leaves the decoder may violate."""
    if isinstance(request, Transfer | Discard):
        assert 0 <= request.offset <= request.offset + request.length <= limits.size
        assert not (request.offset | request.length) % limits.logical_block
    if isinstance(request, Transfer):
        assert request.segments
        assert request.length == sum(length for _, _, length in request.segments)
        for _, start, length in request.segments:
            assert start >= 0
            assert length > 0
            assert start + length <= 4096
            assert not (start | length) % 512
        assert request.write == (request.operation != constants.READ)
        assert not (request.write and limits.read_only)
        assert not (request.flush and not limits.flush)
        assert not (request.barrier and not limits.barrier)
    elif isinstance(request, Discard):
        assert limits.discard
        assert not limits.read_only
        assert limits.discard_secure or not request.secure
    elif isinstance(request, Indirect):
        assert 1 <= request.nr_segments <= limits.max_indirect_segments
        assert len(request.refs) == -(-request.nr_segments // 512) <= 8
        assert request.operation in (constants.READ, constants.WRITE)
        assert not (request.operation == constants.WRITE and limits.read_only)
    elif isinstance(request, Rejected):
        assert request.status in (constants.RSP_ERROR, constants.RSP_EOPNOTSUPP)
        assert request.reason.isprintable()
    else:
        assert isinstance(request, Flush)


HEADS = st.tuples(
    st.one_of(st.integers(0, 7), BYTE),  # operation
    st.one_of(st.integers(0, 12), BYTE),  # nr_segments, flag or inner operation
    st.binary(min_size=0, max_size=112),
    st.sampled_from([b"\0", b"\0\0\0\0\0\7", b"\xff"]),
)


def entry_of(abi, head):
    """Plausible at its beginning, anything further on."""
    operation, second, middle, filler = head
    body = bytes([operation, second]) + middle + filler * 112
    return body[: abi.request_size]


@given(ABI, LIMITS, st.lists(HEADS, max_size=40))
def test_no_bytes_upset_the_decoder(abi, limits, heads):
    decoder = Decoder(abi, limits)
    entries = [entry_of(abi, head) for head in heads]
    batch = whole_batch(decoder, b"".join(entries))
    assert len(batch) == len(entries)
    for entry, request in zip(entries, batch, strict=True):
        check(request, limits)
        if isinstance(request, Rejected):
            with pytest.raises(GuestError) as refusal:
                decoder.decode(entry)
            assert str(refusal.value) == request.reason
        else:
            assert attrs.astuple(decoder.decode(entry)) == attrs.astuple(request)


@given(ABI, LIMITS, st.integers(1, 600), st.binary(max_size=400), st.booleans(), SECTOR)
def test_no_indirect_page_upsets_the_decoder(abi, limits, count, junk, write, sector):
    if count > min(limits.max_indirect_segments, 4096) or (write and limits.read_only):
        return
    request = Indirect(1, int(write), sector * 512, count, (1,) * -(-count // 512))
    table = (junk + encode.pack_indirect_page([(1, 0, 7)]) * count)[: count * 8]
    decoder = Decoder(abi, limits)
    try:
        transfer = decoder.expand(request, [table[:4096], table[4096:]])
    except GuestError:
        return
    check(transfer, limits)
    assert len(transfer.segments) == count
