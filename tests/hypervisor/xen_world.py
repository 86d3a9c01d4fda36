"""Xen itself as a world for the contract: this domain grants pages and offers ports to itself.

Needs a Xen dom0 (or driver domain) with xen-gntdev, xen-gntalloc and xen-evtchn; pages come from
/dev/xen/gntalloc, ports from EVTCHNOP_alloc_unbound with ourselves as the remote domain.
"""

from __future__ import annotations

import os

import cffi
import trio
from hypervisor_contract import DEADLINE, Pages, World, WorldPort

from xbd.core.hypervisor.xen import XenHypervisor
from xbd.core.units import PAGE_SIZE, Domid, GrantRef, Port

ffi = cffi.FFI()
ffi.cdef(
    """
    void *xengntshr_open(void *logger, unsigned open_flags);
    int xengntshr_close(void *xgs);
    void *xengntshr_share_pages(void *xgs, uint32_t domid, int count, uint32_t *refs,
                                int writable);
    int xengntshr_unshare(void *xgs, void *start_address, uint32_t count);
    void *xenevtchn_open(void *logger, unsigned open_flags);
    int xenevtchn_close(void *xce);
    int xenevtchn_fd(void *xce);
    int xenevtchn_notify(void *xce, uint32_t port);
    int xenevtchn_bind_unbound_port(void *xce, uint32_t domid);
    int xenevtchn_pending(void *xce);
    int xenevtchn_unmask(void *xce, uint32_t port);
    """
)


class XenPages(Pages):
    """Pages of /dev/xen/gntalloc."""

    def __init__(self, library, handle, count, domid, *, readonly):
        self._library = library
        self._handle = handle
        self._count = count
        refs = ffi.new("uint32_t[]", count)
        self._area = library.xengntshr_share_pages(handle, domid, count, refs, not readonly)
        if self._area == ffi.NULL:
            raise OSError(ffi.errno, f"sharing pages: {os.strerror(ffi.errno)}")
        self.refs = [GrantRef(ref) for ref in refs]
        self._view = memoryview(ffi.buffer(self._area, count * PAGE_SIZE)).cast("B")

    def page(self, index):
        return self._view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]

    def revoke(self):
        if self._area is not None:
            self._view.release()
            self._library.xengntshr_unshare(self._handle, self._area, self._count)
            self._area = None


class XenPort(WorldPort):
    """An unbound port of ours that we ourselves may bind."""

    def __init__(self, library, domid):
        self._library = library
        self._handle = library.xenevtchn_open(ffi.NULL, 0)
        if self._handle == ffi.NULL:
            raise OSError(ffi.errno, "opening /dev/xen/evtchn")
        port = library.xenevtchn_bind_unbound_port(self._handle, domid)
        if port < 0:
            raise OSError(ffi.errno, f"allocating a port: {os.strerror(ffi.errno)}")
        self.port = Port(port)
        self._fd = library.xenevtchn_fd(self._handle)
        os.set_blocking(self._fd, False)

    def notify(self):
        self._library.xenevtchn_notify(self._handle, self.port)

    async def wait(self):
        with trio.fail_after(DEADLINE):
            await trio.lowlevel.wait_readable(self._fd)
        assert self.take()

    def take(self):
        if self._library.xenevtchn_pending(self._handle) != self.port:
            return False
        self._library.xenevtchn_unmask(self._handle, self.port)
        return True

    def close(self):
        if self._handle is not None:
            self._library.xenevtchn_close(self._handle)
            self._handle = None


class XenWorld(World):
    """Both sides in one domain, whose number XBD_TEST_DOMID may give (0 is dom0)."""

    missing_guest = Domid(32000)

    def __init__(self):
        self.guest = Domid(int(os.environ.get("XBD_TEST_DOMID", "0")))
        self.hypervisor = XenHypervisor()
        self._gnttab = ffi.dlopen("libxengnttab.so.1")
        self._evtchn = ffi.dlopen("libxenevtchn.so.1")
        self._shares = self._gnttab.xengntshr_open(ffi.NULL, 0)
        if self._shares == ffi.NULL:
            raise OSError(ffi.errno, "opening /dev/xen/gntalloc (modprobe xen-gntalloc)")
        self._pages: list[XenPages] = []
        self._ports: list[XenPort] = []

    def grant(self, count, *, readonly=False):
        pages = XenPages(self._gnttab, self._shares, count, self.guest, readonly=readonly)
        self._pages.append(pages)
        return pages

    async def offer_port(self):
        port = XenPort(self._evtchn, self.guest)
        self._ports.append(port)
        return port

    def close(self):
        self.hypervisor.close()
        for pages in self._pages:
            pages.revoke()
        for port in self._ports:
            port.close()
        self._gnttab.xengntshr_close(self._shares)
