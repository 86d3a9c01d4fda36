"""What the requests do to a tree, with xenstored's rights, errors and events.  Pure: no I/O.

Functions that change the tree return the `Change` that watches are to hear of.  All raise
`StoreError` with the errno that goes back to the client.
"""

from __future__ import annotations

import errno
import re
from typing import Final

import attrs

from xbd.core.errors import StoreError
from xbd.core.xenstore.permissions import Access, Identity, Permission, Permissions
from xbd.core.xenstore.protocol import ABSOLUTE_PATH_MAX, RELATIVE_PATH_MAX
from xbd.core.xenstore.quotas import Quotas
from xbd.core.xenstore.tree import SPECIAL_NODES, Node, View, child_path, name_of, parent_of

_PATH: Final = re.compile(rb"/|(/[A-Za-z0-9@_-]+)+")
_SPECIAL: Final = frozenset(name.encode() for name in SPECIAL_NODES)


@attrs.frozen(slots=True)
class Change:
    """Something that watches hear of."""

    path: str
    exact: bool
    """Heard only by watches on this very path: below a removed node."""
    readable: tuple[Permissions, ...]
    """Who may read by any of these lists hears of it: the node's, its parent's, its former."""


def home(domid: int) -> str:
    """A domain's own directory, which its relative paths start from."""
    return f"/local/domain/{domid}"


def canonical(who: Identity, raw: bytes, *, special: bool = False) -> str:
    """The absolute path that a request means; also ``@introduceDomain`` etc. if `special`."""
    if raw.startswith(b"@"):
        if special and raw in _SPECIAL:
            return raw.decode()
        raise StoreError("not a path", errno=errno.EINVAL)
    relative = not raw.startswith(b"/")
    path = home(who.domid).encode() + b"/" + raw if relative else raw
    too_long = len(path) >= ABSOLUTE_PATH_MAX or (relative and len(raw) >= RELATIVE_PATH_MAX)
    if too_long or _PATH.fullmatch(path) is None:
        raise StoreError("not a path", errno=errno.EINVAL)
    return path.decode()


def node_for(view: View, who: Identity, path: str, access: Access) -> Node:
    """The node, if it exists and allows `access`.

    Of a node that does not exist, the nearest existing parent decides whether the domain may
    know that (ENOENT) or not (EACCES).
    """
    node = view.get(path)
    if node is not None:
        if not who.may(access, node.permissions):
            raise StoreError(f"no access to {path}", errno=errno.EACCES)
        return node
    parent = None
    while parent is None and path != "/":
        path = parent_of(path)
        parent = view.get(path)
    if parent is not None and not who.may(access, parent.permissions):
        raise StoreError(f"no access to {path}", errno=errno.EACCES)
    raise StoreError(f"{path} does not exist", errno=errno.ENOENT)


def write(view: View, who: Identity, quotas: Quotas, path: str, value: bytes) -> Change:
    """WRITE: set the value, making the node and its parents where needed."""
    node = _existing(view, who, path)
    if node is None:
        return _create(view, who, quotas, path, value)
    new = Node(value, node.permissions, node.children)
    _check_size(who, quotas, new)
    view.put(path, new)
    return _changed(view, path, new)


def mkdir(view: View, who: Identity, quotas: Quotas, path: str) -> Change | None:
    """MKDIR: None if the node exists already, and nothing was changed."""
    if _existing(view, who, path) is not None:
        return None
    return _create(view, who, quotas, path, b"")


def remove(view: View, who: Identity, path: str) -> list[Change]:
    """RM: the node and all below it.  No error if only the last name does not exist."""
    if _existing(view, who, path) is None:
        if view.get(parent_of(path)) is None:
            raise StoreError(f"{path} does not exist", errno=errno.ENOENT)
        return []
    if path == "/":
        raise StoreError("the root stays", errno=errno.EINVAL)
    return cut(view, path)


def cut(view: View, path: str) -> list[Change]:
    """Remove an existing node and all below it, whoever may."""
    changes = []
    for gone in view.subtree(path):
        node = view.get(gone)
        assert node is not None
        changes.append(_changed(view, gone, node, exact=gone != path))
        view.delete(gone)
    above = parent_of(path)
    parent = view.get(above)
    assert parent is not None
    left = {name: None for name in parent.children if name != name_of(path)}
    view.put(above, attrs.evolve(parent, children=left))
    return changes


def set_permissions(
    view: View, who: Identity, quotas: Quotas, path: str, permissions: Permissions
) -> Change:
    """SET_PERMS: for the owner; only domain 0 may give a node away."""
    if not who.privileged and len(permissions) > quotas.permissions:
        raise StoreError("too many permissions", errno=errno.ENOSPC)
    node = node_for(view, who, path, Access.WRITE)
    if not who.owns(node.permissions):
        raise StoreError(f"{path} belongs to another domain", errno=errno.EACCES)
    if not who.privileged and permissions[0].domid != node.owner:
        raise StoreError("only domain 0 changes owners", errno=errno.EPERM)
    new = Node(node.value, permissions, node.children)
    view.put(path, new)
    return _changed(view, path, new, former=node.permissions)


def forget_domain(view: View, domid: int) -> list[Change]:
    """What remains of a domain that is gone: its nodes, and its rights to others' (XSA-322).

    A new domain of the same number must not inherit anything.
    """
    changes: list[Change] = []
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        node = view.get(path)
        assert node is not None
        if node.owner == domid and path != "/":
            changes += cut(view, path)
            continue
        kept = tuple(entry for entry in node.permissions if entry.domid != domid)
        if kept != node.permissions:
            view.put(path, attrs.evolve(node, permissions=kept))
        waiting += [child_path(path, name) for name in node.children]
    return changes


def _existing(view: View, who: Identity, path: str) -> Node | None:
    """The node if it may be written; None where it may be created."""
    try:
        return node_for(view, who, path, Access.WRITE)
    except StoreError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


def _create(view: View, who: Identity, quotas: Quotas, path: str, value: bytes) -> Change:
    """Make the node and its missing parents with the permissions of the nearest parent.

    All checks come before the first change: a refused request changes nothing.
    """
    missing = [path]
    while (parent := view.get(above := parent_of(missing[-1]))) is None:
        missing.append(above)
    permissions = parent.permissions
    if not who.privileged:
        permissions = (Permission(permissions[0].access, who.domid), *permissions[1:])
        if view.owned(who.domid) + len(missing) > quotas.nodes:
            raise StoreError("too many nodes", errno=errno.ENOSPC)
    grown = attrs.evolve(parent, children={**parent.children, name_of(missing[-1]): None})
    nodes = [(above, grown)]
    for made, below in zip(missing[::-1], [*missing[-2::-1], None], strict=True):
        children = {} if below is None else {name_of(below): None}
        nodes.append((made, Node(b"" if below else value, permissions, children)))
    for _, node in nodes:
        _check_size(who, quotas, node)
    for made, node in nodes:
        view.put(made, node)
    return _changed(view, path, nodes[-1][1])


def _check_size(who: Identity, quotas: Quotas, node: Node) -> None:
    if not who.privileged and node.size > quotas.node_size:
        raise StoreError("the node grows too large", errno=errno.ENOSPC)


def _changed(
    view: View, path: str, node: Node, *, exact: bool = False, former: Permissions | None = None
) -> Change:
    readable = [node.permissions]
    parent = view.peek(parent_of(path))
    if parent is not None and path.startswith("/"):
        readable.append(parent.permissions)
    if former is not None:
        readable.append(former)
    return Change(path, exact, tuple(readable))
