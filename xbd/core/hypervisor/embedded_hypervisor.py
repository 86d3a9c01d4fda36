"""Pages and ports of guests that are ordinary processes; `embedded` lets them in."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import attrs
import trio

from xbd.core.errors import GrantFailed, PortFailed
from xbd.core.hypervisor.base import (
    CopyOp,
    EventChannel,
    GrantMapping,
    Hypervisor,
    NativeChannel,
    NativeDomain,
)
from xbd.core.hypervisor.embedded_memory import GuestMemory, contiguous
from xbd.core.hypervisor.embedded_wire import BACKEND_DOMID, WireError
from xbd.core.hypervisor.gntst import GrantStatus
from xbd.core.units import PAGE_SIZE, Domid, GrantRef, Port

_ONE_EVENT = (1).to_bytes(8, "little")


@attrs.frozen
class Limits:
    """What a guest may take of the host."""

    guests: int = 64
    pages: int = 1 << 18
    """Pages of memory per guest (1 GiB)."""
    ports: int = 128
    """Ports offered at a time, per guest."""
    scattered_pages: int = 8192
    """Pages per guest in mappings that had to be pieced together; each may cost the kernel one
    of the process's vm.max_map_count areas (65530)."""
    scattered_pages_of_all: int = 32768


@attrs.define(eq=False)
class OfferedPort:
    """A guest's port: two eventfds that this object owns."""

    port: Port
    remote: Domid
    to_backend: int
    to_guest: int
    bound: bool = False

    def close(self) -> None:
        os.close(self.to_backend)
        os.close(self.to_guest)


@attrs.define(eq=False)
class EmbeddedGuest:
    """One connected guest."""

    domid: Domid
    memory: GuestMemory
    ports: dict[Port, OfferedPort] = attrs.Factory(dict)
    scattered_pages: int = 0

    def close(self) -> None:
        """The guest is gone; what is mapped or bound stays usable until it is given back."""
        self.memory.close()
        for port in self.ports.values():
            port.close()
        self.ports.clear()


def require_eventfd(fd: int) -> None:
    """Accept only an eventfd that one read empties; make it non-blocking.  Raises `WireError`."""
    if str(Path(f"/proc/self/fd/{fd}").readlink()) != "anon_inode:[eventfd]":
        raise WireError(errno.EINVAL, "a port needs two eventfds")
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    if "eventfd-semaphore: 1" in info:
        raise WireError(errno.EINVAL, "a port's eventfds must not have EFD_SEMAPHORE")
    os.set_blocking(fd, False)


class EmbeddedHypervisor(Hypervisor):
    """The guests connected just now.  Made by `EmbeddedHost`."""

    name = "embedded"
    can_copy = True
    can_map = True

    def __init__(self, limits: Limits | None = None) -> None:
        self.guests: dict[Domid, EmbeddedGuest] = {}
        self.limits = limits or Limits()
        self._mappings: set[EmbeddedMapping] = set()
        self._channels: set[EmbeddedChannel] = set()
        self._mapped_pages = 0
        self._scattered_pages = 0
        self._next_port = 1

    def map_grants(self, domid: Domid, refs: Sequence[GrantRef], *, writable: bool) -> GrantMapping:
        if not refs:
            raise ValueError("no pages to map")
        guest = self.guests.get(domid)
        if guest is None:
            raise GrantFailed(f"domain {domid} is not connected to the embedded host")
        refused = guest.memory.first_refused(refs, writable=writable)
        if refused is not None:
            how = "for writing" if writable else "for reading"
            raise GrantFailed(f"domain {domid} does not grant us page {refused} {how}")
        if contiguous(refs):
            view, address = guest.memory.run(refs[0], len(refs), writable=writable)
            mapping = EmbeddedMapping(self, guest, view, address, len(refs), scattered=False)
        else:
            mapping = self._map_scattered(guest, refs, writable=writable)
        self._mappings.add(mapping)
        self._mapped_pages += len(refs)
        return mapping

    def _map_scattered(
        self, guest: EmbeddedGuest, refs: Sequence[GrantRef], *, writable: bool
    ) -> EmbeddedMapping:
        pages = len(refs)
        if guest.scattered_pages + pages > self.limits.scattered_pages:
            raise GrantFailed(f"domain {guest.domid} has too many scattered pages mapped")
        if self._scattered_pages + pages > self.limits.scattered_pages_of_all:
            raise GrantFailed("the embedded host has too many scattered pages mapped")
        try:
            view, address = guest.memory.scattered(refs, writable=writable)
        except OSError as error:
            raise GrantFailed(
                f"mapping {pages} pages of domain {guest.domid} failed: {error.strerror}"
            ) from error
        guest.scattered_pages += pages
        self._scattered_pages += pages
        return EmbeddedMapping(self, guest, view, address, pages, scattered=True)

    def forget_mapping(self, mapping: EmbeddedMapping) -> None:
        """Account for an unmapped mapping; only `EmbeddedMapping.unmap` calls it."""
        self._mappings.discard(mapping)
        self._mapped_pages -= mapping.pages
        if mapping.scattered:
            mapping.guest.scattered_pages -= mapping.pages
            self._scattered_pages -= mapping.pages

    def copy_grants(self, domid: Domid, ops: Sequence[CopyOp]) -> list[int]:
        guest = self.guests.get(domid)
        if guest is None:
            return [GrantStatus.BAD_DOMAIN] * len(ops)
        return [_copy(guest.memory, op) for op in ops]

    def native_domain(self, domid: Domid) -> NativeDomain:
        guest = self.guests.get(domid)
        if guest is None:
            raise GrantFailed(f"domain {domid} is not connected to the embedded host")
        return guest.memory.native()

    def bind_interdomain(self, domid: Domid, remote_port: Port) -> EventChannel:
        guest = self.guests.get(domid)
        if guest is None:
            raise PortFailed(f"domain {domid} is not connected to the embedded host")
        offered = guest.ports.get(remote_port)
        if offered is None or offered.remote != BACKEND_DOMID:
            raise PortFailed(f"domain {domid} has not offered port {remote_port} to us")
        if offered.bound:
            raise PortFailed(f"port {remote_port} of domain {domid} is bound already")
        try:
            channel = EmbeddedChannel(self, Port(self._next_port), offered)
        except OSError as error:
            raise PortFailed(
                f"binding port {remote_port} of domain {domid} failed: {error.strerror}"
            ) from error
        self._next_port += 1
        self._channels.add(channel)
        return channel

    def forget_channel(self, channel: EmbeddedChannel) -> None:
        """Account for a closed channel; only `EmbeddedChannel.close` calls it."""
        self._channels.discard(channel)

    def close(self) -> None:
        for mapping in tuple(self._mappings):
            mapping.unmap()
        for channel in tuple(self._channels):
            channel.close()

    @property
    def mapped_pages(self) -> int:
        return self._mapped_pages

    @property
    def bound_ports(self) -> int:
        return len(self._channels)


