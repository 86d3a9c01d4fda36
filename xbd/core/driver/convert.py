"""Copying one disk's content to another: several requests at a time, zeroes only where needed.

All offsets and lengths are bytes.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from typing import Final

import attrs
import trio

from xbd.core.driver.access import DeviceAccess
from xbd.core.driver.image import Progress, no_progress
from xbd.core.units import GIB, KIB, MIB

CHUNK: Final = 2 * MIB
"""Bytes moved at a time: a multiple of every unit of allocation below it."""

WORKERS: Final = 8
_SMALLEST_UNIT: Final = 4 * KIB
_SMALLEST_WINDOW: Final = 256 * MIB
_LARGEST_WINDOW: Final = 64 * GIB
"""How far ahead the source is asked what lies in it: the less there is, the farther."""

_FEW: Final = 256
_GLANCE: Final = bytes(32)
_ZEROES: Final = bytes(CHUNK)


@attrs.frozen
class _Piece:
    start: int
    stop: int
    zero: bool
    """The source says that it reads as zeroes."""


class Copier:
    """Copies the whole of `source` to the beginning of `target`.

    With `target_is_zero` nothing is written where the source has zeroes.  With `compare`, what
    the target has already (of the image behind it) is not written again.  `unit`: bytes that are
    written as a whole or not at all; None: what the target says that it allocates.
    """

    def __init__(
        self,
        source: DeviceAccess,
        target: DeviceAccess,
        *,
        target_is_zero: bool = False,
        compare: bool = False,
        unit: int | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self._source = source
        self._target = target
        self._target_is_zero = target_is_zero
        self._compare = compare
        self._progress = progress
        self._size = source.geometry.size
        self._unit = _unit(target, unit)
        self._done = 0
        self._pieces: Iterator[_Piece] = iter(())
        self._asked = 0
        self._window = _SMALLEST_WINDOW
        self._asking = trio.Lock()

    async def run(self) -> None:
        """Copy, and make the copy durable.  Raises `DriverError`, or groups of them."""
        self._progress(0, self._size)
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._work)
        await self._target.flush()

    async def _work(self) -> None:
        # Left to the collector: a failure's traceback may still hold views of them.
        memory, there = mmap.mmap(-1, CHUNK), mmap.mmap(-1, CHUNK)
        while (piece := await self._next()) is not None:
            if self._compare:
                await self._copy_difference(piece, memory, there)
            elif piece.zero:
                await self._zero(piece.start, piece.stop)
            else:
                await self._copy(piece, memory)
            self._done += piece.stop - piece.start
            self._progress(self._done, self._size)

    async def _next(self) -> _Piece | None:
        async with self._asking:
            while True:
                piece = next(self._pieces, None)
                if piece is not None or self._asked == self._size:
                    return piece
                await self._ask()

    async def _ask(self) -> None:
        """What lies in the source's next window, in pieces of whole units."""
        at = start = self._asked
        stop = min(start + self._window, self._size)
        zeroes = []
        told = await self._source.block_status(start, stop - start)
        for status in told:
            if status.zero:
                low = at + -at % self._unit
                high = at + status.length
                if high != self._size:
                    high -= high % self._unit
                if low < high:
                    zeroes.append((low, high))
            at += status.length
        self._asked = stop
        self._window = (
            min(2 * self._window, _LARGEST_WINDOW) if len(told) < _FEW else _SMALLEST_WINDOW
        )
        self._pieces = _pieces(start, stop, zeroes, CHUNK if self._compare else _SMALLEST_WINDOW)

    # -- one piece ----------------------------------------------------------------------------

    async def _copy(self, piece: _Piece, memory: mmap.mmap) -> None:
        data = memoryview(memory)[: piece.stop - piece.start]
        await self._source.readv(piece.start, [data])
        for low, high, zero in self._runs(memory, len(data)):
            if zero:
                await self._zero(piece.start + low, piece.start + high)
            else:
                await self._target.writev(piece.start + low, [data[low:high]])

    async def _zero(self, start: int, stop: int) -> None:
        if not self._target_is_zero:
            await self._target.write_zeroes(start, stop - start, may_unmap=True)

    def _runs(self, memory: mmap.mmap, length: int) -> Iterator[tuple[int, int, bool]]:
        """Neighbouring units of one kind: where they begin and end, and whether all is zero."""
        units = (
            (low, _is_zero(memory, low, min(low + self._unit, length)))
            for low in range(0, length, self._unit)
        )
        yield from _joined(units, length)

    async def _copy_difference(self, piece: _Piece, memory: mmap.mmap, there: mmap.mmap) -> None:
        start, length = piece.start, piece.stop - piece.start
        if piece.zero and await self._reads_as_zeroes(start, length):
            return
        data, old = memoryview(memory)[:length], memoryview(there)[:length]
        if piece.zero:
            data[:] = _ZEROES[:length]
        else:
            await self._source.readv(start, [data])
        await self._target.readv(start, [old])
        for low, high, zero in self._runs(memory, length):
            for begin, end, same in self._comparison(memory, there, low, high):
                if same:
                    continue
                if zero:
                    at = start + begin
                    await self._target.write_zeroes(at, end - begin, may_unmap=True)
                else:
                    await self._target.writev(start + begin, [data[begin:end]])

    async def _reads_as_zeroes(self, start: int, length: int) -> bool:
        return all(status.zero for status in await self._target.block_status(start, length))

    def _comparison(
        self, memory: mmap.mmap, there: mmap.mmap, low: int, high: int
    ) -> Iterator[tuple[int, int, bool]]:
        units = (
            (at, memory[at : min(at + self._unit, high)] == there[at : min(at + self._unit, high)])
            for at in range(low, high, self._unit)
        )
        yield from _joined(units, high)


def _unit(target: DeviceAccess, wanted: int | None) -> int:
    """A unit of which a chunk has a whole number."""
    geometry = target.geometry
    granularity = wanted or max(geometry.discard_granularity, geometry.logical_block)
    unit = math.lcm(granularity, _SMALLEST_UNIT)
    return unit if CHUNK % unit == 0 else _SMALLEST_UNIT


def _pieces(start: int, stop: int, zeroes: list[tuple[int, int]], longest: int) -> Iterator[_Piece]:
    """The range's data in chunks, and the zeroes between them in pieces of at most `longest`."""
    for low, high in [*zeroes, (stop, stop)]:
        while start < low:
            end = min(low, start - start % CHUNK + CHUNK)
            yield _Piece(start, end, zero=False)
            start = end
        while start < high:
            end = min(high, start - start % longest + longest)
            yield _Piece(start, end, zero=True)
            start = end


def _joined(units: Iterator[tuple[int, bool]], end: int) -> Iterator[tuple[int, int, bool]]:
    """Neighbours of one kind as one, up to `end`."""
    begin, kind = next(units)
    for at, other in units:
        if other != kind:
            yield begin, at, kind
            begin, kind = at, other
    yield begin, end, kind


def _is_zero(memory: mmap.mmap, low: int, high: int) -> bool:
    glance = min(low + len(_GLANCE), high)
    if memory[low:glance] != _GLANCE[: glance - low]:
        return False
    return memory[low:high] == _ZEROES[: high - low]
