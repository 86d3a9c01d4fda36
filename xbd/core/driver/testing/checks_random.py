"""Random operations against a bytearray, with resolved extents cached as the data path does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
import trio

from xbd.core.driver.access import DeviceAccess
from xbd.core.driver.api import Capability, Extent, HostExtent
from xbd.core.driver.geometry import request_unit
from xbd.core.driver.testing.bench import (
    Bench,
    can,
    noise,
    read,
    read_host,
    read_in_parts,
    span,
    write,
    write_host,
    write_in_parts,
)

_KINDS: Final = (
    *("write", "write", "many", "direct", "zero", "unmap", "discard"),
    *("read", "flush", "resolve", "place"),
)

Step = tuple[str, int, int, int]
"""Kind, place and length (both in units, taken modulo the span), seed."""


async def check_random(bench: Bench) -> None:
    """Random operations give what a bytearray gives; resolved extents hold the same bytes."""
    try:
        from hypothesis import given, settings, strategies
    except ImportError as error:
        text = "the conformance suite needs hypothesis: pip install 'xbd[test]'"
        raise RuntimeError(text) from error
    step = strategies.tuples(
        strategies.sampled_from(_KINDS),
        strategies.integers(0, 255),
        strategies.integers(1, 40),
        strategies.integers(0, 999),
    )
    async with bench.open() as access:
        # Hypothesis is not asynchronous: it runs in a thread and its examples here.
        def run_in_thread() -> None:
            @settings(max_examples=bench.examples, deadline=None, database=None)
            @given(script=strategies.lists(step, max_size=25))
            def example(script: list[Step]) -> None:
                trio.from_thread.run(_play, access, script)

            example()

        await trio.to_thread.run_sync(run_in_thread)


async def _play(access: DeviceAccess, script: Sequence[Step]) -> None:
    player = _Player(access)
    access.subscribe(player.forget)
    try:
        await player.start()
        for step in script:
            await player.play(*step)
        await player.compare()
    finally:
        access.unsubscribe(player.forget)


@attrs.define(eq=False)
class _Player:
    access: DeviceAccess
    model: bytearray = attrs.field(factory=bytearray)
    unit: int = 0
    answers: list[tuple[int, bool, Sequence[HostExtent]]] = attrs.field(factory=list)
    """Where they begin, whether for writing, and what `resolve` said."""
    zeroes: list[tuple[int, int]] = attrs.field(factory=list)
    """Beginnings and ends of what `zeroes` said."""

    async def start(self) -> None:
        size = span(self.access)
        self.unit = request_unit(self.access.geometry)
        if can(self.access, Capability.WRITE):
            self.model = bytearray(noise(size, 20))
            await write(self.access, 0, bytes(self.model))
        else:
            self.model = bytearray(await read(self.access, 0, size))

    async def forget(self, offset: int, length: int) -> None:
        self.answers = [
            (start, for_write, extents)
            for start, for_write, extents in self.answers
            if start >= offset + length or start + _length(extents) <= offset
        ]
        self.zeroes = [
            (start, end) for start, end in self.zeroes if start >= offset + length or end <= offset
        ]

    async def play(self, kind: str, place: int, count: int, seed: int) -> None:
        blocks = len(self.model) // self.unit
        offset = place % blocks * self.unit
        length = min(count * self.unit, len(self.model) - offset)
        # A guest has mostly read where it changes something: see whether drivers take it back.
        self.resolve(offset, length, for_write=False)
        if kind == "read":
            # An odd range, so that the core has to widen it.
            start, end = offset + seed % self.unit, offset + length
            assert await read(self.access, start, end - start) == self.model[start:end]
        elif kind == "flush":
            await self.access.flush()
        elif kind == "place":
            if self.access.can_place(offset, length):
                await self.access.place([Extent(offset=offset, length=length)])
        elif kind == "resolve":
            self.resolve(offset, length, for_write=bool(seed % 2))
        elif can(self.access, Capability.WRITE):
            await self.change(kind, offset, length, seed)
        self.check_answers()

    async def change(self, kind: str, offset: int, length: int, seed: int) -> None:
        part = slice(offset, offset + length)
        if kind == "write":
            self.model[part] = noise(length, seed)
            await write(self.access, offset, noise(length, seed))
        elif kind == "many":
            self.model[part] = noise(length, seed)
            await write_in_parts(self.access, offset, noise(length, seed), part=self.unit)
        elif kind in ("zero", "unmap"):
            self.model[part] = bytes(length)
            await self.access.write_zeroes(offset, length, may_unmap=kind == "unmap")
        elif kind == "direct":
            if self.access.can_place(offset, length):
                await self.access.place([Extent(offset=offset, length=length)])
            self.resolve(offset, length, for_write=True)
            for start, for_write, extents in self.answers:
                if for_write and start == offset:
                    data = noise(min(length, _length(extents)), seed)
                    write_host(self.access, extents, data)
                    self.model[offset : offset + len(data)] = data
                    break
        elif can(self.access, Capability.DISCARD):
            # Less than a granule would never reach the driver.
            granule = max(self.access.geometry.discard_granularity, self.unit)
            start = offset - offset % granule
            end = min(offset + length + -(offset + length) % granule, len(self.model))
            await self.access.discard([Extent(offset=start, length=end - start)])
            self.model[start:end] = await read(self.access, start, end - start)

    def resolve(self, offset: int, length: int, *, for_write: bool) -> None:
        extents = self.access.resolve(offset, length, for_write=for_write)
        if not extents:
            if not for_write:
                self.zeroes = [*self.zeroes[-15:], self._zeroes(offset, length)]
            return
        end = offset + _length(extents)
        assert end <= self.access.geometry.size, "resolve answers beyond the disk"
        alignment = self.access.geometry.request_alignment
        for extent in extents:
            assert extent.length > 0, "resolve answers an empty extent"
            assert not extent.offset % alignment, "resolve answers a misaligned extent"
        self.answers = [*self.answers[-15:], (offset, for_write, extents)]

    def _zeroes(self, offset: int, length: int) -> tuple[int, int]:
        end = offset + self.access.zeroes(offset, length)
        assert offset <= end <= self.access.geometry.size, "there are zeroes outside the disk"
        return offset, end

    def check_answers(self) -> None:
        """What all answers that were not taken back say now."""
        for start, _, extents in self.answers:
            length = min(_length(extents), len(self.model) - start, 64 << 10)
            assert read_host(self.access, extents, length) == self.model[start : start + length], (
                f"the resolved extent at {start} does not hold the disk's bytes (any more)"
            )

        for start, end in self.zeroes:
            assert not any(self.model[start : min(end, start + (64 << 10))]), (
                f"there are no zeroes at {start} (any more)"
            )

    async def compare(self) -> None:
        part = -(-len(self.model) // 32 // self.unit) * self.unit
        parts = await read_in_parts(self.access, 0, len(self.model), part=part)
        assert parts == self.model, "many reads at a time differ from the model"
        content = await read(self.access, 0, len(self.model))
        assert content == self.model, "the disk differs from the model"


def _length(extents: Sequence[HostExtent]) -> int:
    return sum(extent.length for extent in extents)
