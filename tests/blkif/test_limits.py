"""Every limit by its name: what a hostile guest may ask for, and what it is told."""

from __future__ import annotations

import attrs
import pytest
from whole_requests import whole_batch

from xbd.core.blkif import (
    Decoder,
    Discard,
    Flush,
    Indirect,
    Rejected,
    Transfer,
    constants,
    encode,
)
from xbd.core.errors import BadRequest, Unoffered

READ, WRITE = constants.READ, constants.WRITE
BARRIER, FLUSH = constants.WRITE_BARRIER, constants.FLUSH_DISKCACHE
SIZE = 1 << 20
SECTORS = SIZE // 512
PAGE = (100, 0, 7)


@pytest.fixture
def make(abi, limits):
    """A decoder with some limits changed."""

    def make(**changes):
        return Decoder(abi, attrs.evolve(limits, **changes))

    return make


def rw(abi, operation, *, sector=0, segments=(PAGE,), count=None):
    """A request; `count`: what it claims to be the number of its segments."""
    entry = bytearray(encode.encode_rw(abi, operation, 77, sector, segments))
    if count is not None:
        entry[1] = count
    return bytes(entry)


def refused(decoder, entry, status):
    """Both ways of decoding agree that it is refused, and how; the reason."""
    with pytest.raises(BadRequest if status == constants.RSP_ERROR else Unoffered) as error:
        decoder.decode(entry)
    [rejected] = whole_batch(decoder, entry)
    assert isinstance(rejected, Rejected)
    assert (rejected.id, rejected.status) == (77, status)
    assert rejected.reason == str(error.value)
    assert rejected.operation == (entry[1] if entry[0] == constants.INDIRECT else entry[0])
    return rejected.reason


def accepted(decoder, entry):
    """Both ways of decoding agree; the request."""
    [batched] = whole_batch(decoder, entry)
    single = decoder.decode(entry)
    assert type(batched) is type(single)
    assert attrs.astuple(batched) == attrs.astuple(single)
    return single


# -- nr_segments of a direct request --------------------------------------------------------


@pytest.mark.parametrize("operation", [READ, WRITE])
def test_no_segments_in_a_read_or_write(abi, make, operation):
    refused(make(), rw(abi, operation, segments=[]), constants.RSP_ERROR)


@pytest.mark.parametrize("operation", [READ, WRITE, BARRIER, FLUSH])
@pytest.mark.parametrize("count", [12, 13, 255])
def test_more_than_eleven_segments(abi, make, operation, count):
    refused(make(), rw(abi, operation, count=count), constants.RSP_ERROR)


@pytest.mark.parametrize("operation", [READ, WRITE, BARRIER, FLUSH])
@pytest.mark.parametrize("count", range(1, 12))
def test_one_to_eleven_segments(abi, make, operation, count):
    entry = rw(abi, operation, segments=[(n, 0, 7) for n in range(count)])
    request = accepted(make(), entry)
    assert request.segments == [(n, 0, 4096) for n in range(count)]
    assert request.length == count * 4096


# -- first_sect <= last_sect <= 7 -----------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(f, n) for f in range(8) for n in range(f, 8)])
def test_segments_inside_a_page(abi, make, first, last):
    request = accepted(make(), rw(abi, READ, segments=[(9, first, last)]))
    assert request.segments == [(9, first * 512, (last - first + 1) * 512)]
    assert request.length == (last - first + 1) * 512


@pytest.mark.parametrize(
    ("first", "last"), [(0, 8), (7, 8), (8, 8), (0, 255), (255, 255), (1, 0), (7, 6), (255, 0)]
)
@pytest.mark.parametrize("position", [0, 1, 10])
def test_segments_outside_a_page_or_backwards(abi, make, first, last, position):
    segments = [PAGE] * position + [(9, first, last)]
    reason = refused(make(), rw(abi, READ, segments=segments), constants.RSP_ERROR)
    assert reason == f"segment from sector {first} to {last} of a page"


def test_segments_that_are_not_used_are_not_judged(abi, make):
    entry = rw(abi, READ, segments=[PAGE, (9, 255, 0)], count=1)
    assert accepted(make(), entry).segments == [(100, 0, 4096)]


