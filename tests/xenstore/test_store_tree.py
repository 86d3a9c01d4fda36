"""The tree against a dict, transactions included; permissions and quotas by cases."""

from __future__ import annotations

import errno

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xbd.core.errors import StoreError
from xbd.core.xenstore import operations
from xbd.core.xenstore.permissions import Access, Identity, parse_permissions
from xbd.core.xenstore.quotas import Quotas
from xbd.core.xenstore.transaction import Transaction
from xbd.core.xenstore.tree import Tree, child_path, parent_of

DOM0 = Identity(0)
QUOTAS = Quotas()
PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(lambda p: "/" + "/".join(p))
VALUES = st.binary(max_size=3)


class Model:
    """What the tree should be."""

    def __init__(self, nodes=None):
        self.nodes = {"/": b""} if nodes is None else dict(nodes)

    def write(self, path, value):
        self.mkdir(path)
        self.nodes[path] = value

    def mkdir(self, path):
        while path not in self.nodes:
            self.nodes[path] = b""
            path = parent_of(path)

    def remove(self, path):
        if path not in self.nodes:
            return parent_of(path) in self.nodes
        for other in [*self.nodes]:
            if other == path or other.startswith(path + "/"):
                del self.nodes[other]
        return True

    def children(self, path):
        return {name for name in self.nodes if name != "/" and parent_of(name) == path}


class TreeMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.tree = Tree()
        self.model = Model()
        self.transaction = None
        self.disturbed = False

    def targets(self, inside):
        if inside and self.transaction:
            return self.transaction, self.inner
        return self.tree, self.model

    def record(self, view, *action):
        if view is self.transaction:
            self.log.append(action)
        else:
            self.disturbed = True

    @rule(inside=st.booleans(), path=PATHS, value=VALUES)
    def write(self, inside, path, value):
        view, model = self.targets(inside)
        change = operations.write(view, DOM0, QUOTAS, path, value)
        assert change.path == path
        model.write(path, value)
        self.record(view, "write", path, value)

    @rule(inside=st.booleans(), path=PATHS)
    def mkdir(self, inside, path):
        view, model = self.targets(inside)
        change = operations.mkdir(view, DOM0, QUOTAS, path)
        assert (change is None) == (path in model.nodes)
        model.mkdir(path)
        self.record(view, "mkdir", path)

    @rule(inside=st.booleans(), path=PATHS)
    def remove(self, inside, path):
        view, model = self.targets(inside)
        gone = {node for node in model.nodes if node == path or node.startswith(path + "/")}
        if model.remove(path):
            changes = operations.remove(view, DOM0, path)
            assert {change.path for change in changes} == gone
            assert [change.path for change in changes if not change.exact] == [path] * bool(gone)
        else:
            with pytest.raises(StoreError):
                operations.remove(view, DOM0, path)
        self.record(view, "remove", path)

    @rule(inside=st.booleans(), path=PATHS)
    def look(self, inside, path):
        view, model = self.targets(inside)
        node = view.get(path)
        assert (node is None) == (path not in model.nodes)
        if node is not None:
            assert node.value == model.nodes[path]
            assert {child_path(path, name) for name in node.children} == model.children(path)

    @precondition(lambda self: self.transaction is None)
    @rule()
    def start(self):
        self.transaction = Transaction(self.tree, DOM0, QUOTAS)
        self.inner = Model(self.model.nodes)
        self.log = []
        self.disturbed = False

    @precondition(lambda self: self.transaction is not None and not self.disturbed)
    @rule()
    def commit(self):
        self.transaction.commit()
        self.model = self.inner
        self.transaction = None

    @precondition(lambda self: self.transaction is not None)
    @rule()
    def commit_or_conflict(self):
        try:
            self.transaction.commit()
        except StoreError as error:
            conflict = error.errno
        else:
            conflict = None
            # What it had seen is unchanged, so doing it now comes to the same.
            for action, *arguments in self.log:
                getattr(self.model, action)(*arguments)
        assert conflict in ((None, errno.EAGAIN) if self.disturbed else (None,))
        self.transaction = None

    @precondition(lambda self: self.transaction is not None)
    @rule()
    def abort(self):
        self.transaction = None

    @invariant()
    def tree_is_the_model(self):
        paths = self.tree.subtree("/")
        assert {path: self.tree.get(path).value for path in paths} == self.model.nodes
        assert len(self.tree) == len(self.model.nodes) == len(paths)
        assert self.tree.owned(0) == len(paths) + 2


