"""One export: clients come and go, and share one disk."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import attrs
import trio

from xbd.core.driver import DeviceAccess
from xbd.core.errors import DriverError
from xbd.core.hostio.listen import listening
from xbd.core.nbd.buffers import BufferPool
from xbd.core.nbd.claims import TableClaims
from xbd.core.nbd.connection import Connection
from xbd.core.nbd.direct import DirectIo
from xbd.core.nbd.engine import make_engine
from xbd.core.nbd.errors import BadClient
from xbd.core.nbd.export import Export
from xbd.core.nbd.limits import Budget, Limits, Share
from xbd.core.nbd.negotiation import Agreed, Negotiation
from xbd.core.nbd.poller import Poller
from xbd.core.ratelimit import RateLimit

_log = logging.getLogger(__name__)

_HANDSHAKE_BYTES: Final = 4096
"""Received at a time before the transmission phase."""
_SEND_BUFFER: Final = 1 << 20
"""Asked of the kernel, which gives at most what net.core.wmem_max allows."""
_PAUSE_SECONDS: Final = 0.1
_NO_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@attrs.define(eq=False)
class NbdServer:
    """Serves `export` while `run` runs."""

    export: Export
    limits: Limits = attrs.field(factory=Limits)
    on_last_left: Callable[[], None] | None = None
    """Called when the last client that got as far as the transmission phase has left."""
    alone: bool = False
    """Nothing else in this process is urgent: see `Poller`."""
    _poller: Poller = attrs.field(init=False)
    _budget: Budget = attrs.field(init=False)
    _direct: DirectIo = attrs.field(init=False)
    _pool: BufferPool = attrs.field(factory=BufferPool, init=False)
    _log_limit: RateLimit = attrs.field(factory=RateLimit, init=False)
    _stopped: trio.Event = attrs.field(factory=trio.Event, init=False)
    _clients: int = attrs.field(default=0, init=False)
    _negotiations: set[trio.CancelScope] = attrs.field(factory=set, init=False)
    _connections: set[Connection] = attrs.field(factory=set, init=False)
    _error: DriverError | None = attrs.field(default=None, init=False)

    async def run(
        self,
        listeners: Sequence[socket.socket],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve those who connect to the (non-blocking) listeners, until `stop` or cancelled.

        The listeners are closed as soon as nobody is accepted any more.  Flushing the disk at
        the end is left to the caller.  Raises `DriverError` when the disk can't be used any more.
        Not to be called twice.
        """
        access = self.export.access
        poller = Poller(alone=self.alone)
        engine = make_engine(poller)
        self._poller = poller
        self._budget = Budget(self.limits)
        self._direct = DirectIo(access, engine, self._claims())
        access.subscribe(self._direct.invalidate)
        try:
            async with trio.open_nursery() as storage:
                storage.start_soon(engine.run)
                storage.start_soon(poller.run)
                async with trio.open_nursery() as clients, trio.open_nursery() as doors:
                    for listener in listeners:
                        doors.start_soon(self._accept, listener, clients)
                    task_status.started()
                    await self._stopped.wait()
                    doors.cancel_scope.cancel()
                storage.cancel_scope.cancel()
        finally:
            access.unsubscribe(self._direct.invalidate)
            poller.close()
            engine.close()
        if self._error is not None:
            raise self._error

    @property
    def busy(self) -> bool:
        """Whether a client uses the disk."""
        return bool(self._connections)

    def stop(self) -> None:
        """Accept nobody any more, answer what was taken, and end."""
        self._stopped.set()
        for negotiation in self._negotiations:
            negotiation.cancel()
        for connection in self._connections:
            connection.stop()

    def _claims(self) -> TableClaims | None:
        """Entries are made in trio's thread, so only where nothing else is urgent."""
        access = self.export.access
        if self.alone and access.claims is None:
            access.claims = TableClaims()
        return access.claims if isinstance(access.claims, TableClaims) else None

    def _fail(self, error: DriverError) -> None:
        if self._error is None:
            self._error = error
            self.stop()

    # -- clients ----------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket, clients: trio.Nursery) -> None:
        with listener:
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    sock, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError as error:
                    if error.errno not in _NO_RESOURCES:
                        raise
                    self._note(f"cannot accept clients: {error.strerror}")
                    await trio.sleep(_PAUSE_SECONDS)
                else:
                    clients.start_soon(self.serve_client, sock)

    async def serve_client(self, sock: socket.socket) -> None:
        """One client while `run` runs; the socket is closed at the end.

        Raises nothing: whatever happens, the others go on.
        """
        with sock:
            if self._clients >= self.limits.connections:
                self._note(f"client refused: there are {self._clients} already")
                return
            self._clients += 1
            try:
                await self._serve(sock)
            except BadClient as error:
                self._note(f"client cut off: {error}")
            except Exception:
                _log.exception("%s: a client was lost to a bug", self.export.access.device_id)
            finally:
                self._clients -= 1
                if not self._clients:
                    self._pool.clear()

    async def _serve(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        negotiation = await self._negotiate(sock)
        if negotiation is not None and negotiation.agreed is not None:
            await self._transmit(sock, negotiation.agreed, negotiation.rest)

    async def _negotiate(self, sock: socket.socket) -> Negotiation | None:
        """How it ended; None if the client left, took too long, or was told to go."""
        negotiation = Negotiation(self.export)
        with trio.move_on_after(self.limits.negotiation_seconds) as patience:
            self._negotiations.add(patience)
            if self._stopped.is_set():
                patience.cancel()
            try:
                await _converse(sock, negotiation)
            except ConnectionError:
                return None
            else:
                return negotiation
            finally:
                self._negotiations.remove(patience)
        return None

    async def _transmit(self, sock: socket.socket, agreed: Agreed, received: bytes) -> None:
        connection = Connection(
            sock=sock,
            export=self.export,
            agreed=agreed,
            poller=self._poller,
            direct=self._direct,
            pool=self._pool,
            share=Share(self._budget),
            failed=self._fail,
            note=self._note,
            received=received,
        )
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.remove(connection)
            if not self._connections and self.on_last_left is not None:
                self.on_last_left()

    def _note(self, what: str) -> None:
        held = self._log_limit.allows()
        if held is not None:
            more = f" ({held} more like this)" if held else ""
            _log.warning("%s: %s%s", self.export.access.device_id, what, more)


async def serve_nbd(
    access: DeviceAccess,
    path: Path,
    *,
    mode: int = 0o600,
    name: str = "",
    description: str = "",
    limits: Limits | None = None,
    until_last: bool = False,
    alone: bool = False,
    task_status: trio.TaskStatus[NbdServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a disk on a UNIX socket of its own, until stopped: for ``nursery.start``.

    Whoever starts it gets the server, to `NbdServer.stop` it in order; `until_last`: it ends
    with its last client.  The socket is removed at the end; flushing the disk is left to the
    caller.  Raises `ConfigError` (the socket or the name is impossible) before it has started,
    and `DriverError` when the disk can't be used any more.
    """
    server = NbdServer(
        Export(access=access, name=name, description=description), limits or Limits(), alone=alone
    )
    if until_last:
        server.on_last_left = server.stop
    with listening(path, mode) as listener:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run, [listener])
            task_status.started(server)


async def _converse(sock: socket.socket, negotiation: Negotiation) -> None:
    await _send(sock, negotiation.greeting)
    while True:
        while (reply := negotiation.next_reply()) is not None:
            await _send(sock, reply)
        if negotiation.over or negotiation.agreed is not None:
            return
        await trio.lowlevel.wait_readable(sock)
        try:
            data = sock.recv(_HANDSHAKE_BYTES)
        except BlockingIOError:
            continue
        if not data:
            return
        negotiation.receive(data)


async def _send(sock: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[sock.send(rest) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
