"""A client's requests on nodes, in a transaction and outside.  Pure: no I/O."""

from __future__ import annotations

import errno

from xbd.core.errors import StoreError
from xbd.core.xenstore import operations
from xbd.core.xenstore.arguments import number, one, several
from xbd.core.xenstore.operations import Change, canonical
from xbd.core.xenstore.permissions import Access, Identity, parse_permissions
from xbd.core.xenstore.protocol import NUL, PAYLOAD_MAX, RESULT_OK, Packet, strings
from xbd.core.xenstore.quotas import Quotas
from xbd.core.xenstore.server_watches import WatchTable
from xbd.core.xenstore.transaction import Transaction
from xbd.core.xenstore.tree import Node, Tree, View


class NodeRequests:
    """Each method answers one kind of request: the reply's payload, or `StoreError`."""

    def __init__(self, who: Identity, tree: Tree, table: WatchTable, quotas: Quotas) -> None:
        self.who = who
        self.transactions: dict[int, Transaction] = {}
        self._tree = tree
        self._table = table
        self._quotas = quotas

    def _view(self, request: Packet) -> View:
        if not request.tx_id:
            return self._tree
        transaction = self.transactions.get(request.tx_id)
        if transaction is None:
            raise StoreError("no such transaction", errno=errno.ENOENT)
        return transaction

    def _announce(self, view: View, changes: list[Change]) -> bytes:
        if isinstance(view, Transaction):
            view.remember(changes)
        else:
            self._table.fire(changes)
        return RESULT_OK

    def _node(self, request: Packet, raw: bytes, *, special: bool = False) -> Node:
        path = canonical(self.who, raw, special=special)
        return operations.node_for(self._view(request), self.who, path, Access.READ)

    def _directory(self, request: Packet) -> bytes:
        node = self._node(request, one(request))
        listing = _listing(node)
        if len(listing) > PAYLOAD_MAX:
            raise StoreError("too many children for one reply", errno=errno.E2BIG)
        return listing

    def _directory_part(self, request: Packet) -> bytes:
        raw, offset_text = several(request, 2)
        node = self._node(request, raw)
        offset, listing = number(offset_text), _listing(node)
        generation = str(node.generation).encode() + NUL
        room = PAYLOAD_MAX - len(generation) - 1
        rest = listing[offset:]
        if len(rest) > room:
            return generation + rest[: rest.rindex(NUL, 0, room) + 1]
        return generation + rest + NUL

    def _read(self, request: Packet) -> bytes:
        return self._node(request, one(request)).value

    def _get_perms(self, request: Packet) -> bytes:
        node = self._node(request, one(request), special=True)
        return b"".join(bytes(entry) + NUL for entry in node.permissions)

    def _write(self, request: Packet) -> bytes:
        raw, separator, value = request.payload.partition(NUL)
        if not separator:
            raise StoreError("a path and a value, please", errno=errno.EINVAL)
        view, path = self._view(request), canonical(self.who, raw)
        return self._announce(view, [operations.write(view, self.who, self._quotas, path, value)])

    def _mkdir(self, request: Packet) -> bytes:
        view, path = self._view(request), canonical(self.who, one(request))
        change = operations.mkdir(view, self.who, self._quotas, path)
        return self._announce(view, [] if change is None else [change])

    def _rm(self, request: Packet) -> bytes:
        view, path = self._view(request), canonical(self.who, one(request))
        return self._announce(view, operations.remove(view, self.who, path))

    def _set_perms(self, request: Packet) -> bytes:
        raw, *texts = strings(request.payload) or [b""]
        permissions = parse_permissions(texts)
        view, path = self._view(request), canonical(self.who, raw, special=True)
        change = operations.set_permissions(view, self.who, self._quotas, path, permissions)
        return self._announce(view, [change])


def _listing(node: Node) -> bytes:
    return b"".join(name.encode() + NUL for name in node.children)
