"""A transaction: a view of the tree of its own, until it is committed or thrown away.  Pure."""

from __future__ import annotations

import errno
from collections import Counter

import attrs

from xbd.core.errors import StoreError
from xbd.core.xenstore.operations import Change
from xbd.core.xenstore.permissions import Identity
from xbd.core.xenstore.quotas import Quotas
from xbd.core.xenstore.tree import MISSING, Node, Tree, View


class Transaction(View):
    """Reads each node once from the tree, keeps what it writes to itself.

    It conflicts with others by the nodes that it has looked at, not by time alone: two
    transactions on different directories both succeed.
    """

    def __init__(self, tree: Tree, who: Identity, quotas: Quotas) -> None:
        self._tree = tree
        self._who = who
        self._quotas = quotas
        self._first_seen: dict[str, int] = {}
        self._nodes: dict[str, Node | None] = {}
        self._written: set[str] = set()
        self._delta: Counter[int] = Counter()
        self._changes: dict[tuple[str, bool], Change] = {}

    def get(self, path: str) -> Node | None:
        if path not in self._nodes:
            limit = self._quotas.transaction_nodes
            if not self._who.privileged and len(self._nodes) >= limit:
                raise StoreError("a transaction of too many nodes", errno=errno.ENOSPC)
            node = self._tree.get(path)
            self._nodes[path] = node
            self._first_seen[path] = MISSING if node is None else node.generation
        return self._nodes[path]

    def peek(self, path: str) -> Node | None:
        return self._nodes[path] if path in self._nodes else self._tree.peek(path)

    def put(self, path: str, node: Node) -> None:
        old = self.get(path)
        if old is not None:
            self._delta[old.owner] -= 1
        self._delta[node.owner] += 1
        self._nodes[path] = node
        self._written.add(path)

    def delete(self, path: str) -> None:
        old = self.get(path)
        assert old is not None
        self._delta[old.owner] -= 1
        self._nodes[path] = None
        self._written.add(path)

    def owned(self, domid: int) -> int:
        return self._tree.owned(domid) + self._delta[domid]

    def remember(self, changes: list[Change]) -> None:
        """Watches hear of these after the commit; one event for each path, however often."""
        for change in changes:
            key = (change.path, change.exact)
            first = self._changes.get(key)
            if first is not None:
                readable = tuple(dict.fromkeys(first.readable[:3] + change.readable))
                change = attrs.evolve(change, readable=readable)
            self._changes[key] = change

    def commit(self) -> list[Change]:
        """Carry everything out.  EAGAIN if a node looked at has changed since, ENOSPC by quota."""
        for path, generation in self._first_seen.items():
            if self._tree.generation_of(path) != generation:
                raise StoreError("somebody else changed the same nodes", errno=errno.EAGAIN)
        domid = self._who.domid
        if (
            not self._who.privileged
            and self._delta[domid] > 0
            and self.owned(domid) > self._quotas.nodes
        ):
            raise StoreError("too many nodes", errno=errno.ENOSPC)
        for path in self._written:
            node = self._nodes[path]
            if node is not None:
                self._tree.put(path, node)
            elif self._tree.get(path) is not None:
                self._tree.delete(path)
        return list(self._changes.values())
