"""Xen's grants and event channels, as dom0 or a driver domain sees them."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from xbd.core.errors import GrantFailed, HypervisorLost, HypervisorUnavailable, PortFailed
from xbd.core.hypervisor.base import (
    CopyOp,
    EventChannel,
    GrantMapping,
    Hypervisor,
    NativeChannel,
    NativeDomain,
)
from xbd.core.hypervisor.gntst import GrantStatus
from xbd.core.hypervisor.xenlibs import (
    GRANT_COPY_DEST_IS_REF,
    GRANT_COPY_SOURCE_IS_REF,
    XenLibraries,
    ffi,
)
from xbd.core.units import PAGE_SIZE, Domid, GrantRef, Port

_NETBSD: Final = sys.platform.startswith("netbsd")
_GRANT_DEVICE: Final = "/kern/xen/privcmd" if _NETBSD else "/dev/xen/gntdev"
_EVENT_DEVICE: Final = "/dev/xenevt" if _NETBSD else "/dev/xen/evtchn"
_NO_XEN: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOSYS})
_NO_RIGHT: Final = frozenset({errno.EACCES, errno.EPERM})


class XenHypervisor(Hypervisor):
    """One grant handle for all mappings, and an event channel handle per channel."""

    name = "xen"
    can_map = True

    def __init__(self) -> None:
        """Open Xen's devices.  Raises `HypervisorUnavailable`."""
        self._libraries = XenLibraries()
        self._gnttab = self._libraries.gnttab
        handle = self._gnttab.xengnttab_open(self._libraries.logger, 0)
        if handle == ffi.NULL:
            raise _unavailable(_GRANT_DEVICE, ffi.errno)
        self._handle: Any = handle
        self._mappings: set[XenMapping] = set()
        self._channels: set[XenChannel] = set()
        self._mapped_pages = 0
        try:
            _EvtchnHandle(self._libraries).close()
            self.can_copy = self._probe_copy()
        except BaseException:
            self.close()
            raise

    def _probe_copy(self) -> bool:
        """Whether this kernel copies: elsewhere than on Linux the libraries only pretend to."""
        if sys.platform != "linux":
            return False
        nothing = ffi.new("xengnttab_grant_copy_segment_t[1]")
        return bool(self._gnttab.xengnttab_grant_copy(self._handle, 0, nothing) == 0)

    def map_grants(self, domid: Domid, refs: Sequence[GrantRef], *, writable: bool) -> GrantMapping:
        if not refs:
            raise ValueError("no pages to map")
        self._require_open()
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        pages = len(refs)
        address = self._gnttab.xengnttab_map_domain_grant_refs(
            self._handle, pages, domid, ffi.new("uint32_t[]", list(refs)), prot
        )
        if address == ffi.NULL:
            why = os.strerror(ffi.errno)
            raise GrantFailed(f"mapping {pages} pages of domain {domid} failed: {why}")
        mapping = XenMapping(self, address, pages, writable=writable)
        self._mappings.add(mapping)
        self._mapped_pages += pages
        return mapping

    def unmap(self, mapping: XenMapping, address: Any) -> None:
        """Only `XenMapping.unmap` calls this."""
        self._mappings.discard(mapping)
        self._mapped_pages -= mapping.pages
        if self._gnttab.xengnttab_unmap(self._handle, address, mapping.pages) != 0:
            raise HypervisorLost(f"unmapping a guest's pages failed: {os.strerror(ffi.errno)}")

    def copy_grants(self, domid: Domid, ops: Sequence[CopyOp]) -> list[int]:
        if not ops:
            return []
        self._require_open()
        statuses = [GrantStatus.BAD_COPY_ARG if _crosses_page(op) else None for op in ops]
        sound = [op for op, status in zip(ops, statuses, strict=True) if status is None]
        done = iter(self._copy_sound(domid, sound) if sound else ())
        return [next(done) if status is None else int(status) for status in statuses]

    def _copy_sound(self, domid: Domid, ops: Sequence[CopyOp]) -> list[int]:
        segments = ffi.new("xengnttab_grant_copy_segment_t[]", len(ops))
        buffers = [_fill(segments[index], domid, op) for index, op in enumerate(ops)]
        result = self._gnttab.xengnttab_grant_copy(self._handle, len(ops), segments)
        number = ffi.errno
        del buffers  # our memory had to stay where it is until now
        if result != 0:
            raise GrantFailed(
                f"copying {len(ops)} times from or to domain {domid} failed: {os.strerror(number)}"
            )
        return [segment.status for segment in segments]

    def native_domain(self, domid: Domid) -> NativeDomain:
        self._require_open()
        gnttab = self._gnttab
        handle = gnttab.xengnttab_open(self._libraries.logger, 0)
        if handle == ffi.NULL:
            raise GrantFailed(f"opening {_GRANT_DEVICE} again failed: {os.strerror(ffi.errno)}")
        return NativeDomain(
            handle=_address(handle),
            map=_address(gnttab.xengnttab_map_domain_grant_refs),
            unmap=_address(gnttab.xengnttab_unmap),
            copy=_address(gnttab.xengnttab_grant_copy) if self.can_copy else 0,
            close=partial(gnttab.xengnttab_close, handle),
        )

    def bind_interdomain(self, domid: Domid, remote_port: Port) -> EventChannel:
        self._require_open()
        try:
            handle = _EvtchnHandle(self._libraries)
        except HypervisorUnavailable as error:
            raise PortFailed(str(error)) from error
        try:
            channel = XenChannel(self, handle, domid, remote_port)
        except BaseException:
            handle.close()
            raise
        self._channels.add(channel)
        return channel

    def forget_channel(self, channel: XenChannel) -> None:
        """Only `XenChannel.close` calls this."""
        self._channels.discard(channel)

    def _require_open(self) -> None:
        if self._handle is None:
            raise HypervisorLost("the connection to Xen is closed")

    def close(self) -> None:
        for mapping in tuple(self._mappings):
            mapping.unmap()
        for channel in tuple(self._channels):
            channel.close()
        handle, self._handle = self._handle, None
        if handle is not None:
            self._gnttab.xengnttab_close(handle)

    @property
    def mapped_pages(self) -> int:
        return self._mapped_pages

    @property
    def bound_ports(self) -> int:
        return len(self._channels)


