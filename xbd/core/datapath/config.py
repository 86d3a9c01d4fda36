"""What a data path is told: what was offered, and what the frontend made of it."""

from __future__ import annotations

import enum

import attrs

from xbd.core.blkif import Abi, constants
from xbd.core.units import Domid, GrantRef, Port


class GrantMode(enum.Enum):
    """How a guest's pages are reached."""

    AUTO = "auto"
    """The fastest that both sides allow."""
    PERSISTENT = "persistent"
    """Mapped once and kept (the frontend uses the same grants again)."""
    MAP = "map"
    """Mapped for each request, unmapped before its answer."""
    COPY = "copy"
    """Copied by the hypervisor to and from memory of our own."""


class DataPath(enum.Enum):
    """Who moves the bytes."""

    AUTO = "auto"
    """The native one where it was built."""
    NATIVE = "native"
    """Threads in C."""
    PYTHON = "python"
    """The reference: always there."""


@attrs.frozen(kw_only=True)
class Features:
    """What the backend advertised; a frontend that uses anything else is refused."""

    flush: bool = True
    barrier: bool = False
    discard: bool = False
    discard_secure: bool = False
    persistent: bool = True
    max_indirect_segments: int = 256
    max_ring_order: int = 4
    max_queues: int = 4


@attrs.frozen(kw_only=True)
class QueueConfig:
    """One ring: its pages in order, and the guest's port."""

    ring_refs: tuple[GrantRef, ...]
    event_channel: Port


@attrs.frozen(kw_only=True)
class FrontendConfig:
    """What a frontend wrote, read and checked by the backend."""

    domid: Domid
    abi: Abi
    ring_order: int
    queues: tuple[QueueConfig, ...]
    persistent: bool


@attrs.define(slots=True, eq=False)
class DiskStats:
    """Counters since the disk was opened.  Names as in xen-blkback's statistics."""

    rd_req: int = 0
    wr_req: int = 0
    f_req: int = 0
    ds_req: int = 0
    rd_bytes: int = 0
    wr_bytes: int = 0
    errors: int = 0
    """Requests answered with anything but OKAY."""
    last_error: str | None = None

    def count(self, operation: int, length: int) -> None:
        """Count a request other than READ and WRITE, which the hot loops count themselves."""
        if operation == constants.DISCARD:
            self.ds_req += 1
        elif operation in (constants.FLUSH_DISKCACHE, constants.WRITE_BARRIER) and not length:
            self.f_req += 1
        else:
            self.wr_req += 1
            self.wr_bytes += length