class UndisturbedTreeMachine(TreeMachine):
    """While there is a transaction, everything is done in it."""

    def targets(self, inside):
        return super().targets(inside or self.transaction is not None)


class DisturbedTreeMachine(TreeMachine):
    """Others change the tree meanwhile.

    What a transaction reads after that may differ from its start; XenStore promises only that it
    then fails.  So nothing is done in it any more, except to end it.
    """

    def targets(self, inside):
        return super().targets(inside and not self.disturbed)


TestUndisturbedTree = UndisturbedTreeMachine.TestCase
TestDisturbedTree = DisturbedTreeMachine.TestCase


def tree_with(path, *permissions):
    tree = Tree()
    operations.write(tree, DOM0, QUOTAS, path, b"")
    listed = parse_permissions(entry.encode() for entry in permissions)
    operations.set_permissions(tree, DOM0, QUOTAS, path, listed)
    return tree


def refused(number, function, *arguments):
    with pytest.raises(StoreError) as caught:
        function(*arguments)
    return caught.value.errno == number


@pytest.mark.parametrize(
    ("entries", "domid", "read", "write", "owner"),
    [
        (["n1"], 0, True, True, True),
        (["n1"], 1, True, True, True),
        (["n1"], 2, False, False, False),
        (["r1"], 2, True, False, False),
        (["w1"], 2, False, True, False),
        (["b1"], 2, True, True, False),
        (["n1", "r2"], 2, True, False, False),
        (["n1", "w2"], 2, False, True, False),
        (["n1", "b2"], 2, True, True, False),
        (["b1", "n2"], 2, False, False, False),
        (["n1", "r2"], 3, False, False, False),
        (["r1", "n2", "b3"], 3, True, True, False),
        (["n1", "n1"], 1, True, True, True),
    ],
)
def test_permission_matrix(entries, domid, read, write, owner):
    tree, who = tree_with("/a", *entries), Identity(domid)
    for access, allowed in ((Access.READ, read), (Access.WRITE, write)):
        if allowed:
            operations.node_for(tree, who, "/a", access)
        else:
            assert refused(errno.EACCES, operations.node_for, tree, who, "/a", access)
    if write:
        operations.write(tree, who, QUOTAS, "/a", b"x")
        created = operations.write(tree, who, QUOTAS, "/a/b", b"x")
        assert tree.get(created.path).owner == (domid or tree.get("/a").owner)
    else:
        assert refused(errno.EACCES, operations.write, tree, who, QUOTAS, "/a", b"x")
        assert refused(errno.EACCES, operations.write, tree, who, QUOTAS, "/a/b/c", b"x")
        assert refused(errno.EACCES, operations.remove, tree, who, "/a")
    change = (operations.set_permissions, tree, who, QUOTAS, "/a", tree.get("/a").permissions)
    if owner:
        change[0](*change[1:])
    else:
        assert refused(errno.EACCES, *change)


def test_who_may_not_read_the_parent_learns_nothing():
    tree = tree_with("/a", "n1")
    assert refused(errno.EACCES, operations.node_for, tree, Identity(2), "/a/x/y", Access.READ)
    assert refused(errno.ENOENT, operations.node_for, tree, Identity(1), "/a/x/y", Access.READ)


def test_children_inherit_and_guests_own_what_they_make():
    tree = tree_with("/a", "n0", "b3", "r4")
    operations.write(tree, Identity(3), QUOTAS, "/a/b/c", b"")
    for path in ("/a/b", "/a/b/c"):
        assert [bytes(entry) for entry in tree.get(path).permissions] == [b"n3", b"b3", b"r4"]


def test_only_domain_0_gives_nodes_away():
    tree = tree_with("/a", "n3")
    listed = parse_permissions([b"n4"])
    change = (operations.set_permissions, tree, Identity(3), QUOTAS, "/a", listed)
    assert refused(errno.EPERM, *change)
    operations.set_permissions(tree, DOM0, QUOTAS, "/a", listed)
    assert tree.get("/a").owner == 4