# -- range ----------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [READ, WRITE])
@pytest.mark.parametrize("pages", [1, 2, 11])
def test_the_last_sector_and_one_past_it(abi, make, operation, pages):
    segments = [PAGE] * pages
    last = SECTORS - 8 * pages
    assert accepted(make(), rw(abi, operation, sector=last, segments=segments))
    past = rw(abi, operation, sector=last + 1, segments=segments)
    refused(make(), past, constants.RSP_ERROR)


@pytest.mark.parametrize("sector", [2**64 - 1, 2**64 - 8, 2**63, 2**55, 2**55 - 1])
@pytest.mark.parametrize("operation", [READ, WRITE])
def test_sector_numbers_that_overflow_64_bits_as_bytes_or_sums(abi, make, operation, sector):
    refused(make(), rw(abi, operation, sector=sector), constants.RSP_ERROR)


def test_a_disk_without_sectors(abi, make):
    refused(make(size=0), rw(abi, READ), constants.RSP_ERROR)


def test_limits_can_be_replaced(abi, make, limits):
    decoder = make()
    entry = rw(abi, READ, sector=SECTORS)
    refused(decoder, entry, constants.RSP_ERROR)
    decoder.limits = attrs.evolve(limits, size=2 * SIZE)
    assert accepted(decoder, entry).offset == SIZE


# -- alignment ------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [READ, WRITE, BARRIER, FLUSH])
def test_alignment_to_the_logical_block(abi, make, operation):
    decoder = make(logical_block=4096)
    assert accepted(decoder, rw(abi, operation, sector=8))
    refused(decoder, rw(abi, operation, sector=4), constants.RSP_ERROR)
    refused(decoder, rw(abi, operation, segments=[(1, 0, 3)]), constants.RSP_ERROR)
    # It is the request's length that counts: segments need not be whole blocks each.
    halves = accepted(decoder, rw(abi, operation, segments=[(1, 4, 7), (2, 0, 3)]))
    assert halves.length == 4096


# -- permission and features ----------------------------------------------------------------


@pytest.mark.parametrize("operation", [WRITE, BARRIER, FLUSH])
@pytest.mark.parametrize("pages", [1, 3])
def test_no_data_is_written_to_a_read_only_disk(abi, make, operation, pages):
    entry = rw(abi, operation, segments=[PAGE] * pages)
    assert refused(make(read_only=True), entry, constants.RSP_ERROR) == "write to a read-only disk"


@pytest.mark.parametrize("operation", [BARRIER, FLUSH])
def test_an_empty_flush_of_a_read_only_disk(abi, make, operation):
    assert isinstance(accepted(make(read_only=True), rw(abi, operation, segments=[])), Flush)


def test_reading_a_read_only_disk(abi, make):
    assert not accepted(make(read_only=True), rw(abi, READ)).write


@pytest.mark.parametrize("sector", [0, 2**64 - 1])
@pytest.mark.parametrize("operation", [BARRIER, FLUSH])
def test_a_flush_without_segments(abi, make, operation, sector):
    """Its sector number means nothing; frontends leave in it what was there."""
    request = accepted(make(), rw(abi, operation, segments=[], sector=sector))
    assert attrs.astuple(request) == (77, operation)


@pytest.mark.parametrize("segments", [[], [PAGE], [PAGE, PAGE]])
@pytest.mark.parametrize(("operation", "name"), [(BARRIER, "barrier"), (FLUSH, "flush")])
def test_flush_and_barrier_only_where_offered(abi, make, operation, name, segments):
    entry = rw(abi, operation, segments=segments)
    refused(make(**{name: False}), entry, constants.RSP_EOPNOTSUPP)
    accepted(make(**{name: True}), entry)


def test_what_kind_of_transfer_it_is(abi, make):
    kinds = {
        operation: (request.write, request.barrier, request.flush)
        for operation in (READ, WRITE, BARRIER, FLUSH)
        for request in [accepted(make(), rw(abi, operation))]
    }
    assert kinds == {
        READ: (False, False, False),
        WRITE: (True, False, False),
        BARRIER: (True, True, False),
        FLUSH: (True, False, True),
    }


