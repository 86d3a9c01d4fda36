"""A disk that answers when a test wants it to, also where the data path reads by itself."""

from __future__ import annotations

import os
from contextlib import contextmanager

from xbd.core.driver import HostExtent
from xbd.core.driver.testing import MemoryDevice
from xbd.core.units import MIB, PAGE_SIZE


class PipedDevice(MemoryDevice):
    """Its first MiB is read from a pipe: for as long as that is empty, reads are in flight."""

    def __init__(self) -> None:
        super().__init__(2 * MIB)
        self.pipes = [os.pipe(), os.pipe()]
        self.which = 0
        """The pipe in use."""
        self.asked = 0

    def resolve(self, offset, length, *, for_write):
        self.asked += 1
        if for_write or offset >= MIB:
            return None
        fd, _ = self.pipes[self.which]
        return [HostExtent(fd=fd, offset=offset, length=PAGE_SIZE - offset % PAGE_SIZE)]

    def end_a_read(self, which: int = 0) -> None:
        os.write(self.pipes[which][1], b"p" * PAGE_SIZE)


@contextmanager
def piped():
    device = PipedDevice()
    yield device
    for ends in device.pipes:
        for end in ends:
            os.close(end)
