"""The tree of an XenStore: nodes by path, immutable each, with owners counted.  Pure: no I/O.

Every change gives the node a new generation number, taken from one counter for the whole tree;
that is how transactions notice that somebody else changed what they had read.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Mapping
from typing import Final

import attrs

from xbd.core.xenstore.permissions import Access, Permission, Permissions

MISSING: Final = 0
"""The generation of a node that does not exist."""

ROOT_PERMISSIONS: Final[Permissions] = (Permission(Access.NONE, 0),)
SPECIAL_NODES: Final = ("@introduceDomain", "@releaseDomain")
"""Not in the tree, but they have permissions: who else than domain 0 gets their events."""


@attrs.frozen(slots=True)
class Node:
    """Frozen: a change makes another `Node`."""

    value: bytes
    permissions: Permissions
    children: Mapping[str, None]
    """Names in the order of creation; never changed in place."""
    generation: int = MISSING

    @property
    def owner(self) -> int:
        return self.permissions[0].domid

    @property
    def size(self) -> int:
        """Bytes, as quotas count them."""
        names = sum(map(len, self.children)) + len(self.children)
        return len(self.value) + names + 8 * len(self.permissions)


def parent_of(path: str) -> str:
    """``/`` for ``/a``; ``/`` is its own parent."""
    return path.rpartition("/")[0] or "/"


def name_of(path: str) -> str:
    return path.rpartition("/")[2]


def child_path(path: str, name: str) -> str:
    return f"/{name}" if path == "/" else f"{path}/{name}"


class View(abc.ABC):
    """Nodes as one transaction sees them, or everyone outside."""

    @abc.abstractmethod
    def get(self, path: str) -> Node | None:
        """The node at an absolute path."""

    @abc.abstractmethod
    def peek(self, path: str) -> Node | None:
        """The same, but what is seen this way does not count as read by a transaction."""

    @abc.abstractmethod
    def put(self, path: str, node: Node) -> None:
        """Make or replace a node; nothing is done to its parent."""

    @abc.abstractmethod
    def delete(self, path: str) -> None:
        """Remove an existing node; nothing is done to its parent or children."""

    @abc.abstractmethod
    def owned(self, domid: int) -> int:
        """How many nodes belong to this domain."""

    def subtree(self, path: str) -> list[str]:
        """All existing paths below and at `path`, children before their parents."""
        found, waiting = [], [path]
        while waiting:
            current = waiting.pop()
            node = self.get(current)
            if node is not None:
                found.append(current)
                waiting += [child_path(current, name) for name in node.children]
        return found[::-1]


class Tree(View):
    """The real nodes, outside every transaction."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._owned: Counter[int] = Counter()
        self._generation = MISSING
        for path in ("/", *SPECIAL_NODES):
            self.put(path, Node(b"", ROOT_PERMISSIONS, {}))

    def __len__(self) -> int:
        return len(self._nodes) - len(SPECIAL_NODES)

    def get(self, path: str) -> Node | None:
        return self._nodes.get(path)

    def peek(self, path: str) -> Node | None:
        return self._nodes.get(path)

    def put(self, path: str, node: Node) -> None:
        old = self._nodes.get(path)
        if old is not None:
            self._owned[old.owner] -= 1
        self._owned[node.owner] += 1
        self._generation += 1
        self._nodes[path] = Node(node.value, node.permissions, node.children, self._generation)

    def delete(self, path: str) -> None:
        old = self._nodes.pop(path)
        self._owned[old.owner] -= 1
        if not self._owned[old.owner]:
            del self._owned[old.owner]

    def owned(self, domid: int) -> int:
        return self._owned[domid]

    def generation_of(self, path: str) -> int:
        node = self._nodes.get(path)
        return MISSING if node is None else node.generation