@pytest.mark.parametrize("operation", [4, *range(7, 256)])
def test_unknown_operations(abi, make, operation):
    refused(make(), rw(abi, operation), constants.RSP_EOPNOTSUPP)


# -- discard --------------------------------------------------------------------------------


def discard(abi, sector, count, *, secure=False):
    return encode.encode_discard(abi, 77, sector, count, secure=secure)


def test_discard(abi, make):
    request = accepted(make(), discard(abi, 8, SECTORS - 8))
    assert attrs.astuple(request) == (77, constants.DISCARD, 4096, SIZE - 4096, False)


def test_discard_only_where_offered(abi, make):
    refused(make(discard=False), discard(abi, 0, 8), constants.RSP_EOPNOTSUPP)


def test_discard_needs_write_permission(abi, make):
    """CVE-2013-2140."""
    refused(make(read_only=True), discard(abi, 0, 8), constants.RSP_ERROR)


def test_secure_discard_only_where_offered(abi, make):
    entry = discard(abi, 0, 8, secure=True)
    assert accepted(make(), entry).secure
    refused(make(discard_secure=False), entry, constants.RSP_EOPNOTSUPP)


def test_other_bits_of_a_discards_flag_mean_nothing(abi, make):
    entry = bytearray(discard(abi, 0, 8))
    entry[1] = 0xFE
    assert not accepted(make(discard_secure=False), bytes(entry)).secure


@pytest.mark.parametrize(
    ("sector", "count"),
    [(0, SECTORS + 1), (SECTORS, 1), (1, 2**64 - 1), (2**64 - 1, 1), (2**63, 2**63), (2**55, 8)],
)
def test_discards_past_the_end(abi, make, sector, count):
    refused(make(), discard(abi, sector, count), constants.RSP_ERROR)


def test_a_discard_of_no_sectors_does_nothing(abi, make):
    assert accepted(make(), discard(abi, 8, 0)).length == 0
    assert accepted(make(), discard(abi, SECTORS, 0)).length == 0
    refused(make(), discard(abi, SECTORS + 1, 0), constants.RSP_ERROR)


def test_a_discards_alignment_to_the_logical_block(abi, make):
    decoder = make(logical_block=4096)
    assert accepted(decoder, discard(abi, 8, 16))
    refused(decoder, discard(abi, 4, 8), constants.RSP_ERROR)
    refused(decoder, discard(abi, 8, 4), constants.RSP_ERROR)


# -- indirect -------------------------------------------------------------------------------


def indirect(abi, count, *, operation=READ, sector=0, refs=range(1, 9)):
    return encode.encode_indirect(abi, operation, 77, sector, count, list(refs))


@pytest.mark.parametrize("count", [1, 11, 12, 1024])
def test_one_to_the_offered_number_of_indirect_segments(abi, make, count):
    request = accepted(make(), indirect(abi, count))
    assert isinstance(request, Indirect)
    assert request.nr_segments == count


@pytest.mark.parametrize("count", [0, 1025, 4097, 65535])
def test_no_or_too_many_indirect_segments(abi, make, count):
    refused(make(), indirect(abi, count), constants.RSP_ERROR)


def test_never_more_indirect_segments_than_eight_pages_hold(abi, make):
    decoder = make(max_indirect_segments=65535)
    assert len(accepted(decoder, indirect(abi, 4096)).refs) == 8
    refused(decoder, indirect(abi, 4097), constants.RSP_ERROR)


@pytest.mark.parametrize(
    ("count", "pages"), [(1, 1), (512, 1), (513, 2), (1024, 2), (1025, 3), (4096, 8)]
)
def test_no_more_indirect_pages_than_the_segments_need(abi, make, count, pages):
    request = accepted(make(max_indirect_segments=4096), indirect(abi, count))
    assert request.refs == tuple(range(1, pages + 1))


def test_indirect_only_where_offered(abi, make):
    refused(make(max_indirect_segments=0), indirect(abi, 12), constants.RSP_EOPNOTSUPP)