class EmbeddedMapping(GrantMapping):
    """Pages of a guest's memfd in this process."""

    __slots__ = ("_hypervisor", "address", "guest", "pages", "scattered", "view")

    def __init__(
        self,
        hypervisor: EmbeddedHypervisor,
        guest: EmbeddedGuest,
        view: memoryview,
        address: int,
        pages: int,
        *,
        scattered: bool,
    ) -> None:
        self._hypervisor: EmbeddedHypervisor | None = hypervisor
        self.guest = guest
        self.view = view
        self.address = address
        self.pages = pages
        self.scattered = scattered

    def unmap(self) -> None:
        hypervisor = self._hypervisor
        if hypervisor is not None:
            self.view.release()  # BufferError if somebody is at it: then nothing has happened
            self._hypervisor = None
            hypervisor.forget_mapping(self)


class EmbeddedChannel(EventChannel):
    """Our end of a guest's pair of eventfds."""

    def __init__(self, hypervisor: EmbeddedHypervisor, port: Port, offered: OfferedPort) -> None:
        self.port = port
        self.fd = os.dup(offered.to_backend)
        try:
            self.notify_fd = os.dup(offered.to_guest)
            """Written to by `notify`: eight bytes, the number 1."""
        except OSError:
            os.close(self.fd)
            raise
        self._hypervisor = hypervisor
        self._offered: OfferedPort | None = offered
        offered.bound = True
        _signal(self.fd)

    def take(self) -> bool:
        if self._offered is None:
            return False
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            return False
        return True

    def unmask(self) -> None:
        """An eventfd counts on while nobody reads it: nothing is ever masked."""

    def notify(self) -> None:
        if self._offered is not None:
            _signal(self.notify_fd)

    def native(self) -> NativeChannel:
        return NativeChannel(fd=self.fd, notify_fd=self.notify_fd, port=self.port)

    def close(self) -> None:
        offered, self._offered = self._offered, None
        if offered is None:
            return
        offered.bound = False
        if trio.lowlevel.in_trio_run():
            trio.lowlevel.notify_closing(self.fd)
        os.close(self.fd)
        os.close(self.notify_fd)
        self._hypervisor.forget_channel(self)


def _signal(fd: int) -> None:
    try:
        os.write(fd, _ONE_EVENT)
    except BlockingIOError:
        return  # the counter is full: an event is pending there in any case


def _copy(memory: GuestMemory, op: CopyOp) -> GrantStatus:
    length = len(op.local)
    if op.offset < 0 or op.offset + length > PAGE_SIZE:
        return GrantStatus.BAD_COPY_ARG
    status = memory.check(op.ref, writable=op.to_guest)
    if status is not GrantStatus.OKAY:
        return status
    page, _ = memory.run(op.ref, 1, writable=op.to_guest)
    if op.to_guest:
        page[op.offset : op.offset + length] = op.local
    else:
        op.local[:] = page[op.offset : op.offset + length]
    return GrantStatus.OKAY