class XenMapping(GrantMapping):
    """Pages that the grant device mapped for us."""

    __slots__ = ("_hypervisor", "_pointer", "address", "pages", "view")

    def __init__(
        self, hypervisor: XenHypervisor, pointer: Any, pages: int, *, writable: bool
    ) -> None:
        self._hypervisor: XenHypervisor | None = hypervisor
        self._pointer = pointer
        self.address = int(ffi.cast("uintptr_t", pointer))
        self.pages = pages
        view = memoryview(ffi.buffer(pointer, pages * PAGE_SIZE)).cast("B")
        self.view = view if writable else view.toreadonly()

    def unmap(self) -> None:
        hypervisor = self._hypervisor
        if hypervisor is not None:
            self.view.release()  # BufferError if somebody is at it: then nothing has happened
            self._hypervisor = None
            hypervisor.unmap(self, self._pointer)


class _EvtchnHandle:
    """A handle of libxenevtchn: closed once, never used afterwards."""

    def __init__(self, libraries: XenLibraries) -> None:
        """Raises `HypervisorUnavailable`."""
        self.library = libraries.evtchn
        self.pointer = self.library.xenevtchn_open(libraries.logger, 0)
        if self.pointer == ffi.NULL:
            raise _unavailable(_EVENT_DEVICE, ffi.errno)

    def close(self) -> None:
        self.library.xenevtchn_close(self.pointer)


