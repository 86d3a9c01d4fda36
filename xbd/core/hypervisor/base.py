"""Boundary A: a guest's pages and event channels, without a word about rings or blocks."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import attrs

from xbd.core.units import Domid, GrantRef, Port


class GrantMapping(abc.ABC):
    """Granted pages of one guest, mapped one after the other into this process.

    The guest can change the bytes at any time: copy once, then look at the copy.
    """

    view: memoryview
    """All pages as bytes (format ``B``), writable if mapped so."""
    address: int
    """Virtual address of the first byte, for interfaces that take pointers."""

    @abc.abstractmethod
    def unmap(self) -> None:
        """Give the pages back.  Idempotent.

        Nobody may touch `view`, a slice of it, or `address` afterwards, the kernel included:
        call it only after all I/O on the pages has ended.
        """


@attrs.define(slots=True, eq=False)
class CopyOp:
    """One copy between a granted page and our own memory, as GNTTABOP_copy does it."""

    ref: GrantRef
    offset: int
    """Bytes from the start of the granted page; offset + len(local) <= PAGE_SIZE."""
    local: memoryview
    """Our side; contiguous bytes, written to unless `to_guest`."""
    to_guest: bool


@attrs.frozen(kw_only=True)
class NativeDomain:
    """How native code reaches a guest's pages by itself: addresses and plain numbers.

    Either the guest's memory and its grant table (an embedded guest), or a library's handle and
    functions (Xen's libxengnttab).
    """

    writable: int = 0
    readable: int = 0
    table: int = 0
    pages: int = 0
    granted: int = 0
    granted_readonly: int = 0
    handle: int = 0
    map: int = 0
    unmap: int = 0
    copy: int = 0
    """0: there is none."""
    close: Callable[[], None]
    """When nothing uses it any more."""


@attrs.frozen(kw_only=True)
class NativeChannel:
    """How native code uses an event channel: descriptors, or a library's handle and functions."""

    fd: int
    notify_fd: int = -1
    port: int = 0
    handle: int = 0
    pending: int = 0
    unmask: int = 0
    notify: int = 0


class EventChannel(abc.ABC):
    """One event channel bound to a guest's port.  Each has a file descriptor of its own."""

    port: Port
    """Our end's port number."""
    fd: int
    """Readable while an event is pending; stays this object's."""

    @abc.abstractmethod
    def take(self) -> bool:
        """Consume a pending event without blocking; False if there was none.

        Further events stay masked (Xen) until `unmask`; none is lost meanwhile.
        """

    @abc.abstractmethod
    def unmask(self) -> None:
        """Let the next event make `fd` readable.  Called when the work of the last one is done."""

    @abc.abstractmethod
    def notify(self) -> None:
        """Send the guest an event.  Never blocks, never raises when the guest is gone."""

    def native(self) -> NativeChannel | None:
        """For native code, which then is the only one to take, unmask and notify.  None: no way."""
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Unbind.  Idempotent.  A trio task waiting on `fd` gets ClosedResourceError."""


class Hypervisor(abc.ABC):
    """What a backend needs of a hypervisor.  Not thread-safe: one thread owns it."""

    name: str
    """For people: ``xen`` or ``embedded``."""
    can_copy: bool
    """Whether `copy_grants` works (GNTTABOP_copy is Linux only)."""
    can_map: bool
    """Whether `map_grants` works."""

    @abc.abstractmethod
    def map_grants(self, domid: Domid, refs: Sequence[GrantRef], *, writable: bool) -> GrantMapping:
        """Map pages side by side, all or none.

        Raises `GrantFailed` if any page can't be mapped; nothing stays mapped then.
        """

    @abc.abstractmethod
    def copy_grants(self, domid: Domid, ops: Sequence[CopyOp]) -> list[int]:
        """Carry out all copies in one call into the kernel; a status each, 0 or a GNTST error.

        Raises `GrantFailed` only if the call as a whole was refused.
        """

    @abc.abstractmethod
    def bind_interdomain(self, domid: Domid, remote_port: Port) -> EventChannel:
        """Bind to a port that the guest has allocated for us.

        The new channel is pending at once, since events may have been lost before.
        Raises `PortFailed`.
        """

    def native_domain(self, domid: Domid) -> NativeDomain | None:
        """A guest's pages for native code; valid until its `close`, even when the guest is gone.

        None: there is no way.  Raises `GrantFailed`.
        """
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything that is still mapped or bound.  Idempotent."""

    @property
    @abc.abstractmethod
    def mapped_pages(self) -> int:
        """How many pages are mapped just now (tests and `xbd list` look for leaks)."""

    @property
    @abc.abstractmethod
    def bound_ports(self) -> int:
        """How many event channels are bound just now."""
