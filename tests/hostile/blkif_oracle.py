"""What a request means, said a second time: slowly, from the protocol's text alone.

Shares no code with the decoder.  Offsets: x86_64 has id at 8, x86_32 at 4; see blkif.h.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

OKAY, ERROR, UNSUPPORTED = 0, -1, -2
PAGE = 4096


@attrs.frozen(kw_only=True)
class Rules:
    """The disk and what was offered."""

    wide: bool
    """64-bit layout."""
    size: int
    read_only: bool
    flush: bool
    barrier: bool
    discard: bool
    max_indirect: int
    keeps_pages: bool
    """Persistent grants: every page has to be granted for writing."""
    grant: Callable[[int], str]
    """'rw', 'ro' or '' for a page's reference."""
    page: Callable[[int], bytes]


@attrs.define
class Verdict:
    id: int
    operation: int
    status: int
    kind: str = ""
    """read, write, discard, or nothing to move."""
    offset: int = 0
    pieces: list = attrs.Factory(list)
    """(gref, first byte, length), in order."""
    tables: list = attrs.Factory(list)
    """Pages of an indirect request."""
    length: int = 0


class _Entry:
    def __init__(self, data: bytes, wide: bool) -> None:
        self.data = data
        self.base = 8 if wide else 4

    def number(self, at: int, size: int) -> int:
        return int.from_bytes(self.data[at : at + size], "little")

    @property
    def id(self) -> int:
        return self.number(self.base, 8)

    @property
    def sector(self) -> int:
        return self.number(self.base + 8, 8)

    @property
    def behind_sector(self) -> int:
        return self.base + 16

    @property
    def segments_at(self) -> int:
        return self.base + 16


def judge(data: bytes, rules: Rules) -> Verdict:
    """One slot's 112 or 108 bytes."""
    entry = _Entry(data, rules.wide)
    operation = data[0]
    if operation == 6:
        return _indirect(entry, rules)
    verdict = Verdict(entry.id, operation, OKAY)
    if operation == 5:
        count = entry.number(entry.behind_sector, 8)
        if not rules.discard or data[1] & 1:
            verdict.status = UNSUPPORTED
        elif rules.read_only or (entry.sector + count) * 512 > rules.size:
            verdict.status = ERROR
        else:
            verdict.kind, verdict.offset = "discard", entry.sector * 512
            verdict.length = count * 512
        return verdict
    offered = {0: True, 1: True, 2: rules.barrier, 3: rules.flush}
    if not offered.get(operation, False):
        verdict.status = UNSUPPORTED
        return verdict
    count = data[1]
    if operation in (2, 3) and count == 0:
        return verdict
    if not 1 <= count <= 11:
        verdict.status = ERROR
        return verdict
    raw = [entry.data[entry.segments_at + 8 * i :][:8] for i in range(count)]
    return _transfer(verdict, entry.sector, raw, rules)


def _indirect(entry: _Entry, rules: Rules) -> Verdict:
    inner = entry.data[1]
    verdict = Verdict(entry.id, inner, OKAY)
    if not rules.max_indirect:
        verdict.status = UNSUPPORTED
        return verdict
    count = entry.number(2, 2)
    verdict.status = ERROR
    if inner not in (0, 1) or (inner == 1 and rules.read_only):
        return verdict
    if not 1 <= count <= min(rules.max_indirect, 4096) or entry.sector * 512 > rules.size:
        return verdict
    first_gref = entry.behind_sector + 4
    tables = [entry.number(first_gref + 4 * i, 4) for i in range((count + 511) // 512)]
    for table in tables:
        if rules.grant(table) not in (("rw",) if rules.keeps_pages else ("rw", "ro")):
            return verdict
    verdict.tables = tables
    table = b"".join(rules.page(ref) for ref in tables)
    verdict.status = OKAY
    return _transfer(verdict, entry.sector, [table[8 * i : 8 * i + 8] for i in range(count)], rules)


def _transfer(verdict: Verdict, sector: int, raw: list[bytes], rules: Rules) -> Verdict:
    writes = verdict.operation != 0
    verdict.offset = sector * 512
    for segment in raw:
        first, last = segment[4], segment[5]
        if last > 7 or first > last:
            verdict.status = ERROR
            verdict.pieces = []
            return verdict
        gref = int.from_bytes(segment[:4], "little")
        verdict.pieces.append((gref, first * 512, (last - first + 1) * 512))
    verdict.length = sum(length for _, _, length in verdict.pieces)
    if (writes and rules.read_only) or verdict.offset + verdict.length > rules.size:
        verdict.status = ERROR
        verdict.pieces = []
        return verdict
    enough = ("rw", "ro") if writes and not rules.keeps_pages else ("rw",)
    verdict.kind = "write" if writes else "read"
    if any(rules.grant(gref) not in enough for gref, _, _ in verdict.pieces):
        verdict.status = ERROR
    return verdict