class XenChannel(EventChannel):
    """A port of ours, bound to a guest's.

    Xen marks a new port pending, and masks a port that `take` has seen until `unmask`.
    """

    def __init__(
        self, hypervisor: XenHypervisor, handle: _EvtchnHandle, domid: Domid, remote_port: Port
    ) -> None:
        """Raises `PortFailed`; the handle is the caller's then."""
        self._hypervisor = hypervisor
        self._library = handle.library
        self._pointer = handle.pointer
        port = self._library.xenevtchn_bind_interdomain(self._pointer, domid, remote_port)
        if port < 0:
            why = os.strerror(ffi.errno)
            raise PortFailed(f"binding port {remote_port} of domain {domid} failed: {why}")
        self._handle: _EvtchnHandle | None = handle
        self.port = Port(port)
        self.fd = self._library.xenevtchn_fd(self._pointer)
        os.set_blocking(self.fd, False)

    def take(self) -> bool:
        if self._handle is None:
            return False
        if self._library.xenevtchn_pending(self._pointer) >= 0:
            return True
        if ffi.errno in (errno.EAGAIN, errno.EINTR):
            return False
        raise PortFailed(f"reading event channel {self.port} failed: {os.strerror(ffi.errno)}")

    def unmask(self) -> None:
        if self._handle is not None:
            self._library.xenevtchn_unmask(self._pointer, self.port)

    def notify(self) -> None:
        if self._handle is not None:
            self._library.xenevtchn_notify(self._pointer, self.port)

    def native(self) -> NativeChannel:
        library = self._library
        return NativeChannel(
            fd=self.fd,
            port=self.port,
            handle=_address(self._pointer),
            pending=_address(library.xenevtchn_pending),
            unmask=_address(library.xenevtchn_unmask),
            notify=_address(library.xenevtchn_notify),
        )

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is None:
            return
        if trio.lowlevel.in_trio_run():
            trio.lowlevel.notify_closing(self.fd)
        handle.close()  # which unbinds the port
        self._hypervisor.forget_channel(self)


def _address(pointer: Any) -> int:
    """Of memory or of a function."""
    return int(ffi.cast("uintptr_t", pointer))


def _crosses_page(op: CopyOp) -> bool:
    # The kernel would refuse the whole call for one of these, not just the one.
    return op.offset < 0 or op.offset + len(op.local) > PAGE_SIZE


def _fill(segment: Any, domid: Domid, op: CopyOp) -> Any:
    """Describe one copy; returns what keeps our memory in place."""
    buffer: Any
    if op.to_guest:
        buffer = ffi.from_buffer(op.local)
    else:
        buffer = ffi.from_buffer(op.local, require_writable=True)
    ours, theirs = (segment.source, segment.dest) if op.to_guest else (segment.dest, segment.source)
    ours.virt = ffi.cast("void *", buffer)
    theirs.foreign.ref = op.ref
    theirs.foreign.offset = op.offset
    theirs.foreign.domid = domid
    segment.len = len(op.local)
    segment.flags = GRANT_COPY_DEST_IS_REF if op.to_guest else GRANT_COPY_SOURCE_IS_REF
    return buffer


def _runs_on_xen() -> bool:
    """Whether this is a Xen domain (a Linux one: sysfs says so)."""
    try:
        return Path("/sys/hypervisor/type").read_text().strip() == "xen"
    except OSError:
        return False


def _unavailable(device: str, number: int) -> HypervisorUnavailable:
    if number in _NO_RIGHT:
        return HypervisorUnavailable(f"no permission to open {device}: run as root")
    if number not in _NO_XEN:
        return HypervisorUnavailable(f"cannot open {device}: {os.strerror(number)}")
    if _runs_on_xen():
        module = device.removeprefix("/dev/").replace("/", "-")
        return HypervisorUnavailable(f"{device} is missing: modprobe {module}")
    return HypervisorUnavailable(
        f"{device} is missing, as this machine does not run on Xen: boot it under Xen, "
        "or serve guests without Xen: xbd serve --embedded DIR"
    )
