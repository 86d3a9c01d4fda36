"""An XenStore without Xen: xenstored's wire protocol on UNIX sockets.

Domain 0's clients connect to ``DIR/xenstored.socket``.  Each domain that was introduced has a
socket of its own, ``DIR/xenstored-<domid>.socket``; whoever connects there is that domain.
Nothing is kept on disk: a new server starts with an empty tree.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import structlog
import trio

from xbd.core.errors import ConfigError, StoreError
from xbd.core.units import Domid
from xbd.core.xenstore import door, operations
from xbd.core.xenstore.connection import Connection
from xbd.core.xenstore.operations import Change
from xbd.core.xenstore.permissions import Identity
from xbd.core.xenstore.protocol import WireError
from xbd.core.xenstore.quotas import Quotas
from xbd.core.xenstore.server_watches import WatchTable
from xbd.core.xenstore.session import Session
from xbd.core.xenstore.tree import Tree

_log = structlog.get_logger(__name__)

_DOM0_CONNECTIONS: Final = 256
_NO_DESCRIPTORS_PAUSE_S: Final = 0.1
_FIRST_RESERVED_DOMID: Final = 0x7FF0


@attrs.define(eq=False)
class _Domain:
    """A domain that may talk to the store, and its clients."""

    who: Identity
    path: Path
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    sessions: set[Session] = attrs.field(factory=set)


class EmbeddedXenStore:
    """Everything lives in memory and in one trio nursery."""

    def __init__(self, directory: Path, nursery: trio.Nursery, quotas: Quotas) -> None:
        self.directory = directory
        self.tree = Tree()
        self._table = WatchTable()
        self._quotas = quotas
        self._nursery = nursery
        self._domains: dict[int, _Domain] = {}

    @classmethod
    @asynccontextmanager
    async def serve(
        cls, directory: Path, *, quotas: Quotas | None = None
    ) -> AsyncIterator[EmbeddedXenStore]:
        """Serve in `directory` until the block ends.

        Raises `ConfigError` if the sockets can't be made, or another server answers there.
        """
        failure: Exception | None = None
        with door.alone_in(directory):
            async with trio.open_nursery() as nursery:
                server = cls(directory, nursery, quotas or Quotas())
                try:
                    server._open(Domid(0))
                    server._populate()
                    yield server
                except Exception as error:
                    # Kept out of the nursery, which would wrap it in a group.
                    failure = error
                finally:
                    server._close_all()
                    nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    @property
    def path(self) -> Path:
        """The socket for domain 0's clients."""
        return door.socket_path(self.directory, Domid(0))

    def path_for(self, domid: Domid) -> Path:
        """The socket for an introduced domain's clients."""
        return door.socket_path(self.directory, domid)

    # What sessions ask for: `session.Domains`

    def introduce(self, domid: int) -> None:
        """INTRODUCE: this domain exists from now on.  Once more does nothing."""
        if not 0 < domid < _FIRST_RESERVED_DOMID:
            raise StoreError("not a guest's number", errno=errno.EINVAL)
        if domid in self._domains:
            return
        try:
            self._open(Domid(domid))
        except ConfigError as error:
            raise StoreError(str(error), errno=errno.EIO) from error
        self._fire_special("@introduceDomain")

    def release(self, domid: int) -> None:
        """RELEASE: this domain is gone, with its clients, nodes and rights."""
        if domid == 0:
            raise StoreError("domain 0 stays", errno=errno.EINVAL)
        domain = self._domains.pop(domid, None)
        if domain is None:
            raise StoreError("no such domain", errno=errno.ENOENT)
        self._close(domain)
        self._table.fire(operations.forget_domain(self.tree, domid))
        self._fire_special("@releaseDomain")

    def is_introduced(self, domid: int) -> bool:
        return domid in self._domains

    def set_target(self, domid: int, target: int) -> None:
        if domid not in self._domains or target not in self._domains:
            raise StoreError("no such domain", errno=errno.ENOENT)
        self._domains[domid].who.target = target

    def watches_of(self, domid: int) -> int:
        return sum(len(session.watches) for session in self._domains[domid].sessions)

    def transactions_of(self, domid: int) -> int:
        return sum(len(session.transactions) for session in self._domains[domid].sessions)

    # Domains and their clients

    def _populate(self) -> None:
        """What is there on a host before the first guest."""
        dom0 = self._domains[0].who
        for path, value in {
            "/tool/xenstored": b"",
            "/local/domain/0/domid": b"0",
            "/local/domain/0/name": b"Domain-0",
        }.items():
            operations.write(self.tree, dom0, self._quotas, path, value)

    def _fire_special(self, name: str) -> None:
        node = self.tree.get(name)
        assert node is not None
        self._table.fire([Change(name, True, (node.permissions,))])

    def _open(self, domid: Domid) -> None:
        path = door.socket_path(self.directory, domid)
        listener = door.listen(path)
        domain = _Domain(Identity(domid), path)
        self._domains[domid] = domain
        self._nursery.start_soon(self._accept, domain, listener)

    def _close(self, domain: _Domain) -> None:
        """At once, as far as anyone can tell: the tasks end at their next checkpoint."""
        domain.scope.cancel()
        domain.path.unlink(missing_ok=True)
        for session in domain.sessions:
            session.close()

    def _close_all(self) -> None:
        for domain in self._domains.values():
            self._close(domain)

    async def _accept(self, domain: _Domain, listener: socket.socket) -> None:
        most = self._quotas.connections if domain.who.domid else _DOM0_CONNECTIONS
        with listener, domain.scope:
            door_ = trio.socket.from_stdlib_socket(listener)
            async with trio.open_nursery() as nursery:
                while True:
                    try:
                        client, _ = await door_.accept()
                    except OSError as error:
                        _log.warning("xenstore-accept-failed", error=str(error))
                        await trio.sleep(_NO_DESCRIPTORS_PAUSE_S)
                        continue
                    if len(domain.sessions) >= most:
                        _log.warning("xenstore-too-many-clients", domid=domain.who.domid)
                        client.close()
                        continue
                    connection = Connection(trio.SocketStream(client))
                    session = Session(
                        domain.who, self.tree, self._table, self, connection.outbox, self._quotas
                    )
                    domain.sessions.add(session)
                    nursery.start_soon(self._serve_client, domain, connection, session)

    async def _serve_client(
        self, domain: _Domain, connection: Connection, session: Session
    ) -> None:
        try:
            await connection.run(session)
        except WireError as error:
            _log.warning("xenstore-client-dropped", domid=domain.who.domid, reason=str(error))
        except Exception:
            # A bug must cost one client only, never the store.
            _log.exception("xenstore-client-failed", domid=domain.who.domid)
        finally:
            session.close()
            domain.sessions.discard(session)


async def serve_forever(directory: Path) -> None:
    """Serve in `directory` until cancelled.  Raises `ConfigError`."""
    async with EmbeddedXenStore.serve(directory):
        await trio.sleep_forever()
