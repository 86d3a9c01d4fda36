"""Requests that came together, for drivers that take many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol, TypeVar

MOST_TOGETHER: Final = 1 << 20
"""Bytes that one call is asked for, and that are answered when all of them are done."""


class HasLength(Protocol):
    """Bytes to move."""

    @property
    def length(self) -> int: ...


TransferT = TypeVar("TransferT", bound=HasLength)


def by_size(transfers: Sequence[TransferT]) -> Iterator[list[TransferT]]:
    """In parts of `MOST_TOGETHER` at most, or of one."""
    some: list[TransferT] = []
    size = 0
    for one in transfers:
        if some and size + one.length > MOST_TOGETHER:
            yield some
            some, size = [], 0
        some.append(one)
        size += one.length
    if some:
        yield some
