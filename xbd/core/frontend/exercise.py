"""Writing a disk full through its ring and reading every byte back."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Iterator

import attrs
import trio

from xbd.core.frontend.device import BlockFrontend
from xbd.core.units import KIB

LENGTHS = (4 * KIB, 12 * KIB, 44 * KIB, 48 * KIB, 128 * KIB, 512 * KIB)
"""Of the pieces that are written and read: below, at and above what fits a direct request."""
SMALL = 4 * KIB

Progress = Callable[[int], None]
"""Told how many bytes more are done."""


@attrs.frozen
class Timing:
    """How long requests took."""

    count: int
    size: int
    """Bytes moved in all."""
    seconds: float
    latencies: tuple[float, ...]
    """Seconds per piece, sorted."""

    @property
    def bytes_per_second(self) -> float:
        return self.size / self.seconds if self.seconds else 0.0

    @property
    def per_second(self) -> float:
        return self.count / self.seconds if self.seconds else 0.0

    def percentile(self, percent: float) -> float:
        """Seconds that so many percent of the pieces did not exceed."""
        if not self.latencies:
            return 0.0
        last = len(self.latencies) - 1
        return self.latencies[min(last, int(len(self.latencies) * percent / 100))]


class Exercise:
    """A known pattern on one disk.  `depth` pieces are under way at a time."""

    def __init__(self, frontend: BlockFrontend, seed: int, depth: int = 16) -> None:
        self.frontend = frontend
        self.wrong: list[int] = []
        """Offsets of pieces that came back different."""
        self._seed = seed
        self._depth = depth

    def pattern(self, offset: int, length: int) -> bytes:
        """What belongs there."""
        return self.pattern_of(self._seed, offset, length)

    @staticmethod
    def pattern_of(seed: int, offset: int, length: int) -> bytes:
        """What belongs there on a disk of this seed; any part can be made alone."""
        parts = []
        for at in range(offset - offset % SMALL, offset + length, SMALL):
            parts.append(hashlib.shake_128(f"{seed}:{at}".encode()).digest(SMALL))
        skip = offset % SMALL
        return b"".join(parts)[skip : skip + length]

    def _pieces(self, salt: int) -> list[tuple[int, int]]:
        """The whole disk in pieces of many lengths, in random order."""
        dice = random.Random(f"{self._seed}:{salt}")
        size = self.frontend.offer.size
        pieces = []
        offset = 0
        while offset < size:
            length = min(dice.choice(LENGTHS), size - offset)
            pieces.append((offset, length))
            offset += length
        dice.shuffle(pieces)
        return pieces

    async def fill(self, progress: Progress) -> Timing:
        """Write the pattern over the whole disk, then flush."""

        async def write(offset: int, length: int) -> None:
            await self.frontend.write(offset, self.pattern(offset, length))
            progress(length)

        timing = await self._each(self._pieces(1), write)
        if self.frontend.offer.flush:
            await self.frontend.flush()
        return timing

    async def verify(self, progress: Progress) -> Timing:
        """Read the whole disk and compare; what differs is listed in `wrong`."""

        async def read(offset: int, length: int) -> None:
            data = await self.frontend.read(offset, length)
            if data != self.pattern(offset, length):
                self.wrong.append(offset)
            progress(length)

        return await self._each(self._pieces(2), read)

    async def random_reads(self, count: int) -> Timing:
        """Read small pieces all over the disk and compare."""
        dice = random.Random(self._seed)
        last = self.frontend.offer.size // SMALL - 1
        pieces = [(dice.randint(0, last) * SMALL, SMALL) for _ in range(count)]
        expected = {offset: self.pattern(offset, SMALL) for offset, _ in pieces}

        async def read(offset: int, length: int) -> None:
            if await self.frontend.read(offset, length) != expected[offset]:
                self.wrong.append(offset)

        return await self._each(pieces, read)

    async def _each(
        self,
        pieces: list[tuple[int, int]],
        move: Callable[[int, int], Awaitable[None]],
    ) -> Timing:
        latencies: list[float] = []

        async def worker(work: Iterator[tuple[int, int]]) -> None:
            for offset, length in work:
                begin = time.perf_counter()
                await move(offset, length)
                latencies.append(time.perf_counter() - begin)

        begin = time.perf_counter()
        shared = iter(pieces)
        async with trio.open_nursery() as nursery:
            for _ in range(self._depth):
                nursery.start_soon(worker, shared)
        seconds = time.perf_counter() - begin
        size = sum(length for _, length in pieces)
        return Timing(len(pieces), size, seconds, tuple(sorted(latencies)))
