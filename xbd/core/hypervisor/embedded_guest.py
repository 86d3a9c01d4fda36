"""A guest of the embedded host: memory, grants and ports, in any process.

It outlives the daemon: when the connection ends, the guest keeps everything, connects again and
hands the same memory and ports over once more.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import mmap
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import trio

from xbd.core.errors import HypervisorLost, HypervisorUnavailable, PortFailed
from xbd.core.hypervisor.embedded_wire import (
    GRANT_ENTRY_SIZE,
    REPLY_SIZE,
    Hello,
    Offer,
    Reply,
    Withdraw,
    decode_reply,
    grant_entry,
    socket_path,
)
from xbd.core.units import PAGE_SIZE, Domid, GrantRef, Port

_ONE_EVENT: Final = (1).to_bytes(8, "little")
_FIRST_RETRY_SECONDS: Final = 0.02
_LAST_RETRY_SECONDS: Final = 0.5
_Request = Hello | Offer | Withdraw


def _sealed_memfd(name: str, size: int) -> int:
    """Memory that can't shrink any more, as the host demands."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


class GuestPort:
    """One of the guest's event channels.  `port` is the number to publish."""

    def __init__(self, port: Port, remote: Domid, on_close: Callable[[GuestPort], None]) -> None:
        self.port = port
        self.remote = remote
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable while an event from the backend is pending."""
        self.backend_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._on_close: Callable[[GuestPort], None] | None = on_close

    def take(self) -> bool:
        """Consume a pending event without blocking; False if there was none."""
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            return False
        return True

    def notify(self) -> None:
        """Send the backend an event, whether or not one listens."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.backend_fd, _ONE_EVENT)

    def close(self) -> None:
        """Withdraw the port.  Idempotent."""
        on_close, self._on_close = self._on_close, None
        if on_close is None:
            return
        on_close(self)
        trio.lowlevel.notify_closing(self.fd)
        os.close(self.fd)
        os.close(self.backend_fd)


@attrs.define(eq=False)
class _Call:
    answered: trio.Event = attrs.Factory(trio.Event)
    reply: Reply | None = None


