"""The requests on nodes, the same in a transaction and outside."""

from __future__ import annotations

import abc
import errno
from collections.abc import Mapping, Sequence
from typing import Final

from xbd.core.errors import StoreError
from xbd.core.xenstore.base import StoreReader
from xbd.core.xenstore.protocol import (
    ABSOLUTE_PATH_MAX,
    DIRECTORY_PART,
    NUL,
    RELATIVE_PATH_MAX,
    Op,
    strings,
)

_LISTING_MAX: Final = 8 << 20
"""Bytes of one directory's names; more is not believed."""
_LISTING_ATTEMPTS: Final = 100
"""How often a directory may change while it is listed in parts."""


def encode_text(text: str) -> bytes:
    """Raises `StoreError` (EINVAL) for what has no bytes (lone surrogates)."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise StoreError(f"{text!r} can't be encoded", errno=errno.EINVAL) from error


def decode_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def encode_path(path: str) -> bytes:
    """With its NUL.  Raises `StoreError` (EINVAL) for what can't be a path."""
    data = encode_text(path)
    limit = ABSOLUTE_PATH_MAX if data.startswith(b"/") else RELATIVE_PATH_MAX
    if not data or NUL in data or len(data) > limit:
        raise StoreError(f"{path[:80]!r} is not an XenStore path", errno=errno.EINVAL)
    return data + NUL


def _value(answer: bytes | StoreError) -> str | None:
    if isinstance(answer, bytes):
        return decode_text(answer)
    if answer.errno != errno.ENOENT:
        raise answer
    return None


class Calls(StoreReader):
    """`StoreReader` by way of one function that sends a request."""

    @abc.abstractmethod
    async def _call(self, op: int, payload: bytes) -> bytes:
        """The answer's payload.  Raises `StoreError`, `StoreLost`."""

    @abc.abstractmethod
    async def _call_all(self, op: int, payloads: Sequence[bytes]) -> list[bytes | StoreError]:
        """Each request's answer, or why it was refused.  Raises `StoreLost`."""

    async def read(self, path: str) -> str | None:
        data = await self._call_on_node(Op.READ, encode_path(path))
        return None if data is None else decode_text(data)

    async def read_all(self, paths: Sequence[str]) -> list[str | None]:
        answers = await self._call_all(Op.READ, [encode_path(path) for path in paths])
        return [_value(answer) for answer in answers]

    async def directory(self, path: str) -> list[str] | None:
        raw = encode_path(path)
        try:
            listing = await self._call_on_node(Op.DIRECTORY, raw)
        except StoreError as error:
            if error.errno != errno.E2BIG:
                raise
            listing = await self._directory_in_parts(raw)
        return None if listing is None else sorted(map(decode_text, strings(listing)))

    async def write(self, path: str, value: str) -> None:
        await self._call(Op.WRITE, encode_path(path) + encode_text(value))

    async def write_all(self, values: Mapping[str, str]) -> None:
        payloads = [encode_path(path) + encode_text(value) for path, value in values.items()]
        for answer in await self._call_all(Op.WRITE, payloads):
            if isinstance(answer, StoreError):
                raise answer

    async def mkdir(self, path: str) -> None:
        await self._call(Op.MKDIR, encode_path(path))

    async def remove(self, path: str) -> None:
        await self._call_on_node(Op.RM, encode_path(path))

    async def get_permissions(self, path: str) -> list[str] | None:
        data = await self._call_on_node(Op.GET_PERMS, encode_path(path))
        return None if data is None else list(map(decode_text, strings(data)))

    async def set_permissions(self, path: str, permissions: Sequence[str]) -> None:
        entries = b"".join(encode_text(entry) + NUL for entry in permissions)
        await self._call(Op.SET_PERMS, encode_path(path) + entries)

    async def _call_on_node(self, op: int, payload: bytes) -> bytes | None:
        try:
            return await self._call(op, payload)
        except StoreError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    async def _directory_in_parts(self, raw: bytes) -> bytes | None:
        """A listing too long for one reply; from the start again when the directory changes."""
        listing, generation = b"", b""
        for _ in range(_LISTING_ATTEMPTS * (1 + _LISTING_MAX // 4096)):
            offset = str(len(listing)).encode() + NUL
            part = await self._call_on_node(DIRECTORY_PART, raw + offset)
            if part is None:
                return None
            seen, _, names = part.partition(NUL)
            if listing and seen != generation:
                listing, generation = b"", b""
                continue
            generation = seen
            last = names == NUL or names.endswith(NUL + NUL)
            listing += names[:-1] if last else names
            if last:
                return listing
            if not names or len(listing) > _LISTING_MAX:
                break
        raise StoreError("a directory too long, or ever changing", errno=errno.E2BIG)
