"""What is to be sent to one client of the embedded XenStore, bounded.  Pure: no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from xbd.core.xenstore.protocol import HEADER_SIZE, NUL, PAYLOAD_MAX, Op, encode, packet

THROTTLE_BYTES: Final = 64 << 10
"""With more waiting to be sent, no further request of this client is taken."""
LIMIT_BYTES: Final = 1 << 20
"""With more waiting to be sent, a client does not read its events, and is dropped."""
BATCH_BYTES: Final = 16 << 10


class Outbox:
    """Replies and events in order.  An event that already waits is not queued again."""

    def __init__(self, wake: Callable[[], object]) -> None:
        """`wake` is called when there is something to send, and when it is too much."""
        self._wake = wake
        self._waiting: deque[bytes] = deque()
        self._events: set[bytes] = set()
        self.bytes_waiting = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def full(self) -> bool:
        return self.bytes_waiting > THROTTLE_BYTES

    @property
    def overflown(self) -> bool:
        return self.bytes_waiting > LIMIT_BYTES

    def reply(self, data: bytes) -> None:
        self._waiting.append(data)
        self.bytes_waiting += len(data)
        if len(self._waiting) == 1 or self.overflown:
            self._wake()

    def event(self, path: bytes, token: bytes) -> None:
        """Queue a WATCH_EVENT, unless the client is beyond help anyway."""
        payload = path + NUL + token + NUL
        if len(payload) > PAYLOAD_MAX or self.overflown:
            return
        data = encode(packet(Op.WATCH_EVENT, payload, 0))
        if data not in self._events:
            self._events.add(data)
            self.reply(data)

    def take(self) -> bytes:
        """The next bytes to send; they still count as waiting until `sent`."""
        batch, size = [], 0
        while self._waiting and size < BATCH_BYTES:
            data = self._waiting.popleft()
            self._events.discard(data)
            batch.append(data)
            size += len(data)
        return b"".join(batch)

    def sent(self, count: int) -> None:
        self.bytes_waiting -= count


assert THROTTLE_BYTES > HEADER_SIZE + PAYLOAD_MAX
