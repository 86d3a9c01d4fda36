"""``xbd image check``: whether an image's metadata agree with each other.

It finds what ``qemu-img check`` finds, and counts it in the same way.  Mending is in `repair`.

Memory: see `references`; of five bytes more for every cluster of the file, the pages in which
L2 tables are counted; and 16 bytes for every L2 table.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Final

import attrs

from xbd.core.driver import CheckReport, ConfigError, Progress
from xbd.core.driver.image import no_progress
from xbd.core.hostio.failures import shown
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.check_refcounts import Refcounts
from xbd.drivers.qcow2.check_rules import Rules
from xbd.drivers.qcow2.check_walk import Walk
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header, parse_header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from xbd.drivers.qcow2.offline import opened_file
from xbd.drivers.qcow2.sparse import used_entries
from xbd.drivers.qcow2.tables import load_table

_SNAPSHOT_FIELDS: Final = slice(60, 72)
"""nb_snapshots and snapshots_offset, in the header."""


@attrs.frozen(kw_only=True)
class Examination:
    """What is wrong with an image, by kind."""

    header: Header
    report: CheckReport
    structure: int
    """Corruptions other than wrong refcounts and flags: something may be lost."""
    refcounts: int
    """Refcounts that are too low, or have no place."""
    sound: bool
    """The refcounts can be put right where they are."""

    @property
    def clean(self) -> bool:
        report = self.report
        return not (report.corruptions or report.leaks or report.errors)


def check_image(
    path: Path, *, repair: str | None = None, progress: Progress = no_progress
) -> CheckReport:
    """Check an image that nobody has open, and with `repair` (``leaks`` or ``all``) mend it.

    `progress` counts L2 tables; mending begins again from 0.  Raises `OpenFailed`, and
    `CorruptImage` for a header that can't be understood.
    """
    if repair not in (None, "leaks", "all"):
        raise ConfigError(f"repair can be leaks or all, not {repair}")
    with opened_file(path, writable=repair is not None) as host:
        if repair is None:
            return examine(host, progress).report
        from xbd.drivers.qcow2.repair import repair_image

        return repair_image(host, everything=repair == "all", progress=progress)


def examine(host: Host, progress: Progress = no_progress) -> Examination:
    """Look at everything and change nothing."""
    header, problem = load_header(host)
    walk = Walk(host, header, mend=False)
    found = walk.found
    if problem:
        found.corrupt(problem)
    walk.run(progress)
    structure = found.corruptions
    refcounts = Refcounts(host, header, walk.references, found)
    refcounts.count()
    refcounts.compare()
    wrong_refcounts = found.corruptions - structure
    _check_copied(host, header, walk, refcounts, progress)
    progress(2 * len(walk.tables), 2 * len(walk.tables))
    return Examination(
        header=header,
        report=_report(header, walk, refcounts),
        structure=structure,
        refcounts=wrong_refcounts,
        sound=refcounts.sound and problem is None,
    )


def _report(header: Header, walk: Walk, refcounts: Refcounts) -> CheckReport:
    found = walk.found
    unsaid = [f"and {found.unsaid} more"] if found.unsaid else []
    return CheckReport(
        corruptions=found.corruptions,
        leaks=found.leaks,
        errors=found.errors,
        messages=(*found.messages, *unsaid),
        total_clusters=-(-header.size // header.cluster_size),
        allocated_clusters=walk.active.allocated,
        compressed_clusters=walk.active.compressed,
        fragmented_clusters=walk.active.fragmented,
        image_end=refcounts.end << header.cluster_bits,
    )


def load_header(host: Host) -> tuple[Header, str | None]:
    """An image's header; if only what it says of snapshots is impossible, without that, and why.

    Raises `CorruptImage`.
    """
    first = bytes(host.read(0, min(host.size(), 1 << layout.MAX_CLUSTER_BITS)))
    try:
        return parse_header(first), None
    except CorruptImage as error:
        most = layout.MAX_SNAPSHOTS.to_bytes(4, "big") + first[64:72]
        for fields in (most, bytes(12)):
            try:
                start, stop = _SNAPSHOT_FIELDS.start, _SNAPSHOT_FIELDS.stop
                return parse_header(first[:start] + fields + first[stop:]), str(error)
            except CorruptImage:
                continue
        raise CorruptImage(f"{shown(host.path)}: {error}") from error


def _check_copied(
    host: Host, header: Header, walk: Walk, refcounts: Refcounts, progress: Progress
) -> None:
    """The COPIED flags of the active L1 and L2 tables must say what the refcounts say."""
    found = walk.found
    for index, entry in used_entries(walk.l1):
        offset = entry & OFFSET_MASK
        one = refcounts.is_one(offset >> header.cluster_bits) if offset else None
        if one is not None and one != bool(entry & COPIED):
            found.corrupt(f"L1 entry {index} ({entry:#x}) has a wrong COPIED flag")
    counts = walk.references.counts if refcounts.all_right else None
    plain = not (header.extended_l2 or header.has_data_file)
    bits, step = header.cluster_bits, header.l2_entry_bytes // 8
    for number in range(walk.active_tables):
        progress(len(walk.tables) + number, 2 * len(walk.tables))
        place = walk.tables[number] << header.cluster_bits
        table = load_table(host, place, header.cluster_size // 8)
        if counts is not None and plain:
            table = _suspects(table, counts, bits)
        for entry in table[::step]:
            if _is_wrong(entry, bits, walk.rules, refcounts):
                found.corrupt(f"L2 entry {entry:#x} has a wrong COPIED flag")


def _suspects(table: array[int], counts: memoryview[int], bits: int) -> array[int]:
    """The entries that deserve a closer look.  Made for speed."""
    try:
        return array(
            "Q",
            [
                entry
                for entry in table
                if entry
                and (
                    entry & COMPRESSED
                    or (counts[(entry & OFFSET_MASK) >> bits] == 1) != entry >> 63
                )
            ],
        )
    except IndexError:  # an entry names a cluster behind the file's end
        return table


def _is_wrong(entry: int, bits: int, rules: Rules, refcounts: Refcounts) -> bool:
    if not entry or entry & COMPRESSED:
        return False
    one: bool | None = None
    if rules.external:
        one = True if rules.has_host(entry) else None
    elif entry & OFFSET_MASK:
        one = refcounts.is_one((entry & OFFSET_MASK) >> bits)
    return one is not None and one != bool(entry & COPIED)