class _Link:
    """One connection to a host, as long as it lasts."""

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self._connection = connection
        self._calls: dict[int, _Call] = {}
        self._next_id = 1  # 0 is for requests whose answers nobody awaits
        self._ended = False

    async def ask(self, request: _Request, *fds: int) -> Reply:
        """Send a request and receive its answer, before `run`.  Raises OSError."""
        await self._send(request, 0, fds)
        packet = await self._connection.recv(REPLY_SIZE + 1)
        if not packet:
            raise ConnectionResetError(errno.ECONNRESET, "the host closed the connection")
        return decode_reply(packet)

    async def call(self, request: _Request, *fds: int) -> Reply | None:
        """Send a request and wait for `run` to see its answer; None if the connection ended."""
        ident = self._next_id
        self._next_id = ident % 0xFFFFFFFF + 1
        call = self._calls[ident] = _Call()
        try:
            if self._ended:
                return None
            with contextlib.suppress(OSError):  # run() sees the end of the connection
                await self._send(request, ident, fds)
            await call.answered.wait()
            return call.reply
        finally:
            del self._calls[ident]

    async def _send(self, request: _Request, ident: int, fds: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        await self._connection.sendmsg([attrs.evolve(request, id=ident).encode()], rights)

    def post(self, request: _Request) -> bool:
        """Send a request at once, so ahead of all later ones; False if that is not possible."""
        try:
            os.write(self._connection.fileno(), request.encode())  # trio's sockets never block
        except BlockingIOError:
            return False
        except OSError:
            return True  # the connection ended, and our ports with it
        return True

    async def run(self) -> None:
        """Hand out the answers until the connection ends, and close it."""
        try:
            with contextlib.suppress(OSError), self._connection:
                while packet := await self._connection.recv(REPLY_SIZE + 1):
                    reply = decode_reply(packet)
                    call = self._calls.get(reply.id)
                    if call is not None:
                        call.reply = reply
                        call.answered.set()
        finally:
            self._ended = True
            for call in self._calls.values():
                call.answered.set()


class _Refused(Exception):
    """The host answered with an errno."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.errno = reply.errno


class GuestDomain:
    """This process as a guest.  Make it with `connect`."""

    def __init__(self, directory: Path, domid: Domid | None, pages: int) -> None:
        """Use `GuestDomain.connect`."""
        self._directory = directory
        self._wanted_domid = domid
        self._pages = pages
        self._fds = contextlib.ExitStack()
        self._ram_fd = self._memfd("xbd-guest-memory", pages * PAGE_SIZE)
        self._table_fd = self._memfd("xbd-guest-grants", pages * GRANT_ENTRY_SIZE)
        self.memory = memoryview(mmap.mmap(self._ram_fd, pages * PAGE_SIZE))
        """All of the guest's memory."""
        table = mmap.mmap(self._table_fd, pages * GRANT_ENTRY_SIZE)
        self._table = memoryview(table).cast("Q")
        # Page 0 stays unused: a reference of 0 is more often a mistake than a page.
        self._free_pages = list(range(pages - 1, 0, -1))
        self._ports: dict[Port, GuestPort] = {}
        self._next_port = 1
        self._link: _Link | None = None
        self._link_changed = trio.Event()
        self._nursery: trio.Nursery | None = None

    def _memfd(self, name: str, size: int) -> int:
        fd = _sealed_memfd(name, size)
        self._fds.callback(os.close, fd)
        return fd

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        directory: Path,
        domid: Domid | None = None,
        *,
        pages: int = 4096,
        reconnect: bool = True,
    ) -> AsyncIterator[GuestDomain]:
        """Be a guest of the host in `directory` with `pages` pages of memory (page 0 unused).

        With `reconnect` the guest waits for a host that went away and carries on with the next;
        without, `HypervisorLost` ends the block.  Raises `HypervisorUnavailable` if there is no
        host, or it refuses the guest.
        """
        guest = cls(directory, domid, pages)
        try:
            link = await guest._first_join()
            async with trio.open_nursery() as nursery:
                guest._nursery = nursery
                nursery.start_soon(guest._keep_connected, link, reconnect)
                try:
                    yield guest
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            guest._close()

    def _close(self) -> None:
        self._link = None
        for port in tuple(self._ports.values()):
            port.close()
        self._fds.close()
        self._table.release()
        self.memory.release()

    @property
    def domid(self) -> Domid:
        """Who we are; fixed by the first host."""
        assert self._wanted_domid is not None
        return self._wanted_domid

    @property
    def connected(self) -> bool:
        """Whether a host has our memory and all our ports just now."""
        return self._link is not None

    async def wait_connected(self) -> None:
        """Return when a host has our memory and all our ports."""
        while self._link is None:
            await self._link_changed.wait()

    def page(self, ref: GrantRef) -> memoryview:
        """The bytes of one page."""
        return self.memory[ref * PAGE_SIZE : (ref + 1) * PAGE_SIZE]

    def alloc_pages(self, count: int) -> list[GrantRef]:
        """Take pages that are free, neighbours if possible; their old bytes are still in them.

        Raises MemoryError.
        """
        if count > len(self._free_pages):
            raise MemoryError(f"{len(self._free_pages)} pages are free, {count} are needed")
        return [GrantRef(self._free_pages.pop()) for _ in range(count)]

    def free_pages(self, refs: list[GrantRef]) -> None:
        """Give pages back; they must not be granted any more."""
        self._free_pages.extend(reversed(refs))

    def grant(self, ref: GrantRef, to: Domid, *, readonly: bool = False) -> None:
        """Let a domain map or copy this page."""
        self._table[ref] = grant_entry(to, readonly=readonly)

    def revoke(self, ref: GrantRef) -> None:
        """Let nobody map or copy this page from now on.

        What is mapped stays mapped: do it when the backend has answered, or closed.
        """
        self._table[ref] = 0

    async def alloc_port(self, remote: Domid) -> GuestPort:
        """A new port that `remote` may bind.  Raises `PortFailed`."""
        port = GuestPort(Port(self._next_port), remote, self._withdraw)
        self._next_port += 1
        try:
            await self._offer(port)
        except BaseException:
            port.close()
            raise
        self._ports[port.port] = port
        return port

    async def _offer(self, port: GuestPort) -> None:
        request = Offer(0, port.port, port.remote)
        reply = None
        while reply is None:  # the link broke: the next one has not heard of the port either
            await self.wait_connected()
            link = self._link
            if link is not None:
                reply = await link.call(request, port.backend_fd, port.fd)
        if reply.errno:
            raise PortFailed(f"the embedded host refuses the port: {reply.text}")

    def _withdraw(self, port: GuestPort) -> None:
        known = self._ports.pop(port.port, None)
        link = self._link
        if known is None or link is None or link.post(Withdraw(0, port.port)):
            return
        assert self._nursery is not None
        self._nursery.start_soon(link.call, Withdraw(0, port.port))

    async def _keep_connected(self, link: _Link, reconnect: bool) -> None:
        while True:
            try:
                await link.run()
            finally:
                self._change_link(None)
            if not reconnect:
                raise HypervisorLost(f"the embedded host in {self._directory} has gone")
            link = await self._rejoin()

    async def _first_join(self) -> _Link:
        try:
            return await self._join()
        except OSError as error:
            raise HypervisorUnavailable(
                f"no embedded host answers in {self._directory}: {error.strerror or error}"
            ) from error
        except _Refused as error:
            raise HypervisorUnavailable(f"the embedded host refuses: {error}") from error

    async def _rejoin(self) -> _Link:
        """Wait for a host.  Raises `HypervisorLost` if it does not want us."""
        delay = _FIRST_RETRY_SECONDS
        while True:
            await trio.sleep(delay)
            delay = min(2 * delay, _LAST_RETRY_SECONDS)
            try:
                return await self._join()
            except OSError:
                continue
            except _Refused as error:
                if error.errno != errno.EBUSY:
                    raise HypervisorLost(f"the embedded host refuses: {error}") from error
                # It has not noticed yet that our last connection ended.

    async def _join(self) -> _Link:
        """Connect and hand everything over.  Raises OSError and `_Refused`."""
        connection = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            await connection.connect(str(socket_path(self._directory)))
            link = _Link(connection)
            hello = Hello(0, self._wanted_domid, self._pages)
            reply = _accepted(await link.ask(hello, self._ram_fd, self._table_fd))
            self._wanted_domid = reply.domid
            await self._offer_all(link)
        except BaseException:
            connection.close()
            raise
        self._change_link(link)
        return link

    async def _offer_all(self, link: _Link) -> None:
        """Offer the ports we have, though they may come and go meanwhile."""
        offered: set[Port] = set()
        while difference := offered ^ self._ports.keys():
            number = difference.pop()
            port = self._ports.get(number)
            if port is None:
                _accepted(await link.ask(Withdraw(0, number)))
            else:
                _accepted(await link.ask(Offer(0, number, port.remote), port.backend_fd, port.fd))
            offered ^= {number}

    def _change_link(self, link: _Link | None) -> None:
        self._link = link
        self._link_changed.set()
        self._link_changed = trio.Event()


def _accepted(reply: Reply) -> Reply:
    if reply.errno:
        raise _Refused(reply)
    return reply