@pytest.mark.parametrize("operation", [2, 3, 4, 5, 6, 7, 255])
def test_indirect_requests_only_read_or_write(abi, make, operation):
    refused(make(), indirect(abi, 12, operation=operation), constants.RSP_ERROR)


def test_an_indirect_write_to_a_read_only_disk_fetches_no_page(abi, make):
    decoder = make(read_only=True)
    refused(decoder, indirect(abi, 12, operation=WRITE), constants.RSP_ERROR)
    assert accepted(decoder, indirect(abi, 12))


@pytest.mark.parametrize("sector", [SECTORS + 1, 2**55, 2**64 - 1])
def test_an_indirect_request_past_the_end_fetches_no_page(abi, make, sector):
    refused(make(), indirect(abi, 12, sector=sector), constants.RSP_ERROR)


def test_an_indirect_request_is_answered_with_its_inner_operation(abi, make):
    request = accepted(make(), indirect(abi, 1, operation=WRITE))
    assert request.operation == WRITE
    transfer = make().expand(request, [encode.pack_indirect_page([PAGE])])
    assert (transfer.id, transfer.operation, transfer.write) == (77, WRITE, True)


def expand(decoder, abi, segments, **kwargs):
    request = accepted(decoder, indirect(abi, len(segments), **kwargs))
    table = encode.pack_indirect_page(segments)
    pages = [table[at : at + 4096].ljust(4096, b"\xff") for at in range(0, len(table), 4096)]
    return decoder.expand(request, pages)


@pytest.mark.parametrize("count", [1, 12, 200])
def test_expanding(abi, make, count):
    segments = [(n, n % 8, 7) for n in range(count)]
    transfer = expand(make(), abi, segments, sector=16)
    assert isinstance(transfer, Transfer)
    assert transfer.offset == 8192
    assert transfer.segments == [(n, n % 8 * 512, (8 - n % 8) * 512) for n in range(count)]
    assert transfer.length == sum(length for _, _, length in transfer.segments)


def test_expanding_over_two_pages(abi, make):
    transfer = expand(make(size=1 << 30), abi, [(n, 0, 0) for n in range(513)])
    assert [ref for ref, _, _ in transfer.segments] == list(range(513))
    assert transfer.length == 513 * 512


@pytest.mark.parametrize(("first", "last"), [(0, 8), (5, 4), (255, 255)])
def test_bad_segments_in_an_indirect_page(abi, make, first, last):
    with pytest.raises(BadRequest, match="of a page"):
        expand(make(), abi, [PAGE] * 20 + [(1, first, last)])


def test_an_indirect_request_that_runs_past_the_end(abi, make):
    assert expand(make(), abi, [PAGE] * 20, sector=SECTORS - 160)
    with pytest.raises(BadRequest, match="of a disk of"):
        expand(make(), abi, [PAGE] * 20, sector=SECTORS - 159)


def test_an_indirect_request_that_is_misaligned(abi, make):
    decoder = make(logical_block=4096)
    with pytest.raises(BadRequest, match="multiple of 4096"):
        expand(decoder, abi, [PAGE] * 20 + [(1, 0, 0)])
    refused(decoder, indirect(abi, 12, sector=1), constants.RSP_ERROR)


# -- batches --------------------------------------------------------------------------------


def test_a_bad_request_leaves_its_neighbours_alone(abi, make):
    batch = b"".join(
        [
            rw(abi, READ, sector=8),
            rw(abi, 200),
            rw(abi, WRITE, segments=[(1, 0, 3), (2, 4, 7)]),
            rw(abi, READ, segments=[]),
            discard(abi, 0, 8),
            indirect(abi, 12),
            rw(abi, FLUSH, segments=[]),
        ]
    )
    kinds = [Transfer, Rejected, Transfer, Rejected, Discard, Indirect, Flush]
    decoded = whole_batch(make(), batch)
    assert [type(request) for request in decoded] == kinds
    assert decoded[0].offset == 4096
    assert decoded[2].segments == [(1, 0, 2048), (2, 2048, 2048)]


def test_an_empty_batch(make):
    assert whole_batch(make(), b"") == []
