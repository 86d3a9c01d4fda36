"""Internal snapshots: taking one, going back to it, giving it up.

Source: QEMU's docs/interop/qcow2.rst, "Snapshots" and "Cluster mapping"; what is allowed, and
which snapshot a name means, as for ``qemu-img snapshot``.

A snapshot is the L1 table that the disk had, with all that hangs on it.  What is on the disk as
well is used once more, so it is counted once more, and no entry of the disk's says COPIED any
longer.  All of that takes force at once: see `switch`.
"""

from __future__ import annotations

import errno
import re
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from xbd.core.driver import ConfigError, DriverError, SnapshotInfo, Unsupported
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.bitmaps import directory_of
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import Incompatible
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.snapshot_table import (
    Snapshot,
    extra_data,
    load_snapshots,
    pack_snapshots,
    read_snapshots,
)
from xbd.drivers.qcow2.switch import Change, make_room, switch, table_clusters
from xbd.drivers.qcow2.tables import load_table

MAX_NAME_BYTES: Final = 255
"""QEMU cuts longer ones."""

_PLAIN_ID: Final = re.compile(r"\d{1,18}")
_NANOSECONDS: Final = 10**9


# -- of images that nobody has open -------------------------------------------------------------


def create_snapshot(path: Path, name: str) -> None:
    """See `ImageFormat.create_snapshot`."""
    problem = name_problem(name)
    if problem is not None:
        raise ConfigError(problem)
    with _opened(path) as image:
        create(image, name)


def apply_snapshot(path: Path, name: str) -> None:
    """See `ImageFormat.apply_snapshot`."""
    with _opened(path) as image:
        apply(image, name)


def delete_snapshot(path: Path, name: str) -> None:
    """See `ImageFormat.delete_snapshot`."""
    with _opened(path) as image:
        delete(image, name)


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    # What lies behind it does not matter: only tables are copied.
    image = open_image(path, Wishes(writable=True, with_backing=False, with_data=False))
    try:
        yield image
    finally:
        image.close()


# -- of open images ----------------------------------------------------------------------------


def list_(image: Image) -> list[SnapshotInfo]:
    """All snapshots, oldest first.  Raises `CorruptImage`."""
    with image.lock:
        return [snapshot.info(image.size) for snapshot in load_snapshots(image.host, image.header)]


