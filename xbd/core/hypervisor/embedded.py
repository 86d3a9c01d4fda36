"""The embedded host: lets processes be guests, on DIR/hypervisor.socket (docs/embedded.md)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import structlog
import trio

from xbd.core.errors import ConfigError, HypervisorUnavailable
from xbd.core.hypervisor.embedded_hypervisor import (
    EmbeddedChannel,
    EmbeddedGuest,
    EmbeddedHypervisor,
    EmbeddedMapping,
    Limits,
)
from xbd.core.hypervisor.embedded_memory import GuestMemory
from xbd.core.hypervisor.embedded_session import GuestLog, Session
from xbd.core.hypervisor.embedded_wire import (
    FIRST_RESERVED_DOMID,
    Hello,
    WireError,
    socket_path,
)
from xbd.core.units import PAGE_SIZE, Domid

__all__ = [
    "EmbeddedChannel",
    "EmbeddedGuest",
    "EmbeddedHost",
    "EmbeddedHypervisor",
    "EmbeddedMapping",
    "Limits",
]

_LOCK_NAME: Final = "hypervisor.lock"
_LAST_DOMID_NAME: Final = "last-domid"
_SHORT_OF: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_HELLO_SECONDS: Final = 10.0
_STRANGERS: Final = 16  # connections that have not said HELLO yet, or are being refused
_RETRY_SECONDS: Final = 0.1

_log = structlog.get_logger(__name__)
GuestCallback = Callable[[Domid], None]


class EmbeddedHost:
    """Listens for guests.  `hypervisor` is what a backend uses."""

    def __init__(self, directory: Path, listener: trio.socket.SocketType, limits: Limits) -> None:
        """Use `EmbeddedHost.open`."""
        self.directory = directory
        self.hypervisor = EmbeddedHypervisor(limits)
        self.on_guest_found: GuestCallback | None = None
        """Called when a guest has connected, before it can offer ports."""
        self.on_guest_lost: GuestCallback | None = None
        """Called when a guest's connection has ended: its domain is gone."""
        self._listener = listener
        self._connections = 0
        self._last_domid = _read_last_domid(directory)
        self._log = GuestLog()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        directory: Path,
        *,
        limits: Limits | None = None,
        on_guest_found: GuestCallback | None = None,
        on_guest_lost: GuestCallback | None = None,
    ) -> AsyncIterator[EmbeddedHost]:
        """Serve guests in `directory` (made with mode 0700 if missing) while the block runs.

        Raises `ConfigError` if the directory can't be used or another process serves it, and
        `HypervisorUnavailable` where there is no memfd.
        """
        _require_platform()
        with _own(directory) as path:
            listener = await _listen(path)
            with listener:
                host = cls(directory, listener, limits or Limits())
                host.on_guest_found = on_guest_found
                host.on_guest_lost = on_guest_lost
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(host._accept_all, nursery)
                    try:
                        yield host
                    finally:
                        nursery.cancel_scope.cancel()
                        host.hypervisor.close()

    async def _accept_all(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                connection, _ = await self._listener.accept()
            except OSError as error:
                if error.errno not in _SHORT_OF:
                    raise
                self._log.warning("cannot accept a guest", error=error.strerror)
                await trio.sleep(_RETRY_SECONDS)
                continue
            if self._connections >= self.hypervisor.limits.guests + _STRANGERS:
                connection.close()
                self._log.warning("too many connections to the embedded host")
                continue
            self._connections += 1
            nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        """One connection's life.  Nothing that a guest sends can end more than this task."""
        session = Session(connection, self.hypervisor.limits, self._log)
        try:
            with connection:
                await self._admit(session)
        except WireError as error:
            self._log.warning("guest refused", why=error.text)
        finally:
            self._connections -= 1

    async def _admit(self, session: Session) -> None:
        try:
            first = None
            with trio.move_on_after(_HELLO_SECONDS):
                first = await session.hello()
            if first is None:
                return
            hello, memory = first
            guest = self._add(hello, memory)
        except WireError as error:
            await session.refuse(error)
            raise
        try:
            await session.welcome(hello, guest)
            self._tell(self.on_guest_found, "guest connected", guest)
            await session.serve(guest)
        finally:
            del self.hypervisor.guests[guest.domid]
            guest.close()
        self._tell(self.on_guest_lost, "guest gone", guest)

    def _tell(self, callback: GuestCallback | None, what: str, guest: EmbeddedGuest) -> None:
        self._log.info(what, domain=guest.domid, pages=guest.memory.pages)
        if callback is not None:
            callback(guest.domid)

    def _add(self, hello: Hello, memory: GuestMemory) -> EmbeddedGuest:
        """Give a newcomer its domid; raises `WireError`."""
        guests = self.hypervisor.guests
        domid = self._free_domid() if hello.domid is None else hello.domid
        try:
            if domid in guests:
                raise WireError(errno.EBUSY, f"domain {domid} is connected already")
            if len(guests) >= self.hypervisor.limits.guests:
                raise WireError(errno.EUSERS, "this host has too many guests")
        except WireError:
            memory.close()
            raise
        guest = guests[domid] = EmbeddedGuest(domid, memory)
        if domid > self._last_domid or hello.domid is None:
            self._last_domid = domid
            self._keep_last_domid()
        return guest

    def _keep_last_domid(self) -> None:
        path = self.directory / _LAST_DOMID_NAME
        try:
            path.write_text(f"{self._last_domid}\n")
        except OSError as error:  # only a restarted host would miss it
            _log.warning("cannot write", path=str(path), error=error.strerror)

    def _free_domid(self) -> Domid:
        """The next one: a domid is not used again soon, not even after a restart (as in Xen)."""
        domid = self._last_domid
        while True:
            domid = Domid(domid % (FIRST_RESERVED_DOMID - 1) + 1)
            if domid not in self.hypervisor.guests:
                return domid


def _require_platform() -> None:
    if sys.platform != "linux" or sys.byteorder != "little":
        raise HypervisorUnavailable("the embedded host needs little-endian Linux (memfd, eventfd)")
    if os.sysconf("SC_PAGE_SIZE") != PAGE_SIZE:
        raise HypervisorUnavailable(f"the embedded host needs a kernel with {PAGE_SIZE}-byte pages")


@contextmanager
def _own(directory: Path) -> Iterator[Path]:
    """Be the only embedded host here, until the process ends; gives the socket's free path."""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(directory / _LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use {directory}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{directory} is served by another process already") from error
        path = socket_path(directory)
        path.unlink(missing_ok=True)  # a dead host's
        yield path
    finally:
        os.close(lock)


async def _listen(path: Path) -> trio.socket.SocketType:
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind: the socket file gets this mode
        await listener.bind(str(path))
        listener.listen(16)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    return listener


def _read_last_domid(directory: Path) -> Domid:
    path = directory / _LAST_DOMID_NAME
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return Domid(0)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if not (text.isascii() and text.isdigit() and int(text) < FIRST_RESERVED_DOMID):
        raise ConfigError(f"{path} does not hold a domain number: remove it")
    return Domid(int(text))
