"""Programs that are made to be killed: ``python kill_victim.py IMAGE``, one after the other.

For each line on stdin, ``SEED SECTORS UNIT``, a process is forked that opens the image and changes
its disk until it is killed.  What is told on stdout, a line each:

    P PID                       the process
    B ID FIRST COUNT NUMBER     sectors are about to become `stamp(NUMBER, sector)`; 0: zeroes
    A ID MASK                   and that was answered; a bit for each sector that stayed as it was
    D                           the process is dead
"""

from __future__ import annotations

import os
import random
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import trio
from qcow2_history import SECTOR, ZEROES, stamp
from qcow2_power import stay_on

from xbd.core.driver import BlockDevice, Extent, OpenContext, parse_options
from xbd.core.driver.buffers import aligned_buffer
from xbd.drivers.qcow2 import DRIVER

TASKS = 4
LENGTHS = (1, 2, 3, 8, 9, 20, 64)


def tell(*words: object) -> None:
    """In one piece: there are several who tell."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Victim:
    """One of the tasks, with a part of the disk of its own."""

    def __init__(
        self, device: BlockDevice, chance: random.Random, part: range, unit: int, number: int
    ) -> None:
        self.device = device
        self.chance = chance
        self.part = part
        self.unit = unit
        self.number = number << 20

    async def run(self) -> None:
        while True:
            length = min(self.chance.choice(LENGTHS), len(self.part))
            first = self.part.start + self.chance.randrange(len(self.part) - length + 1)
            kind = self.chance.choice("WWWWWWDZUF")
            if kind == "F":
                await self.device.flush()
                continue
            if kind == "D":
                first -= first % self.unit
                length = self.unit
            self.number += 1
            stamped = self.number if kind == "W" else 0
            tell("B", self.number, first, length, stamped)
            tell("A", self.number, await self._change(kind, first, length))

    async def _change(self, kind: str, first: int, length: int) -> int:
        offset, size = first * SECTOR, length * SECTOR
        if kind == "D":
            await self.device.discard([Extent(offset=offset, length=size)])
        elif kind == "W":
            values = [stamp(self.number, sector) for sector in range(first, first + length)]
            buffer = aligned_buffer(size, 4096)
            buffer[:] = b"".join(values)
            if not self._write_directly(offset, buffer):
                await self.device.writev(offset, [buffer])
            return 0
        else:
            await self.device.write_zeroes(offset, size, may_unmap=kind == "U")
        there = aligned_buffer(size, 4096)
        await self.device.readv(offset, [there])
        stayed = [there[at : at + SECTOR] != ZEROES for at in range(0, size, SECTOR)]
        assert kind == "D" or not any(stayed)
        return sum(1 << number for number, did in enumerate(stayed) if did)

    def _write_directly(self, offset: int, buffer: memoryview) -> bool:
        """As the data path does where the bytes simply lie in a file."""
        unit = self.device.geometry.request_alignment
        extents: Sequence = self.device.resolve(offset, len(buffer), for_write=True) or ()
        if not extents or extents[0].length < len(buffer) or (offset | len(buffer)) % unit:
            return False
        written = os.pwrite(extents[0].fd, buffer, extents[0].offset)
        return written == len(buffer)


async def live(path: Path, seed: int, sectors: int, unit: int) -> None:
    async def invalidate(offset: int, length: int) -> None:
        await trio.lowlevel.checkpoint()

    context = OpenContext(
        device_id="xbdback1i2",
        writable=True,
        run_blocking=trio.to_thread.run_sync,
        invalidate=invalidate,
        image_dirs=[path.parent],
    )
    options = parse_options(DRIVER.options, {"path": str(path)})
    async with DRIVER.open(context, options) as device, trio.open_nursery() as nursery:
        units = sectors // unit
        for task in range(TASKS):
            part = range(units * task // TASKS * unit, units * (task + 1) // TASKS * unit)
            chance = random.Random(f"{seed} {task}")
            nursery.start_soon(Victim(device, chance, part, unit, task + 1).run)


def main() -> None:
    stay_on()
    path = Path(sys.argv[1])
    for line in sys.stdin:
        seed, sectors, unit = map(int, line.split())
        child = os.fork()
        if child == 0:
            try:
                tell("P", os.getpid())
                trio.run(live, path, seed, sectors, unit)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        tell("D")


if __name__ == "__main__":
    main()
