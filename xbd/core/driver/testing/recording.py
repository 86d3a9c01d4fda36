"""A record of every write and flush, and the disks that a power cut could have left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

import attrs

from xbd.core.driver.api import BlockDevice, Extent, HostExtent
from xbd.core.driver.testing.wrapper import Wrapper

SECTOR: Final = 512
"""What a power cut does not tear apart."""


@attrs.frozen
class Write:
    """Bytes that replaced others."""

    offset: int
    data: bytes = attrs.field(repr=lambda data: f"<{len(data)} bytes>")


@attrs.frozen
class Flush:
    """All before it is durable."""


class WriteLog:
    """What was done to a disk or a file, in order; fill it from wherever writes pass by."""

    def __init__(self) -> None:
        self.entries: list[Write | Flush] = []

    def write(self, offset: int, *data: bytes | memoryview) -> None:
        """Note a write; the data is copied."""
        self.entries.append(Write(offset, b"".join(data)))

    def flush(self) -> None:
        """Note a flush that has returned."""
        self.entries.append(Flush())

    def replay(self, base: bytes, until: int | None = None) -> bytes:
        """`base` after the first `until` entries (None: all)."""
        image = bytearray(base)
        for entry in self.entries[:until]:
            _apply(image, entry)
        return bytes(image)

    def crash_states(
        self, base: bytes, *, count: int, seed: int = 0
    ) -> Iterator[tuple[int, bytes]]:
        """`count` disks that a power cut may have left, each with the entry it happened at.

        What was flushed is there; of what was written since, any sectors of any writes, in any
        order.
        """
        chance = random.Random(seed)
        for _ in range(count):
            at = chance.randint(0, len(self.entries))
            durable = max(
                (i for i, e in enumerate(self.entries[:at]) if isinstance(e, Flush)), default=0
            )
            image = bytearray(self.replay(base, durable))
            loose = [sector for entry in self.entries[durable:at] for sector in _sectors(entry)]
            if chance.random() < 0.75:
                loose = chance.sample(loose, chance.randint(0, len(loose)))
            for write in loose:
                _apply(image, write)
            yield at, bytes(image)


class RecordingDevice(Wrapper):
    """`inner`, with all that changes it noted in `log` once it has returned.

    A write that fails or is cancelled is noted as done: it may have been.  Discarded ranges are
    noted as filled with 0xDD, since nobody may rely on their content.
    Nothing resolves for writing: every write comes through here.
    """

    def __init__(self, inner: BlockDevice, log: WriteLog | None = None) -> None:
        super().__init__(inner)
        self.log = WriteLog() if log is None else log

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        data = b"".join(buffers)
        try:
            await super().writev(offset, buffers)
        finally:
            self.log.write(offset, data)

    @property
    def batching(self) -> bool:
        return False

    async def flush(self) -> None:
        # Only what had returned before the call is durable after it.
        before = len(self.log.entries)
        await super().flush()
        self.log.entries.insert(before, Flush())

    async def discard(self, extents: Sequence[Extent]) -> None:
        try:
            await super().discard(extents)
        finally:
            for extent in extents:
                self.log.write(extent.offset, b"\xdd" * extent.length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        try:
            await super().write_zeroes(offset, length, may_unmap=may_unmap)
        finally:
            self.log.write(offset, bytes(length))

    def resolve(self, offset: int, length: int, *, for_write: bool) -> Sequence[HostExtent] | None:
        return None if for_write else super().resolve(offset, length, for_write=False)

    def can_place(self, offset: int, length: int) -> bool:
        return False


def _apply(image: bytearray, entry: Write | Flush) -> None:
    if isinstance(entry, Write):
        end = entry.offset + len(entry.data)
        if end > len(image):
            image.extend(bytes(end - len(image)))
        image[entry.offset : end] = entry.data


def _sectors(entry: Write | Flush) -> Iterator[Write]:
    if isinstance(entry, Write):
        for at in range(0, len(entry.data), SECTOR):
            yield Write(entry.offset + at, entry.data[at : at + SECTOR])
