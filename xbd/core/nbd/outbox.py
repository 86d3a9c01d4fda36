"""Replies on their way to one client."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from xbd.core.nbd import replies
from xbd.core.nbd.buffers import Buffer, BufferPool
from xbd.core.nbd.engine import Transfer
from xbd.core.nbd.limits import Share

_IOV_MAX: Final = 1024
"""Parts in one sendmsg (Linux: UIO_MAXIOV)."""

Part = bytes | memoryview


class Outbox:
    """Sends replies as far as the socket takes them, and the rest when it takes more.

    A request counts as in flight until its whole reply was given to the socket: who does not
    read is not read from either.
    """

    def __init__(
        self, sock: socket.socket, share: Share, pool: BufferPool, *, structured: bool
    ) -> None:
        """`structured`: whether replies are."""
        self.gone = False
        """The client is: nothing more is sent."""
        self.full = False
        """The socket is: `flush` again when it takes more."""
        self._sock = sock
        self._share = share
        self._pool = pool
        self._structured = structured
        self._parts: list[Part] = []
        self._owed: deque[tuple[int, int, Buffer | None]] = deque()
        """Per reply: where its parts end, counted from the first ever, what it counts as, and
        its memory."""
        self._put = 0
        self._left = 0
        """Parts that ever came and that ever went."""

    def put(self, parts: Sequence[Part], size: int, buffer: Buffer | None = None) -> None:
        """A request's whole reply; `size`: what the request was counted as.

        `buffer` goes back to the pool when the reply has left.
        """
        self._parts += parts
        self._put += len(parts)
        self._owed.append((self._put, size, buffer))

    def moved(self, transfer: Transfer) -> None:
        """Reply that all of it was moved."""
        cookie, length, buffer = transfer.cookie, transfer.length, transfer.buffer
        if transfer.write:
            self.put((replies.done(cookie),), length, buffer)
        elif self._structured:
            header = replies.data(cookie, transfer.offset, length)
            self.put((header, transfer.data), length, buffer)
        else:
            self.put((replies.done(cookie), transfer.data), length, buffer)

    def refuse(
        self, cookie: int, size: int, error: int, text: bytes, buffer: Buffer | None = None
    ) -> None:
        """Reply that a request failed: with the protocol's error value, and a text for people."""
        reply = replies.failed(cookie, error, text, structured=self._structured)
        self.put((reply,), size, buffer)

    def give_up(self, transfers: Iterable[Transfer]) -> None:
        """They are over, and nobody hears of it."""
        for transfer in transfers:
            self.put((), transfer.length, transfer.buffer)

    def flush(self) -> None:
        """Send what there is now, as far as the socket takes it."""
        self.full = False
        while self._parts and not self.gone:
            parts = self._parts if len(self._parts) <= _IOV_MAX else self._parts[:_IOV_MAX]
            try:
                sent = self._sock.sendmsg(parts)
            except BlockingIOError:
                self.full = True
                return
            except OSError:
                self.gone = True
                break
            if sent == sum(map(len, parts)):
                self._leave(len(parts))
            else:
                self._leave(self._whole_parts(sent))
        if self.gone:
            self.drop()

    def drop(self) -> None:
        """Forget all replies, now and from now on: the client is gone, or takes too long."""
        self.gone = True
        self.full = False
        self._leave(len(self._parts))

    def _whole_parts(self, sent: int) -> int:
        """How many parts that is; the next one is cut by what is left over."""
        whole = 0
        while sent >= len(self._parts[whole]):
            sent -= len(self._parts[whole])
            whole += 1
        self._parts[whole] = memoryview(self._parts[whole])[sent:]
        return whole

    def _leave(self, count: int) -> None:
        """The first parts have left; give back what belongs to the replies that are whole."""
        del self._parts[:count]
        self._left += count
        requests = size = 0
        while self._owed and self._owed[0][0] <= self._left:
            _, charge, buffer = self._owed.popleft()
            requests += 1
            size += charge
            if buffer is not None:
                self._pool.give(buffer)
        if requests:
            self._share.give(requests, size)
