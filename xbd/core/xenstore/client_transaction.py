"""A client's transaction: one attempt on one connection."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from xbd.core.errors import StoreError, StoreLost
from xbd.core.xenstore.base import StoreReader
from xbd.core.xenstore.calls import Calls
from xbd.core.xenstore.link import Link
from xbd.core.xenstore.protocol import NUL, Op, WireError

T = TypeVar("T")


async def attempt_transaction(
    link: Link, body: Callable[[StoreReader], Awaitable[T]]
) -> tuple[bool, T]:
    """Whether it was committed (False: EAGAIN), and what `body` returned.

    Raises what `body` raises, after aborting; `StoreError`, `StoreLost`.
    """
    tx_id = await _start(link)
    transaction = ClientTransaction(link, tx_id)
    try:
        result = await body(transaction)
    except BaseException:
        link.post(Op.TRANSACTION_END, b"F\x00", tx_id)
        raise
    finally:
        transaction.over = True
    try:
        await link.request(Op.TRANSACTION_END, b"T\x00", tx_id)
    except StoreError as error:
        if error.errno != errno.EAGAIN:
            raise
        return False, result
    return True, result


class ClientTransaction(Calls):
    """The tree as one transaction on one connection sees it."""

    def __init__(self, link: Link, tx_id: int) -> None:
        self.over = False
        self._link = link
        self._tx_id = tx_id

    async def _call(self, op: int, payload: bytes) -> bytes:
        self._require_open()
        return await self._link.request(op, payload, self._tx_id)

    async def _call_all(self, op: int, payloads: Sequence[bytes]) -> list[bytes | StoreError]:
        self._require_open()
        return await self._link.request_all(op, payloads, self._tx_id)

    def _require_open(self) -> None:
        if self.over:
            raise RuntimeError("a transaction was used after its end")


async def _start(link: Link) -> int:
    def give_up(answer: bytes) -> None:
        link.post(Op.TRANSACTION_END, b"F\x00", _transaction_id(answer))

    answer = await link.request(Op.TRANSACTION_START, NUL, if_abandoned=give_up)
    try:
        return _transaction_id(answer)
    except WireError as error:
        link.lose(f"xenstored sent {error}")
        raise StoreLost(str(error)) from error


def _transaction_id(answer: bytes) -> int:
    text = answer.rstrip(NUL)
    if not text.isdigit() or len(text) > 10 or not 0 < int(text) < 1 << 32:
        raise WireError("a transaction without a number")
    return int(text)
