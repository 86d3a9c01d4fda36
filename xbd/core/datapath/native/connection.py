"""One frontend's connection, served by I/O threads in C."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any, Final

import structlog
import trio

from xbd.core.blkif import Decoder, Limits
from xbd.core.blkif.abi import X86_32, entries
from xbd.core.datapath.config import FrontendConfig, GrantMode
from xbd.core.datapath.connection import OpenedRing, Parts, open_ring
from xbd.core.datapath.engine import CLOSE_SECONDS
from xbd.core.datapath.journal import JournalMemory
from xbd.core.datapath.native import ffi, lib
from xbd.core.datapath.native.extents import NativeExtents
from xbd.core.datapath.native.threads import Budget, NativeThreads
from xbd.core.datapath.native.upcalls import Upcalls
from xbd.core.datapath.pages import choose_mode
from xbd.core.datapath.undo import Undo
from xbd.core.errors import BoundaryError, XbdError
from xbd.core.hypervisor import EventChannel

_log = structlog.get_logger()

_MODES: Final = {
    GrantMode.PERSISTENT: "XBD_PERSISTENT",
    GrantMode.MAP: "XBD_MAP",
    GrantMode.COPY: "XBD_COPY",
}
_abandoned: set[NativeConnection] = set()
"""What the kernel or a thread still uses."""


class NativeConnection:
    """Serves all rings of one frontend until it is closed; as `Connection`."""

    def __init__(
        self, parts: Parts, frontend: FrontendConfig, threads: NativeThreads, extents: NativeExtents
    ) -> None:
        self.frontend = frontend
        self._parts = parts
        self._threads = threads
        self._extents = extents
        self._budget: Budget = threads.budget_of(frontend.domid)
        self._undo = Undo()
        self.abandoned = False
        """Whether it has ended, and storage not finished what it was asked for."""
        self._closing = False
        self._nursery: trio.Nursery | None = None
        self._released = trio.Event()
        self._handle: Any = None
        self._upcalls: Upcalls | None = None
        self._journals: list[JournalMemory] = []
        self._counted: tuple[int, ...] = ()
        self.mode = choose_mode(
            parts.grants,
            parts.hypervisor,
            persistent=frontend.persistent and parts.offer_persistent,
        )

    async def run(self) -> None:
        """Serve; gives everything back on the way out.

        Raises `RingCorrupt` or what a driver raises to have its device closed.
        """
        upcalls = self._upcalls
        assert upcalls is not None, "it was not opened"
        try:
            async with trio.open_nursery() as self._nursery:
                if self._closing:
                    self._nursery.cancel_scope.cancel()
                upcalls.nursery = self._nursery
                await upcalls.run()
        finally:
            await self._end(upcalls)

    # -- beginning --------------------------------------------------------------------------

    def open(self) -> None:
        """Map and bind.  Raises `GrantFailed` or `PortFailed`; nothing is left over then."""
        try:
            self._upcalls = self._open()
        except BaseException:
            self._let_go(stopped=True)
            raise
        for journal in self._journals:
            journal.untouched = False
        # Before anybody can want to drain it: that would mean nothing yet.
        lib.xbd_connection_start(self._handle)

    def _open(self) -> Upcalls:
        parts, frontend = self._parts, self.frontend
        domain = parts.hypervisor.native_domain(frontend.domid)
        if domain is None:
            raise BoundaryError(f"there is no native data path on {parts.hypervisor.name}")
        self._undo.later(domain.close)
        geometry = parts.access.geometry
        config = ffi.new(
            "struct xbd_connection_config *",
            {
                "threads": self._threads.handle,
                "extents": self._extents.handle,
                "claims": self._extents.claims.handle,
                "budget": self._budget.handle,
                "domain": {
                    "domid": frontend.domid,
                    "mode": getattr(lib, _MODES[self.mode]),
                    "writable": _pointer(domain.writable),
                    "readable": _pointer(domain.readable),
                    "table": _pointer(domain.table),
                    "nr_pages": domain.pages,
                    "granted": domain.granted,
                    "granted_readonly": domain.granted_readonly,
                    "gnttab": _pointer(domain.handle),
                    "map": _pointer(domain.map),
                    "unmap": _pointer(domain.unmap),
                    "copy": _pointer(domain.copy),
                },
                "limits": _limits(parts.limits),
                "request_alignment": geometry.request_alignment,
                "memory_alignment": geometry.memory_alignment,
                "abi": 1 if frontend.abi is X86_32 else 0,
                "paused": parts.paused,
            },
        )
        self._handle = lib.xbd_connection_new(config)
        if self._handle == ffi.NULL:
            raise MemoryError
        for number in range(len(frontend.queues)):
            self._add_ring(open_ring(parts, frontend, number, self._undo, JournalMemory))
        return Upcalls(
            name=parts.name,
            handle=self._handle,
            access=parts.access,
            extents=self._extents,
            decoder=Decoder(frontend.abi, parts.limits),
            entries=entries(frontend.ring_order),
            stats=parts.stats,
            events=self._threads.events,
        )

    def _add_ring(self, opened: OpenedRing[JournalMemory]) -> None:
        ring = opened.ring
        self._journals.append(opened.journal)
        marks, indices, copies = opened.journal.arrays
        with marks, indices, copies:
            config = ffi.new(
                "struct xbd_ring_config *",
                {
                    "ring": _pointer(opened.address),
                    "entries": ring.entries,
                    "channel": _channel(opened.channel),
                    "marks": ffi.from_buffer("uint64_t[]", marks),
                    "indices": ffi.from_buffer("uint32_t[]", indices),
                    "copies": ffi.from_buffer("uint8_t[]", copies),
                    "req_cons": ring.req_cons,
                    "rsp_prod": ring.rsp_prod_pvt,
                    "owed": len(opened.debt.requests),
                },
            )
        if not lib.xbd_connection_add_ring(self._handle, config):
            raise MemoryError

    # -- ending -----------------------------------------------------------------------------

    async def _end(self, upcalls: Upcalls) -> None:
        """No task of ours runs any more; let the threads finish what the kernel works on."""
        try:
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                upcalls.stop()
                await upcalls.finish()
            upcalls.release_waiting()
            self.refresh()
        finally:
            self._let_go(stopped=upcalls.stopped)

    def _let_go(self, *, stopped: bool) -> None:
        handle, self._handle = self._handle, None
        with ExitStack() as stack:  # whatever fails on the way, nobody waits for ever
            stack.callback(self._released.set)
            if not stopped:
                self.abandoned = True
                _log.error(
                    "storage does not answer; its memory stays mapped", device=self._parts.name
                )
                for journal in self._journals:
                    stack.callback(journal.disown)
                _abandoned.add(self)
                self._threads.abandon()
                trio.lowlevel.spawn_system_task(self._let_go_late, handle)
                return
            stack.callback(self._undo.close)
            if handle is not None:
                stack.callback(lib.xbd_connection_free, handle)

    async def _let_go_late(self, handle: Any) -> None:
        """When storage answers after all, however long that takes."""
        assert self._upcalls is not None
        await self._upcalls.finish()
        _log.warning("storage has answered; its memory is given back", device=self._parts.name)
        with suppress(XbdError, OSError):  # this task must not fail, and nobody is here to be told
            lib.xbd_connection_free(handle)
            self._undo.close()
        self._threads.take_back()
        _abandoned.remove(self)

    # -- meanwhile --------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests consumed and not answered."""
        return 0 if self._handle is None else int(lib.xbd_connection_in_flight(self._handle))

    def refresh(self) -> None:
        """Add what the threads have counted since the last time to the disk's statistics."""
        if self._handle is None:
            return
        now = ffi.new("struct xbd_counters *")
        lib.xbd_connection_counters(self._handle, now)
        names = ("rd_req", "wr_req", "f_req", "ds_req", "rd_bytes", "wr_bytes", "errors")
        counted = tuple(getattr(now, name) for name in names)
        before = self._counted or (0,) * len(names)
        stats = self._parts.stats
        for name, new, old in zip(names, counted, before, strict=True):
            setattr(stats, name, getattr(stats, name) + new - old)
        self._counted = counted

    def set_limits(self, limits: Limits) -> None:
        """The disk's size changed: requests that come from now on are judged by the new one."""
        if self._handle is not None and self._upcalls is not None:
            self._upcalls.decoder.limits = limits
            lib.xbd_connection_set_limits(
                self._handle, ffi.new("struct xbd_limits *", _limits(limits))
            )

    async def settled(self, offset: int, length: int) -> None:
        """Wait until no transfer that is in flight now touches the range any more."""
        if self._handle is not None and self._upcalls is not None:
            await self._upcalls.settle(offset, length)

    async def drain(self) -> None:
        """Take no more requests; return when all that were taken are answered."""
        if self._handle is not None and self._upcalls is not None:
            await self._upcalls.drain()

    def resume(self) -> None:
        """Take requests again after `drain`, or for the first time."""
        if self._handle is not None:
            lib.xbd_connection_resume(self._handle)

    async def aclose(self) -> None:
        """Stop, unmap, unbind.  Requests in flight are abandoned: `drain` first."""
        self._closing = True
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await self._released.wait()

    def describe(self) -> str:
        """For ``xbd list``: data path, engine and how pages are reached."""
        return f"native, {self._threads.engine}, {self.mode.value}"


def _pointer(address: int) -> Any:
    return ffi.cast("void *", address)


def _limits(limits: Limits) -> dict[str, Any]:
    return {
        "size": limits.size,
        "logical_block": limits.logical_block,
        "max_indirect_segments": limits.max_indirect_segments,
        "read_only": limits.read_only,
        "flush": limits.flush,
        "barrier": limits.barrier,
        "discard": limits.discard,
        "discard_secure": limits.discard_secure,
    }


def _channel(channel: EventChannel) -> dict[str, Any]:
    native = channel.native()
    if native is None:
        raise BoundaryError("this event channel is not for native code")
    return {
        "fd": native.fd,
        "notify_fd": native.notify_fd,
        "port": native.port,
        "handle": _pointer(native.handle),
        "pending": _pointer(native.pending),
        "unmask": _pointer(native.unmask),
        "notify": _pointer(native.notify),
    }
