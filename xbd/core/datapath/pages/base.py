"""How a request's data is reached: one interface over persistent, mapped and copied grants."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Protocol

import attrs

from xbd.core.blkif import Indirect, Transfer, constants
from xbd.core.hypervisor import GrantMapping
from xbd.core.units import PAGE_SIZE, GrantRef

INDIRECT_SEGMENT_BYTES = 8
"""Size of a blkif_request_segment in an indirect page."""


class WorkOwner(Protocol):
    """Who hears of finished transfers: a ring."""

    def completed(self, good: Sequence[Work], bad: Sequence[Work]) -> None:
        """The engine is done with these; `bad` ones did not move all their bytes."""


@attrs.define(slots=True, eq=False)
class Page:
    """A guest page that stays mapped."""

    view: memoryview
    """All 4096 bytes, writable."""
    address: int
    mapping: GrantMapping
    used: int
    """Batch in which it was used last."""
    users: int = 0
    """Requests in flight that use it; it can't be unmapped meanwhile."""


@attrs.define(slots=True, eq=False)
class Work:
    """A transfer that is being carried out, and the memory it uses."""

    slot: int
    """Its place in the journal."""
    request: Transfer
    parts: list[tuple[memoryview, int, int, int]]
    """Per segment: a view, start and length in it, and the virtual address of the start."""
    status: int = constants.RSP_OKAY
    held: list[Page] | GrantMapping | list[int] | None = None
    """What the pages' owner gives back when the work is finished."""
    views: list[memoryview] = attrs.Factory(list)
    direct: bool = False
    """Whether the engine moves it now, through an answer of `resolve`."""

    def buffers(self) -> list[memoryview]:
        """The segments' memory, one view each; they die with the work."""
        if not self.views:
            self.views = [view[start : start + size] for view, start, size, _ in self.parts]
        return self.views

    def release_views(self) -> None:
        """Make views that somebody kept harmless before their memory goes away."""
        for view in self.views:
            view.release()
        self.views = []


class GuestPages(abc.ABC):
    """The data pages of one ring's requests."""

    mode: str
    """For people: ``persistent``, ``map`` or ``copy``."""
    resident: dict[int, Page]
    """Pages that are mapped already, by grant reference: a data path's short cut."""
    batch: int
    """Grows with each wake-up."""

    @abc.abstractmethod
    def attach(self, slot: int, request: Transfer) -> Work | None:
        """Give the request its memory.  None: there is none left now, try after a `finish`.

        Raises `GrantFailed` when the guest's pages can't be reached.
        """

    @abc.abstractmethod
    def fetch(self, works: Sequence[Work]) -> None:
        """Before the I/O: bring the data of writes.  Sets `Work.status` where that fails."""

    @abc.abstractmethod
    def finish(self, works: Sequence[Work]) -> None:
        """After the I/O, before the answers: deliver the data of reads, give the memory back.

        Sets `Work.status` where a delivery fails.
        """

    @abc.abstractmethod
    def read_indirect(self, request: Indirect) -> list[bytes]:
        """A private copy of each of the request's indirect pages, as far as it is used.

        Raises `GrantFailed`.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Unmap everything that is kept."""


def indirect_lengths(request: Indirect) -> list[int]:
    """Bytes used in each of the request's indirect pages."""
    rest = request.nr_segments * INDIRECT_SEGMENT_BYTES
    lengths = []
    for _ in request.refs:
        lengths.append(min(rest, PAGE_SIZE))
        rest -= lengths[-1]
    return lengths


def grant_refs(request: Transfer) -> list[GrantRef]:
    """The pages of all segments, in order."""
    return [ref for ref, _, _ in request.segments]
