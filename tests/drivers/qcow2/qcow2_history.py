"""What each sector of a disk may hold after a crash, given what was done when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs

SECTOR = 512
ZEROES = bytes(SECTOR)
NEVER = 1 << 60
_CHUNK = 16 * SECTOR


@attrs.define
class Version:
    """A value that a sector was given, or may have been given, between two places of the tape."""

    value: bytes
    begun: int
    done: int = NEVER
    """When it was answered; NEVER: it failed, or is under way."""


class History:
    """Of all sectors.  One thread at a time changes a sector; places are those of the tape."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.sectors = [
            [Version(bytes(content[at : at + SECTOR]), 0, 0)]
            for at in range(0, len(content), SECTOR)
        ]
        self.sizes = [Version(len(content).to_bytes(8, "big"), 0, 0)]
        self.flushes: list[tuple[int, int]] = []
        """When each flush of the disk began and ended."""
        self._there: dict[int, bytes] = {}

    def now(self, sector: int) -> bytes:
        """What reading gives if nothing failed."""
        return self.sectors[sector][-1].value

    def content(self, sectors: int) -> bytes:
        return b"".join(self.now(sector) for sector in range(sectors))

    def begin(self, offset: int, values: Iterable[bytes], place: int) -> list[Version]:
        """Whole sectors are about to become these values; give the result to `end`."""
        begun = []
        for sector, value in enumerate(values, offset // SECTOR):
            version = Version(value, place)
            self.sectors[sector].append(version)
            begun.append(version)
        return begun

    @staticmethod
    def end(begun: Iterable[Version], place: int) -> None:
        """It was answered that they are."""
        for version in begun:
            version.done = place

    def extend(self, sectors: int) -> None:
        """The disk may become so long; what is new is zero."""
        while len(self.sectors) < sectors:
            self.sectors.append([Version(ZEROES, 0, 0)])

    def surely(self, place: int, *, flushed: bool = True) -> int:
        """Up to where on the tape all that was answered is there after a crash at `place`."""
        if not flushed:
            return place
        return max((begun for begun, ended in self.flushes if ended <= place), default=0)

    @staticmethod
    def allowed(versions: list[Version], sure: int, place: int) -> set[bytes]:
        """What there may be after a crash at `place`, if all is there that was done by `sure`."""
        allowed = set()
        for version in reversed(versions):
            if version.begun < place or version.done <= sure:
                allowed.add(version.value)
            if version.done <= sure:
                break
        return allowed

    def compare(self, disk: bytes | bytearray, place: int, *, flushed: bool) -> None:
        """Raise `AssertionError` for a disk that can't be after a crash at `place` of the tape.

        `flushed` False: only the process died, so what was answered is there, flushed or not.
        """
        sure = self.surely(place, flushed=flushed)
        sizes = {int.from_bytes(value, "big") for value in self.allowed(self.sizes, place, place)}
        assert len(disk) in sizes, f"the disk has {len(disk)} bytes instead of {sizes}"
        for sector in _differing(disk, self._surely_there(sure)):
            self._compare_sector(disk, sector, sure, place)

    def _surely_there(self, sure: int) -> bytes:
        """The disk as of place `sure`."""
        if sure not in self._there:
            if len(self._there) > 1:  # places come in ascending order
                del self._there[min(self._there)]
            values = [
                next(v.value for v in reversed(versions) if v.done <= sure)
                for versions in self.sectors
            ]
            self._there[sure] = b"".join(values)
        return self._there[sure]

    def _compare_sector(self, disk: bytes | bytearray, sector: int, sure: int, place: int) -> None:
        value = bytes(disk[sector * SECTOR : (sector + 1) * SECTOR])
        versions = self.sectors[sector]
        allowed = self.allowed(versions, sure, place)
        if value in allowed:
            return
        told = ", ".join(
            f"{_told(v.value)} {v.begun}-{'' if v.done == NEVER else v.done}" for v in versions[-6:]
        )
        raise AssertionError(
            f"sector {sector} holds {_told(value)}, allowed are "
            f"{', '.join(map(_told, allowed))}; versions: {told}; crash at {place}, "
            f"sure up to {sure}"
        )


def _differing(disk: bytes | bytearray, other: bytes) -> Iterator[int]:
    """Sectors that are not the same."""
    for chunk in range(0, len(disk), _CHUNK):
        if disk[chunk : chunk + _CHUNK] != other[chunk : chunk + _CHUNK]:
            for at in range(chunk, min(chunk + _CHUNK, len(disk)), SECTOR):
                if disk[at : at + SECTOR] != other[at : at + SECTOR]:
                    yield at // SECTOR


def _told(value: bytes | bytearray) -> str:
    if not any(value):
        return "zeroes"
    same = bytes(value[:8]) * (len(value) // 8) == value
    return bytes(value[:8]).hex() + ("" if same else "...")


def stamp(number: int, sector: int) -> bytes:
    """A value that no other write gives to any sector."""
    return (number << 24 | sector).to_bytes(8, "big") * (SECTOR // 8)
