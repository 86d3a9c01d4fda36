"""Decoded batches with every request as an object."""

from __future__ import annotations

from xbd.core.blkif import whole


def whole_batch(decoder, entries):
    """`Decoder.decode_batch`, one-segment transfers as `Transfer`."""
    return [whole(request) for request in decoder.decode_batch(entries)]
