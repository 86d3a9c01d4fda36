"""Who may do what to a node, as xenstored decides it.

The first entry of a node's list names its owner, who may do everything, and what everyone not
listed may do; each further entry is one domain's right.  Domain 0 may do everything.
"""

from __future__ import annotations

import enum
import errno
import re
from collections.abc import Iterable
from typing import Final

import attrs

from xbd.core.errors import StoreError

_ENTRY: Final = re.compile(rb"([nrwb])([0-9]{1,5})")
_DOMID_LIMIT: Final = 0x7FF0
"""DOMID_FIRST_RESERVED of xen.h: domains are numbered below it."""


class Access(enum.IntFlag):
    NONE = 0
    READ = 1
    WRITE = 2


_LETTERS: Final = {
    b"n": Access.NONE,
    b"r": Access.READ,
    b"w": Access.WRITE,
    b"b": Access.READ | Access.WRITE,
}
_LETTER_OF: Final = {access: letter for letter, access in _LETTERS.items()}


@attrs.frozen(slots=True)
class Permission:
    """One entry: ``r7`` lets domain 7 read."""

    access: Access
    domid: int

    @classmethod
    def parse(cls, text: bytes) -> Permission:
        """Raises `StoreError` (EINVAL)."""
        match = _ENTRY.fullmatch(text)
        if match is None or int(match[2]) >= _DOMID_LIMIT:
            raise StoreError(f"{text!r} is not a permission such as r7", errno=errno.EINVAL)
        return cls(_LETTERS[match[1]], int(match[2]))

    def __bytes__(self) -> bytes:
        return _LETTER_OF[self.access] + str(self.domid).encode()


Permissions = tuple[Permission, ...]
"""Never empty."""


def parse_permissions(texts: Iterable[bytes]) -> Permissions:
    """Raises `StoreError` (EINVAL) on a malformed entry or an empty list."""
    permissions = tuple(Permission.parse(text) for text in texts)
    if not permissions:
        raise StoreError("a node needs an owner", errno=errno.EINVAL)
    return permissions


@attrs.define
class Identity:
    """Whose requests these are."""

    domid: int
    target: int | None = None
    """A domain whose rights this one has too (SET_TARGET: a device model's guest)."""

    @property
    def privileged(self) -> bool:
        return self.domid == 0

    def owns(self, permissions: Permissions) -> bool:
        """Whether this domain may change the permissions."""
        return self.privileged or self._is(permissions[0].domid)

    def may(self, access: Access, permissions: Permissions) -> bool:
        """Whether all of `access` is allowed."""
        if self.owns(permissions):
            return True
        for entry in permissions[1:]:
            if self._is(entry.domid):
                return access in entry.access
        return access in permissions[0].access

    def _is(self, domid: int) -> bool:
        return domid in (self.domid, self.target)
