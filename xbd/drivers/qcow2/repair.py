"""Mending an image: refcounts, flags, entries that name nothing usable, the snapshot table.

Source: QEMU's docs/interop/qcow2.rst.

Order of writes: first the refcounts become those that the usable entries need, durably; then
entries and flags are put right, durably; the image is examined once more, and only if nothing is
left of what was wrong, it stops being marked as dirty or corrupt.  Each number and each entry is
written whole, so that an image whose mending is interrupted is no worse than before.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Final

import attrs

from xbd.core.driver import CheckReport, Progress
from xbd.core.driver.image import no_progress
from xbd.core.hostio.failures import shown
from xbd.drivers.qcow2.check import Examination, examine, load_header
from xbd.drivers.qcow2.check_l2 import pairs
from xbd.drivers.qcow2.check_refcounts import Refcounts
from xbd.drivers.qcow2.check_rules import Findings
from xbd.drivers.qcow2.check_walk import Walk
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, Incompatible
from xbd.drivers.qcow2.rebuild import Rebuild
from xbd.drivers.qcow2.snapshot_table import LEAST_EXTRA_BYTES, Snapshot, extra_data, pack_snapshots
from xbd.drivers.qcow2.sparse import used_entries
from xbd.drivers.qcow2.tables import load_table

_INCOMPATIBLE_AT: Final = 72


def repair_image(host: Host, *, everything: bool, progress: Progress = no_progress) -> CheckReport:
    """Mend an image open for writing; `everything` False: only if nothing but space is lost.

    Raises `DriverError` for what the host refuses.
    """
    before = examine(host, progress)
    harmless = not (before.structure or before.refcounts)
    if before.report.errors or not (everything or harmless):
        return _refused(before, everything=everything)
    if not before.clean:
        try:
            _mend(host, before, progress)
        except CorruptImage as error:
            return attrs.evolve(
                before.report, messages=(*before.report.messages, f"nothing is mended: {error}")
            )
    after = before if before.clean else examine(host, progress)
    if not (after.report.corruptions or after.report.errors):
        _clear_marks(host, after.header)
    return attrs.evolve(
        after.report,
        corruptions_fixed=max(0, before.report.corruptions - after.report.corruptions),
        leaks_fixed=max(0, before.report.leaks - after.report.leaks),
        messages=(*before.report.messages, *(f"left: {text}" for text in after.report.messages)),
    )


def _refused(before: Examination, *, everything: bool) -> CheckReport:
    text = (
        "nothing is mended: not everything can be read"
        if everything or before.report.errors
        else "nothing is mended: what is only lost space can't be told while the image is corrupt"
    )
    return attrs.evolve(before.report, messages=(*before.report.messages, text))


def repair_dirty(host: Host) -> None:
    """Put the refcounts of an image right that was not closed properly, and unmark it.

    Nothing is given up for that: where more than refcounts and flags is wrong, `CorruptImage` is
    raised and nothing changed.
    """
    before = examine(host)
    advice = f"mend it with: xbd image check --repair all qcow2:{shown(host.path)}"
    if before.structure or before.report.errors:
        raise CorruptImage(
            f"it was not closed properly and is corrupt ({before.report.messages[0]}): {advice}"
        )
    if not before.clean:
        _mend(host, before, no_progress)
        after = examine(host)
        if after.report.corruptions or after.report.errors:
            raise CorruptImage(f"its refcounts can't be put right: {advice}")
    _clear_marks(host, before.header)


def _clear_marks(host: Host, header: Header) -> None:
    marks = Incompatible.DIRTY | Incompatible.CORRUPT
    if header.incompatible & marks:
        features = header.incompatible & ~marks
        host.write(_INCOMPATIBLE_AT, features.to_bytes(8, "big"))
        host.flush()


def _mend(host: Host, before: Examination, progress: Progress) -> None:
    header, _ = load_header(host)
    walk = _walk_again(host, header, progress)
    in_place = before.sound and not (walk.snapshots_changed or walk.bitmaps_broken)
    if in_place:
        refcounts = Refcounts(host, header, walk.references, Findings())
        refcounts.count()
        refcounts.compare()
        if refcounts.sound:
            _correct(host, header, walk, refcounts, give_back=not before.structure)
        else:
            # They were counted in between and can't be told apart any more.
            walk = _walk_again(host, header, progress)
            in_place = False
    if not in_place:
        _rebuild(host, header, walk)
    _mend_entries(host, header, walk, before)
    host.flush()


def _walk_again(host: Host, header: Header, progress: Progress) -> Walk:
    walk = Walk(host, header, mend=True)
    walk.run(progress)
    rulings = walk.judge()
    if rulings.marks or rulings.no_bitmaps:
        walk = Walk(host, header, mend=True, rulings=rulings)
        walk.run(progress)
    if walk.found.errors or walk.lost:
        raise CorruptImage("not everything can be read")
    return walk


# -- refcounts --------------------------------------------------------------------------------


def _correct(
    host: Host, header: Header, walk: Walk, refcounts: Refcounts, *, give_back: bool
) -> None:
    """Write the counts that are wrong, and give the space of unused clusters back."""
    emptied: list[tuple[int, int]] = []
    # Behind the file's end nothing is used, whatever was said there.
    last = range(walk.references.end // refcounts.entries, len(refcounts.blocks))
    for index in sorted({*refcounts.differing, *last}):
        if refcounts.blocks[index] <= 0:
            continue
        block = refcounts.load(index)
        first = index * refcounts.entries
        for place, count in enumerate(walk.references.refcounts(first, refcounts.entries)):
            if block.counts[place] == count:
                continue
            if not count and first + place < walk.references.clusters:
                _add_cluster(emptied, first + place)
            block.set(place, count)
        change = block.take_dirty()
        if change is not None:
            at, data = change
            host.write(refcounts.blocks[index] + at, data)
    host.flush()
    if give_back:
        for first, count in emptied:
            host.punch(first << header.cluster_bits, count << header.cluster_bits)


def _add_cluster(runs: list[tuple[int, int]], cluster: int) -> None:
    if runs and sum(runs[-1]) == cluster:
        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
    else:
        runs.append((cluster, 1))


def _rebuild(host: Host, header: Header, walk: Walk) -> None:
    snapshots = None
    if walk.snapshots_changed:
        whole = [_whole(snapshot, header) for snapshot in walk.snapshots]
        snapshots = len(whole), pack_snapshots(whole)
    Rebuild(
        host,
        header,
        walk.references,
        in_force=_in_force(host, header, walk),
        snapshots=snapshots,
        drop_bitmaps=walk.bitmaps_broken,
    ).run()


def _whole(snapshot: Snapshot, header: Header) -> Snapshot:
    """With all that version 3 demands; QEMU ends a name at its first zero byte."""
    extra = snapshot.extra_data
    if header.version >= 3 and len(extra) < LEAST_EXTRA_BYTES:
        extra = extra_data(vm_state_size=snapshot.vm_state_size, disk_size=header.size)
    return attrs.evolve(
        snapshot,
        extra_data=extra,
        id=snapshot.id.partition("\0")[0],
        name=snapshot.name.partition("\0")[0],
    )


def _in_force(host: Host, header: Header, walk: Walk) -> Iterator[tuple[int, int]]:
    """What an interrupted rebuilding would leave in use, besides what is counted."""
    if walk.snapshot_table_bytes:
        yield header.snapshots_offset, walk.snapshot_table_bytes
    offset = header.refcount_table_offset
    length = header.refcount_table_clusters * header.cluster_size
    if not walk.references.fits(offset, length):
        return
    yield offset, length
    for entry in load_table(host, offset, length // 8):
        if entry:
            yield entry, header.cluster_size


# -- entries ----------------------------------------------------------------------------------


def _mend_entries(host: Host, header: Header, walk: Walk, before: Examination) -> None:
    l1 = array("Q", walk.l1)
    for index, entry in used_entries(walk.l1):
        l1[index] = _with_copied(walk.rules.mended_l1(entry), header, walk)
    _write_changes(host, header.l1_table_offset, walk.l1, l1)
    tables = len(walk.tables) if before.structure else walk.active_tables
    for number in range(tables):
        offset = walk.tables[number] << header.cluster_bits
        old = load_table(host, offset, header.cluster_size // 8)
        _write_changes(host, offset, old, _mended_l2(old, number, header, walk))
    if not before.structure:
        return
    for snapshot in walk.snapshots:
        old = load_table(host, snapshot.l1_table_offset, snapshot.l1_size)
        new = array("Q", old)
        for index, entry in used_entries(old):
            new[index] = walk.rules.mended_l1(entry)
        _write_changes(host, snapshot.l1_table_offset, old, new)


def _mended_l2(old: array[int], number: int, header: Header, walk: Walk) -> array[int]:
    new = array("Q", old)
    rules = walk.rules
    guest = walk.guest_offset(number)
    active = number < walk.active_tables
    plain = not (rules.extended or rules.external)
    step = header.l2_entry_bytes // 8
    for index, (entry, bitmap) in enumerate(pairs(old, header)):
        if not entry and not bitmap:
            continue
        mended, mended_bitmap = entry, bitmap
        if not (plain and rules.is_usual(entry)):
            at = None if guest is None else guest + (index << header.cluster_bits)
            mended, mended_bitmap = rules.mended_l2(entry, bitmap, at)
        if active and rules.external:
            mended |= COPIED if rules.has_host(mended) else 0
        elif active:
            mended = _with_copied(mended, header, walk)
        new[index * step] = mended
        if rules.extended:
            new[index * step + 1] = mended_bitmap
    return new


def _with_copied(entry: int, header: Header, walk: Walk) -> int:
    """An L1 or L2 entry of the active tables with the flag that it should have."""
    if entry & COMPRESSED:
        return entry
    offset = entry & OFFSET_MASK
    if not offset:
        return entry
    if walk.references.counts[offset >> header.cluster_bits] == 1:
        return entry | COPIED
    return entry & ~COPIED


def _write_changes(host: Host, offset: int, old: array[int], new: array[int]) -> None:
    """Write what lies between the first and the last word that differ."""
    if old == new:
        return
    differing = [place for place in range(len(old)) if old[place] != new[place]]
    start, stop = differing[0], differing[-1] + 1
    part = new[start:stop]
    if sys.byteorder == "little":
        part.byteswap()
    host.write(offset + start * 8, part.tobytes())
