"""One client of the embedded XenStore: its requests, transactions and watches.  Pure: no I/O."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, Protocol

from xbd.core.errors import StoreError
from xbd.core.xenstore import operations
from xbd.core.xenstore.arguments import number, one, several
from xbd.core.xenstore.node_requests import NodeRequests
from xbd.core.xenstore.operations import canonical
from xbd.core.xenstore.outbox import Outbox
from xbd.core.xenstore.permissions import Identity
from xbd.core.xenstore.protocol import (
    DIRECTORY_PART,
    NUL,
    RESET_WATCHES,
    RESULT_OK,
    Op,
    Packet,
    encode,
    errno_name,
    packet,
    strings,
)
from xbd.core.xenstore.quotas import Quotas
from xbd.core.xenstore.server_watches import ServerWatch, WatchTable
from xbd.core.xenstore.transaction import Transaction
from xbd.core.xenstore.tree import SPECIAL_NODES, Tree


class Domains(Protocol):
    """What only the server can do: domains come and go."""

    def introduce(self, domid: int) -> None: ...
    def release(self, domid: int) -> None: ...
    def is_introduced(self, domid: int) -> bool: ...
    def set_target(self, domid: int, target: int) -> None: ...
    def watches_of(self, domid: int) -> int: ...
    def transactions_of(self, domid: int) -> int: ...


class Session(NodeRequests):
    """Answers one packet after the other; what is to be sent goes to the `Outbox`."""

    def __init__(
        self,
        who: Identity,
        tree: Tree,
        table: WatchTable,
        domains: Domains,
        outbox: Outbox,
        quotas: Quotas,
    ) -> None:
        super().__init__(who, tree, table, quotas)
        self.watches: dict[tuple[str, bytes], ServerWatch] = {}
        self._domains = domains
        self._outbox = outbox
        self._closed = False
        self._next_transaction = 1

    def handle(self, request: Packet) -> None:
        """Carry the request out and queue its one reply, and events around it."""
        if self._closed:
            return
        fresh = len(self.watches)
        try:
            handler = _HANDLERS.get(request.op)
            if handler is None:
                raise StoreError("not an operation", errno=errno.ENOSYS)
            op, payload = request.op, handler(self, request)
        except StoreError as error:
            op, payload = Op.ERROR, errno_name(error.errno) + NUL
        self._outbox.reply(encode(packet(op, payload, request.rq_id, request.tx_id)))
        if op == Op.WATCH and len(self.watches) > fresh:
            # Once up front: whoever watches also looks.
            watch = next(reversed(self.watches.values()))
            watch.fire(watch.path)

    def close(self) -> None:
        """Nothing of this client is left, and nothing more is done for it."""
        self._closed = True
        self._reset()

    def _reset(self) -> None:
        for watch in self.watches.values():
            self._table.discard(watch)
        self.watches.clear()
        self.transactions.clear()

    # Watches

    def _watch(self, request: Packet) -> bytes:
        raw, token = several(request, 2)
        path = canonical(self.who, raw, special=True)
        if (path, token) in self.watches:
            raise StoreError("this watch exists", errno=errno.EEXIST)
        used = self._domains.watches_of(self.who.domid)
        if not self.who.privileged and used >= self._quotas.watches:
            raise StoreError("too many watches", errno=errno.ENOSPC)
        relative = path not in SPECIAL_NODES and not raw.startswith(b"/")
        prefix_length = len(path) - len(raw) if relative else 0
        watch = ServerWatch(self.who, path, token, prefix_length, self._outbox.event)
        self.watches[path, token] = watch
        self._table.add(watch)
        return RESULT_OK

    def _unwatch(self, request: Packet) -> bytes:
        raw, token = several(request, 2)
        watch = self.watches.pop((canonical(self.who, raw, special=True), token), None)
        if watch is None:
            raise StoreError("no such watch", errno=errno.ENOENT)
        self._table.discard(watch)
        return RESULT_OK

    def _reset_watches(self, request: Packet) -> bytes:
        self._reset()
        return RESULT_OK

    # Transactions

    def _transaction_start(self, request: Packet) -> bytes:
        if request.tx_id:
            raise StoreError("transactions do not nest", errno=errno.EBUSY)
        used = self._domains.transactions_of(self.who.domid)
        if not self.who.privileged and used >= self._quotas.transactions:
            raise StoreError("too many transactions", errno=errno.ENOSPC)
        while (number := self._next_transaction) in self.transactions:
            self._next_transaction = number % 0xFFFF_FFFF + 1
        self._next_transaction = number % 0xFFFF_FFFF + 1
        self.transactions[number] = Transaction(self._tree, self.who, self._quotas)
        return str(number).encode() + NUL

    def _transaction_end(self, request: Packet) -> bytes:
        verdict = one(request)
        if verdict not in (b"T", b"F"):
            raise StoreError("T or F, please", errno=errno.EINVAL)
        transaction = self.transactions.pop(request.tx_id, None)
        if transaction is None:
            raise StoreError("no such transaction", errno=errno.ENOENT)
        if verdict == b"T":
            self._table.fire(transaction.commit())
        return RESULT_OK

    # Domains

    def _introduce(self, request: Packet) -> bytes:
        domid, _frame, _port = map(number, several(request, 3))
        self._only_domain_0()
        self._domains.introduce(domid)
        return RESULT_OK

    def _release(self, request: Packet) -> bytes:
        domid = number(one(request))
        self._only_domain_0()
        self._domains.release(domid)
        return RESULT_OK

    def _resume(self, request: Packet) -> bytes:
        domid = number(one(request))
        self._only_domain_0()
        if not self._domains.is_introduced(domid):
            raise StoreError("no such domain", errno=errno.ENOENT)
        return RESULT_OK

    def _set_target(self, request: Packet) -> bytes:
        domid, target = map(number, several(request, 2))
        self._only_domain_0()
        self._domains.set_target(domid, target)
        return RESULT_OK

    def _is_domain_introduced(self, request: Packet) -> bytes:
        introduced = self._domains.is_introduced(number(one(request)))
        return b"T\x00" if introduced else b"F\x00"

    def _get_domain_path(self, request: Packet) -> bytes:
        return operations.home(number(one(request))).encode() + NUL

    def _control(self, request: Packet) -> bytes:
        self._only_domain_0()
        if strings(request.payload)[:1] == [b"help"]:
            return b"Supported commands:\nhelp\x00"
        raise StoreError("no such command", errno=errno.EINVAL)

    def _only_domain_0(self) -> None:
        if not self.who.privileged:
            raise StoreError("for domain 0 only", errno=errno.EACCES)


_HANDLERS: Final[dict[int, Callable[[Session, Packet], bytes]]] = {
    Op.DEBUG: Session._control,
    Op.DIRECTORY: Session._directory,
    DIRECTORY_PART: Session._directory_part,
    Op.READ: Session._read,
    Op.GET_PERMS: Session._get_perms,
    Op.WATCH: Session._watch,
    Op.UNWATCH: Session._unwatch,
    RESET_WATCHES: Session._reset_watches,
    Op.TRANSACTION_START: Session._transaction_start,
    Op.TRANSACTION_END: Session._transaction_end,
    Op.INTRODUCE: Session._introduce,
    Op.RELEASE: Session._release,
    Op.RESUME: Session._resume,
    Op.SET_TARGET: Session._set_target,
    Op.GET_DOMAIN_PATH: Session._get_domain_path,
    Op.IS_DOMAIN_INTRODUCED: Session._is_domain_introduced,
    Op.WRITE: Session._write,
    Op.MKDIR: Session._mkdir,
    Op.RM: Session._rm,
    Op.SET_PERMS: Session._set_perms,
}
