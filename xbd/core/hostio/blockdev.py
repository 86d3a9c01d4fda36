"""Host block devices: exclusive opening, sizes, limits, discard and zeroes (Linux).

Numbers: include/uapi/linux/fs.h, as on every architecture that Xen runs on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs

from xbd.core.errors import OpenFailed
from xbd.core.hostio.failures import describe, shown
from xbd.core.hostio.files import open_file
from xbd.core.hostio.zero import punch_hole

_BLKROGET: Final = 0x125E
_BLKSSZGET: Final = 0x1268
_BLKGETSIZE64: Final = 0x80001272 | struct.calcsize("N") << 16
_BLKDISCARD: Final = 0x1277
_BLKPBSZGET: Final = 0x127B
_BLKZEROOUT: Final = 0x127F

_PUNCH_HOLE: Final = 0
"""Not an ioctl: fallocate does it."""

_SYS_BLOCK: Final = Path("/sys/dev/block")
_REFUSED: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY})


@attrs.frozen(kw_only=True)
class BlockLimits:
    """What the kernel says about a block device, in bytes; 0: it can't, or does not say."""

    size: int
    logical_block: int
    physical_block: int
    read_only: bool
    discard_granularity: int
    discard_alignment: int
    discard_max: int


def _number(fd: int, request: int, layout: str = "I") -> int:
    answer = fcntl.ioctl(fd, request, bytes(struct.calcsize(layout)))
    number: int = struct.unpack(layout, answer)[0]
    return number


def size_of_device(fd: int) -> int:
    """Bytes, now."""
    return _number(fd, _BLKGETSIZE64, "Q")


def read_limits(fd: int) -> BlockLimits:
    """Ask an open block device and its queue in sysfs."""
    sysfs = _SYS_BLOCK / _device_number(os.fstat(fd).st_rdev)
    queue = sysfs / "queue"
    if not queue.exists():  # a partition: the queue is its disk's
        queue = sysfs.resolve().parent / "queue"
    discard_max = _attribute(queue / "discard_max_bytes")
    return BlockLimits(
        size=size_of_device(fd),
        logical_block=_number(fd, _BLKSSZGET),
        physical_block=_number(fd, _BLKPBSZGET),
        read_only=bool(_number(fd, _BLKROGET)),
        discard_granularity=_attribute(queue / "discard_granularity") if discard_max else 0,
        discard_alignment=_attribute(sysfs / "discard_alignment") if discard_max else 0,
        discard_max=discard_max,
    )


def _attribute(path: Path) -> int:
    try:
        return max(0, int(path.read_text()))
    except (OSError, ValueError):
        return 0


def _device_number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def open_exclusive(path: Path, *, writable: bool, flags: int = 0) -> int:
    """Open a block device that nothing else claims: no mount, no swap, no volume, no guest.

    Raises `OpenFailed` with EBUSY saying who has it, and OSError otherwise.
    """
    try:
        return open_file(path, writable=writable, flags=flags | os.O_EXCL)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
    raise OpenFailed(
        f"{shown(path)} is in use{_users(path)}: {describe(errno.EBUSY)}; free it there first, or "
        "set locking=no if both sides may share it",
        errno=errno.EBUSY,
    )


def _users(path: Path) -> str:
    """Who uses a device or one of its partitions, as far as it can be told."""
    try:
        sysfs = _SYS_BLOCK / _device_number(path.stat().st_rdev)
        places = [sysfs, *(entry.parent for entry in sysfs.glob("*/partition"))]
        numbers = {(place / "dev").read_text().strip() for place in places}
        mounts = [
            line.split()[4]
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if line.split()[2] in numbers
        ]
        holders = [holder.name for place in places for holder in place.glob("holders/*")]
    except OSError:
        return ""
    told = [f"mounted on {mount}" for mount in mounts] + [f"part of {name}" for name in holders]
    return f" ({', '.join(told)})" if told else ""


class DeviceSpace:
    """Discards and zeroes ranges of one block device.  Blocking; run it in a thread.

    Which means work is found out by use and remembered for as long as the device is open.
    """

    def __init__(self, fd: int, block: int, write_zeroes: Callable[[int, int], None]) -> None:
        """`fd` is open for writing, `block` the device's logical block in bytes;
        `write_zeroes(offset, length)` writes them: the last resort."""
        self._fd = fd
        self._block = block
        self._write_zeroes = write_zeroes
        self._refused: set[int] = set()

    def discard(self, offset: int, length: int) -> bool:
        """Drop the content of the whole blocks in the range; False: the device cannot."""
        start, end = self._whole_blocks(offset, length)
        return start >= end or self._try(_BLKDISCARD, start, end - start)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make the range read as zeroes; `may_unmap`: rather free its space."""
        start, end = self._whole_blocks(offset, length)
        if start >= end:
            self._write_zeroes(offset, length)
            return
        if offset < start:
            self._write_zeroes(offset, start - offset)
        means = (_PUNCH_HOLE, _BLKZEROOUT) if may_unmap else (_BLKZEROOUT,)
        if not any(self._try(request, start, end - start) for request in means):
            self._write_zeroes(start, end - start)
        if end < offset + length:
            self._write_zeroes(end, offset + length - end)

    def _whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        block = self._block
        return -(-offset // block) * block, (offset + length) // block * block

    def _try(self, request: int, offset: int, length: int) -> bool:
        if request in self._refused:
            return False
        try:
            if request == _PUNCH_HOLE:
                punch_hole(self._fd, offset, length)
            else:
                fcntl.ioctl(self._fd, request, struct.pack("QQ", offset, length))
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self._refused.add(request)
            return False
        return True
