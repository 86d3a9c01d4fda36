"""libxengnttab and libxenevtchn through cffi, by the names every Xen dom0 has them under.

ABI mode: nothing is compiled, and the same declarations serve Linux, NetBSD and FreeBSD.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import cffi

from xbd.core.errors import HypervisorUnavailable

GRANT_COPY_SOURCE_IS_REF: Final = 1  # GNTCOPY_source_gref
GRANT_COPY_DEST_IS_REF: Final = 2  # GNTCOPY_dest_gref
_ABOVE_CRITICAL: Final = 10  # one more than XTL_CRITICAL, the highest level

ffi: Final = cffi.FFI()
ffi.cdef(
    """
    typedef struct xentoollog_logger xentoollog_logger;
    xentoollog_logger *xtl_createlogger_stdiostream(void *file, int min_level, unsigned flags);
    void *fopen(const char *path, const char *mode);

    typedef struct xengntdev_handle xengnttab_handle;
    typedef struct {
        union {
            void *virt;
            struct { uint32_t ref; uint16_t offset; uint16_t domid; } foreign;
        } source, dest;
        uint16_t len;
        uint16_t flags;
        int16_t status;
    } xengnttab_grant_copy_segment_t;
    xengnttab_handle *xengnttab_open(xentoollog_logger *logger, unsigned open_flags);
    int xengnttab_close(xengnttab_handle *xgt);
    void *xengnttab_map_domain_grant_refs(xengnttab_handle *xgt, uint32_t count, uint32_t domid,
                                          uint32_t *refs, int prot);
    int xengnttab_unmap(xengnttab_handle *xgt, void *start_address, uint32_t count);
    int xengnttab_grant_copy(xengnttab_handle *xgt, uint32_t count,
                             xengnttab_grant_copy_segment_t *segs);

    typedef struct xenevtchn_handle xenevtchn_handle;
    xenevtchn_handle *xenevtchn_open(xentoollog_logger *logger, unsigned open_flags);
    int xenevtchn_close(xenevtchn_handle *xce);
    int xenevtchn_fd(xenevtchn_handle *xce);
    int xenevtchn_notify(xenevtchn_handle *xce, uint32_t port);
    int xenevtchn_bind_interdomain(xenevtchn_handle *xce, uint32_t domid, uint32_t remote_port);
    int xenevtchn_unbind(xenevtchn_handle *xce, uint32_t port);
    int xenevtchn_pending(xenevtchn_handle *xce);
    int xenevtchn_unmask(xenevtchn_handle *xce, uint32_t port);
    """
)


def _open_library(soname: str) -> Any:
    try:
        return ffi.dlopen(soname)
    except OSError:
        package = soname.removesuffix(".so.1") + "1"
        hint = f" (on Debian: apt install {package})" if sys.platform == "linux" else ""
        raise HypervisorUnavailable(
            f"{soname} is missing: install Xen's libraries{hint}, "
            "or serve guests without Xen: xbd serve --embedded DIR"
        ) from None


class XenLibraries:
    """The two libraries, opened, and a logger that keeps standard error for us.

    Without one of its own, each library would write a line there for every failed mapping,
    as often as a guest likes.  The errno says it all.
    """

    def __init__(self) -> None:
        """Raises `HypervisorUnavailable` if a library is missing."""
        self.gnttab = _open_library("libxengnttab.so.1")
        self.evtchn = _open_library("libxenevtchn.so.1")
        toollog = _open_library("libxentoollog.so.1")
        libc: Any = ffi.dlopen(None)
        nowhere = libc.fopen(b"/dev/null", b"we")
        self.logger = toollog.xtl_createlogger_stdiostream(nowhere, _ABOVE_CRITICAL, 0)
