"""The layouts, against compilers' numbers and against ctypes, which counts for itself."""

from __future__ import annotations

import ctypes

import pytest

from xbd.core.blkif import ABIS, ARM, NATIVE, X86_32, X86_64, encode, entries, pick_abi
from xbd.core.errors import BadNegotiation

U8, U16, U32, U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


def _layout(name, fields, pack):
    """A C structure; `pack` 4 aligns 64-bit numbers as i386 does."""
    body = {"_fields_": fields}
    if pack:
        body["_pack_"] = pack
    return type(name, (ctypes.LittleEndianStructure,), body)


def c_structures(abi):
    pack = 4 if abi is X86_32 else None
    segment = _layout("Segment", [("gref", U32), ("first", U8), ("last", U8)], pack)
    rw = [("operation", U8), ("nr_segments", U8), ("handle", U16), ("id", U64), ("sector", U64)]
    discard = [("operation", U8), ("flag", U8), ("handle", U16), ("id", U64), ("sector", U64)]
    indirect = [("operation", U8), ("indirect_op", U8), ("nr_segments", U16)]
    indirect += [("id", U64), ("sector", U64), ("handle", U16), ("grefs", U32 * 8)]
    return {
        "rw": _layout("Rw", [*rw, ("segments", segment * 11)], pack),
        "discard": _layout("Discard", [*discard, ("nr_sectors", U64)], pack),
        "indirect": _layout("Indirect", indirect, pack),
        "response": _layout("Response", [("id", U64), ("operation", U8), ("status", U16)], pack),
    }


# Field offsets of blkif.h as compilers give them: for x86_64 and for x86_32.
OFFSETS = {
    ("rw", "operation"): (0, 0),
    ("rw", "nr_segments"): (1, 1),
    ("rw", "handle"): (2, 2),
    ("rw", "id"): (8, 4),
    ("rw", "sector"): (16, 12),
    ("rw", "segments"): (24, 20),
    ("discard", "flag"): (1, 1),
    ("discard", "id"): (8, 4),
    ("discard", "sector"): (16, 12),
    ("discard", "nr_sectors"): (24, 20),
    ("indirect", "indirect_op"): (1, 1),
    ("indirect", "nr_segments"): (2, 2),
    ("indirect", "id"): (8, 4),
    ("indirect", "sector"): (16, 12),
    ("indirect", "handle"): (24, 20),
    ("indirect", "grefs"): (28, 24),
    ("response", "id"): (0, 0),
    ("response", "operation"): (8, 8),
    ("response", "status"): (10, 10),
}


@pytest.mark.parametrize(("structure", "field"), OFFSETS)
def test_the_model_has_the_known_offsets(abi, structure, field):
    offset = getattr(c_structures(abi)[structure], field).offset
    assert offset == OFFSETS[structure, field][abi is X86_32]


def test_sizes(abi):
    small = abi is X86_32
    model = c_structures(abi)
    assert abi.request_size == abi.entry_size == ctypes.sizeof(model["rw"]) == 112 - 4 * small
    assert abi.response_size == ctypes.sizeof(model["response"]) == 16 - 4 * small
    assert ctypes.sizeof(model["discard"]) == 32 - 4 * small
    assert (abi.id_offset, abi.sector_offset, abi.segments_offset) == (
        (4, 12, 20) if small else (8, 16, 24)
    )
    for layout in (abi.head, abi.discard, abi.indirect):
        assert layout.size == abi.request_size


def test_rw_is_encoded_as_a_compiler_lays_it_out(abi):
    segments = [(0xA0000000 + n, n % 3, 7 - n % 3) for n in range(11)]
    entry = encode.encode_rw(abi, 1, 0x1122334455667788, 0x99AABBCCDDEEFF00, segments, 0xCA00)
    c = c_structures(abi)["rw"].from_buffer_copy(entry)
    assert (c.operation, c.nr_segments, c.handle) == (1, 11, 0xCA00)
    assert (c.id, c.sector) == (0x1122334455667788, 0x99AABBCCDDEEFF00)
    assert [(s.gref, s.first, s.last) for s in c.segments] == segments


def test_discard_is_encoded_as_a_compiler_lays_it_out(abi):
    entry = encode.encode_discard(abi, 2**63, 5, 2**40, secure=True, handle=7)
    c = c_structures(abi)["discard"].from_buffer_copy(entry)
    assert (c.operation, c.flag, c.handle) == (5, 1, 7)
    assert (c.id, c.sector, c.nr_sectors) == (2**63, 5, 2**40)


def test_indirect_is_encoded_as_a_compiler_lays_it_out(abi):
    entry = encode.encode_indirect(abi, 1, 2**64 - 1, 8, 600, [11, 12], 51712)
    c = c_structures(abi)["indirect"].from_buffer_copy(entry)
    assert (c.operation, c.indirect_op, c.nr_segments, c.handle) == (6, 1, 600, 51712)
    assert (c.id, c.sector) == (2**64 - 1, 8)
    assert list(c.grefs) == [11, 12, 0, 0, 0, 0, 0, 0]


def test_a_response_has_no_uninitialised_bytes(abi):
    """XSA-216: the padding of a response must not carry anything of ours."""
    packed = bytearray(b"\xff" * abi.response_size)
    abi.response.pack_into(packed, 0, 2**64 - 1, 3, -2)
    expected = c_structures(abi)["response"](2**64 - 1, 3, 0xFFFE)
    assert bytes(packed) == bytes(expected)


def test_more_than_eleven_segments_cannot_be_encoded(abi):
    with pytest.raises(ValueError, match="segments"):
        encode.encode_rw(abi, 0, 1, 0, [(1, 0, 7)] * 12)


def test_more_than_eight_indirect_pages_cannot_be_encoded(abi):
    with pytest.raises(ValueError, match="pages"):
        encode.encode_indirect(abi, 0, 1, 0, 4096, list(range(9)))


@pytest.mark.parametrize("order", range(6))
def test_entries_are_the_power_of_two_that_fits(abi, order):
    """As ring.h rounds down: both entry sizes give the same number."""
    room = (4096 << order) - 64
    fitting = room // abi.entry_size
    assert entries(order) == 1 << (fitting.bit_length() - 1)


def test_pick_abi_by_name():
    assert pick_abi("x86_64-abi", machine="x86_64") is X86_64
    assert pick_abi("x86_32-abi", machine="x86_64") is X86_32
    assert pick_abi("arm-abi", machine="aarch64") is ARM
    assert {abi.protocol for abi in ABIS.values()} == set(ABIS)


@pytest.mark.parametrize("machine", ["x86_64", "amd64", "i686", "AMD64"])
def test_a_silent_frontend_on_x86_is_32_bit(machine):
    assert pick_abi(None, machine=machine) is X86_32


def test_a_silent_frontend_elsewhere_is_native():
    assert pick_abi(None, machine="aarch64") is NATIVE


@pytest.mark.parametrize("protocol", ["", "x86_64", "sparc-abi", "x" * 4000, "\x1b[2J"])
def test_an_unknown_protocol_is_refused_in_one_short_line(protocol):
    with pytest.raises(BadNegotiation) as refusal:
        pick_abi(protocol, machine="x86_64")
    text = str(refusal.value)
    assert len(text) < 120
    assert text.isprintable()