def test_target_lends_its_rights():
    tree = tree_with("/a", "n3")
    operations.write(tree, Identity(5, target=3), QUOTAS, "/a", b"x")


@pytest.mark.parametrize("entry", [b"", b"x1", b"r", b"r-1", b"r99999", b"r1 ", b"rr1", b"r1x"])
def test_malformed_permissions(entry):
    assert refused(errno.EINVAL, parse_permissions, [entry])


@pytest.mark.parametrize(
    "path", [b"", b"/a/", b"//", b"/a//b", b"/a b", b"/a.b", b"/\xff", b"/" + b"x" * 3072]
)
def test_malformed_paths(path):
    assert refused(errno.EINVAL, operations.canonical, DOM0, path)


def test_relative_paths():
    assert operations.canonical(Identity(7), b"device/vbd") == "/local/domain/7/device/vbd"
    for raw in (b"@releaseDomain", b"@releaseDomain/x", b"@other"):
        assert refused(errno.EINVAL, operations.canonical, DOM0, raw)
    assert operations.canonical(DOM0, b"@releaseDomain", special=True) == "@releaseDomain"


def test_quotas():
    quotas = Quotas(nodes=5, node_size=100, permissions=2, transaction_nodes=4)
    guest = Identity(3)
    tree = tree_with("/a", "n3")
    operations.write(tree, guest, quotas, "/a/b/c", b"")
    assert refused(errno.ENOSPC, operations.write, tree, guest, quotas, "/a/d/e/f", b"")
    assert tree.get("/a/d") is None
    operations.write(tree, guest, quotas, "/a/d/e", b"")
    assert refused(errno.ENOSPC, operations.mkdir, tree, guest, quotas, "/a/f")
    assert refused(errno.ENOSPC, operations.write, tree, guest, quotas, "/a/b", b"x" * 100)
    listed = parse_permissions([b"n3", b"r1", b"r2"])
    change = (operations.set_permissions, tree, guest, quotas, "/a", listed)
    assert refused(errno.ENOSPC, *change)
    operations.write(tree, DOM0, quotas, "/a/b", b"x" * 100)
    operations.remove(tree, guest, "/a/b")
    operations.mkdir(tree, guest, quotas, "/a/f")
    transaction = Transaction(tree, guest, quotas)
    for path in ("/a", "/a/d", "/a/d/e", "/a/f"):
        transaction.get(path)
    assert refused(errno.ENOSPC, transaction.get, "/a/g")


def test_transactions_do_not_evade_the_quota():
    quotas, guest, tree = Quotas(nodes=3), Identity(3), tree_with("/a", "n3")
    operations.mkdir(tree, DOM0, quotas, "/b")
    operations.set_permissions(tree, DOM0, quotas, "/b", parse_permissions([b"n3"]))
    transaction = Transaction(tree, guest, quotas)
    operations.mkdir(transaction, guest, quotas, "/a/x")
    assert refused(errno.ENOSPC, operations.mkdir, transaction, guest, quotas, "/a/y")
    operations.mkdir(tree, guest, quotas, "/b/z")
    assert refused(errno.ENOSPC, transaction.commit)
    assert tree.get("/a/x") is None


def test_nothing_remains_of_a_domain():
    tree = tree_with("/a", "n0", "b3", "r4")
    operations.write(tree, Identity(3), QUOTAS, "/a/mine/deep", b"")
    operations.write(tree, DOM0, QUOTAS, "/c", b"")
    changes = operations.forget_domain(tree, 3)
    assert {change.path for change in changes} == {"/a/mine", "/a/mine/deep"}
    assert [bytes(entry) for entry in tree.get("/a").permissions] == [b"n0", b"r4"]
    assert tree.owned(3) == 0


def test_transactions_on_different_nodes_do_not_conflict():
    tree = tree_with("/a", "n0")
    operations.write(tree, DOM0, QUOTAS, "/b", b"")
    one, two = Transaction(tree, DOM0, QUOTAS), Transaction(tree, DOM0, QUOTAS)
    operations.write(one, DOM0, QUOTAS, "/a", b"1")
    operations.write(two, DOM0, QUOTAS, "/b", b"2")
    one.commit()
    two.commit()
    assert (tree.get("/a").value, tree.get("/b").value) == (b"1", b"2")