def name_problem(name: str) -> str | None:
    """What is wrong with a new snapshot's name, if anything is."""
    try:
        length = len(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return f"{name!a} is no text that could be a snapshot's name"
    if not 0 < length <= MAX_NAME_BYTES or "\0" in name:
        return f"a snapshot's name has between 1 and {MAX_NAME_BYTES} bytes, and no NUL"
    return None


def possible(image: Image) -> bool:
    """Whether an image can have snapshots at all."""
    return not image.header.has_data_file and image.header.refcount_bits > 1


def create(image: Image, name: str) -> None:
    """Keep the disk as it is now.  A name may be there more than once.

    Nobody writes meanwhile, and no answer of `Image.resolve` for writing is in use; those given
    before are not valid any more.  Raises `DriverError`.
    """
    problem = name_problem(name)
    if problem is not None:
        raise DriverError(problem, errno=errno.EINVAL)
    with image.lock:
        snapshots = _snapshots(image)
        if len(snapshots) >= layout.MAX_SNAPSHOTS:
            raise DriverError(
                f"{image} has {len(snapshots)} snapshots, and can't have more: delete some first",
                errno=errno.EFBIG,
            )
        l1 = image.tables.l1
        if image.header.refcount_bits == 1 and any(l1):
            raise Unsupported(
                f"{image} has refcounts of 1 bit, with which nothing can be shared: convert it to "
                "an image with refcount-bits=16 to take snapshots"
            )
        image.flush()
        packed = pack_snapshots([*snapshots, _new_snapshot(image, snapshots, name)])
        change = Change(
            l1=l1,
            add=l1,
            free=_snapshot_table(image),
            shared=True,
            snapshots=(len(snapshots) + 1, packed),
        )
        switch(image, change)


def delete(image: Image, name: str) -> None:
    """Give up a snapshot by its name, or if there is none of that name, by its ID.

    Of several with the name it is the oldest.  Raises `ConfigError` if there is no such snapshot,
    or `DriverError`.
    """
    with image.lock:
        snapshots = _snapshots(image)
        gone = _find(image, snapshots, name, ("name", "id"))
        rest = [snapshot for snapshot in snapshots if snapshot is not gone]
        image.flush()
        change = Change(
            l1=image.tables.l1,
            drop=_load_l1(image, gone),
            free=[
                *_snapshot_table(image),
                *table_clusters(image, gone.l1_table_offset, gone.l1_size * 8),
                *_l1_table(image),
            ],
            shared=False,
            snapshots=(len(rest), pack_snapshots(rest)),
        )
        make_room(image, change)


def apply(image: Image, name: str) -> None:
    """Make the disk what it was in a snapshot, by its ID, or if there is none, by its name.

    Its size becomes what it was, too.  Nobody else uses the image meanwhile.  Raises `ConfigError`
    if there is no such snapshot, or if it can't be applied, or `DriverError`.
    """
    with image.lock:
        snapshot = _find(image, _snapshots(image), name, ("id", "name"))
        size = image.size if snapshot.disk_size is None else snapshot.disk_size
        _require_size(image, size)
        entries = max(snapshot.l1_size, -(-size // image.header.l1_coverage))
        if entries * 8 > layout.MAX_L1_BYTES:
            raise DriverError(f"{image}: the snapshot's L1 table would be larger than 32 MiB")
        l1 = _load_l1(image, snapshot)
        l1.extend([0] * (entries - len(l1)))
        image.flush()
        change = Change(
            l1=l1, add=l1, drop=image.tables.l1, free=_l1_table(image), shared=True, size=size
        )
        switch(image, change)


def _snapshots(image: Image) -> tuple[Snapshot, ...]:
    """Those of an image that may have any, and in which nothing is just being written."""
    image.require_writable()
    if image.header.has_data_file:
        raise Unsupported(
            f"{image} keeps its data in another file, in which snapshots can't share anything"
        )
    if image.header.incompatible & Incompatible.DIRTY:
        # The counts are not right, and nobody must say that they are.
        raise DriverError(
            f"the host failed while a snapshot of {image} was taken, applied or deleted: open it "
            "again to put it right",
            errno=errno.EIO,
        )
    while image.allocating:
        image.unblocked.wait()
    return load_snapshots(image.host, image.header)


def _find(image: Image, snapshots: Sequence[Snapshot], name: str, order: Sequence[str]) -> Snapshot:
    for attribute in order:
        for snapshot in snapshots:
            if getattr(snapshot, attribute) == name:
                return snapshot
    raise ConfigError(
        f"{image} has no snapshot {name!r}: xbd image snapshot list shows what it has"
    )


def _new_snapshot(image: Image, snapshots: Sequence[Snapshot], name: str) -> Snapshot:
    taken = [int(snapshot.id) for snapshot in snapshots if _PLAIN_ID.fullmatch(snapshot.id)]
    seconds, nanoseconds = divmod(time.time_ns(), _NANOSECONDS)
    return Snapshot(
        l1_table_offset=image.tables.l1_offset,
        l1_size=len(image.tables.l1),
        id=str(max(taken, default=0) + 1),
        name=name,
        date_sec=seconds,
        date_nsec=nanoseconds,
        extra_data=extra_data(vm_state_size=0, disk_size=image.size),
    )


def _require_size(image: Image, size: int) -> None:
    if size == image.size:
        return
    told = f"the snapshot is of a disk of {size} bytes, {image} has {image.size} now"
    if image.header.version < 3:
        raise ConfigError(f"{told}, and in version 2 a disk with snapshots can't change its size")
    if directory_of(image.header) is not None:
        raise ConfigError(
            f"{told}, and its dirty bitmaps would not fit any more: remove them first "
            "(qemu-img bitmap --remove)"
        )


# -- parts of the work, under the lock ---------------------------------------------------------


def _load_l1(image: Image, snapshot: Snapshot) -> array[int]:
    return load_table(image.host, snapshot.l1_table_offset, snapshot.l1_size)


def _snapshot_table(image: Image) -> range:
    """Its host clusters."""
    length = read_snapshots(image.host, image.header).length
    return table_clusters(image, image.header.snapshots_offset, length)


def _l1_table(image: Image) -> range:
    """The host clusters of the disk's own."""
    return table_clusters(image, image.tables.l1_offset, len(image.tables.l1) * 8)
