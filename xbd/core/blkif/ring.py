"""The two halves of a shared ring (xen/include/public/io/ring.h).

Indices run freely modulo 2**32; a slot is the index modulo the number of entries.  Each index is
one aligned 32-bit word in shared memory, read and written whole.  x86 and the interpreter keep
stores in order; where ring.h asks for a full barrier the `fence` is one, and it is run as well
where only a write or read barrier is needed, once per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from xbd.core.blkif.abi import RING_HEADER_BYTES, Abi, entries
from xbd.core.errors import RingCorrupt

_REQ_PROD: Final = 0
_REQ_EVENT: Final = 1
_RSP_PROD: Final = 2
_RSP_EVENT: Final = 3
_MASK: Final = 0xFFFFFFFF


class _Half:
    """What both halves share.  `view`: the ring's pages, writable, side by side."""

    def __init__(self, view: memoryview, abi: Abi, order: int, fence: Callable[[], None]) -> None:
        self.abi = abi
        self.entries = entries(order)
        self._fence = fence
        end = RING_HEADER_BYTES + self.entries * abi.request_size
        if len(view) < end:
            raise ValueError(f"{len(view)} bytes are too few for a ring of order {order}")
        self._words = view[: 4 * 4].cast("I")
        self._slots = view[RING_HEADER_BYTES:end]
        self._mask = self.entries - 1

    def release(self) -> None:
        """Let go of the shared memory, so that it can be unmapped."""
        self._words.release()
        self._slots.release()


class BackRing(_Half):
    """The backend's half.  `attach`: go on where the shared page says the last backend stopped."""

    def __init__(
        self,
        view: memoryview,
        abi: Abi,
        order: int,
        *,
        fence: Callable[[], None],
        attach: bool = False,
    ) -> None:
        super().__init__(view, abi, order, fence)
        start = self._words[_RSP_PROD] if attach else 0
        self.req_cons = start
        self.rsp_prod_pvt = start
        self._rsp_prod = start
        self._pack = abi.response.pack_into

    @property
    def unanswered(self) -> int:
        """Requests in the ring that have no published answer, by the frontend's word; bounded."""
        return min((self._words[_REQ_PROD] - self._rsp_prod) & _MASK, self.entries)

    def slot(self, index: int) -> bytes:
        """A copy of what lies in a slot now."""
        at = (index & self._mask) * self.abi.request_size
        return bytes(self._slots[at : at + self.abi.request_size])

    def resume(self, consumed: int) -> None:
        """Go on behind so many requests that an earlier backend consumed and did not answer."""
        self.req_cons = (self.rsp_prod_pvt + consumed) & _MASK

    def take(self, limit: int | None = None) -> bytes:
        """Copy all requests that are there (at most `limit`), once; they count as consumed.

        Raises `RingCorrupt` when the frontend claims more than the ring holds.
        """
        waiting = self._waiting()
        if not waiting:
            return b""
        self._fence()
        count = waiting if limit is None else min(waiting, limit)
        size = self.abi.request_size
        first = self.req_cons & self._mask
        last = first + count
        slots = self._slots
        if last <= self.entries:
            copy = bytes(slots[first * size : last * size])
        else:
            copy = bytes(slots[first * size :]) + bytes(slots[: (last - self.entries) * size])
        self.req_cons = (self.req_cons + count) & _MASK
        return copy

    def _waiting(self) -> int:
        """Requests not consumed yet.  Reads req_prod once; raises `RingCorrupt`."""
        req_prod = self._words[_REQ_PROD]
        waiting = (req_prod - self.req_cons) & _MASK
        room = self.entries - ((self.req_cons - self.rsp_prod_pvt) & _MASK)
        if waiting > room:
            claimed = (req_prod - self.rsp_prod_pvt) & _MASK
            if claimed > self.entries:
                raise RingCorrupt(
                    f"the frontend claims {claimed} requests in a ring of {self.entries}"
                )
            raise RingCorrupt("the frontend took back requests that were consumed already")
        return waiting

    def answer(self, request_id: int, operation: int, status: int) -> None:
        """Write the next response; nobody sees it before `push`.

        It takes the place of a request, which therefore has to be consumed.
        """
        assert self.rsp_prod_pvt != self.req_cons, "more answers than requests"
        at = (self.rsp_prod_pvt & self._mask) * self.abi.request_size
        self._pack(self._slots, at, request_id, operation, status)
        self.rsp_prod_pvt = (self.rsp_prod_pvt + 1) & _MASK

    def answer_many(self, answers: Sequence[tuple[int, int, int, int]]) -> None:
        """Like `answer` for each: journal slot (which stays here), id, operation, status."""
        consumed = (self.req_cons - self.rsp_prod_pvt) & _MASK
        assert len(answers) <= consumed, "more answers than requests"
        pack, slots, mask, size = self._pack, self._slots, self._mask, self.abi.request_size
        at = self.rsp_prod_pvt
        for _, request_id, operation, status in answers:
            pack(slots, (at & mask) * size, request_id, operation, status)
            at += 1
        self.rsp_prod_pvt = at & _MASK

    def push(self) -> bool:
        """Publish the responses; True if the frontend wants an event."""
        old, new = self._rsp_prod, self.rsp_prod_pvt
        if old == new:
            return False
        self._fence()
        self._words[_RSP_PROD] = new
        self._rsp_prod = new
        self._fence()
        return (new - self._words[_RSP_EVENT]) & _MASK < (new - old) & _MASK

    def final_check(self) -> bool:
        """Before sleeping: ask for an event with the next request; True if one is there already.

        Raises `RingCorrupt`.
        """
        if self._waiting():
            return True
        self._words[_REQ_EVENT] = (self.req_cons + 1) & _MASK
        self._fence()
        return self._waiting() > 0


class FrontRing(_Half):
    """The frontend's half; makes the shared page."""

    def __init__(
        self, view: memoryview, abi: Abi, order: int, *, fence: Callable[[], None], start: int = 0
    ) -> None:
        """`start`: first index, for tests of the wrap-around."""
        super().__init__(view, abi, order, fence)
        view[:RING_HEADER_BYTES] = bytes(RING_HEADER_BYTES)
        words = self._words
        words[_REQ_PROD] = words[_RSP_PROD] = start
        words[_REQ_EVENT] = words[_RSP_EVENT] = (start + 1) & _MASK
        self.req_prod_pvt = start
        self.rsp_cons = start
        self._req_prod = start

    @property
    def free(self) -> int:
        """How many requests can be submitted."""
        return self.entries - ((self.req_prod_pvt - self.rsp_cons) & _MASK)

    def submit(self, entry: bytes) -> None:
        """Write a request; nobody sees it before `push`."""
        assert self.free, "the ring is full"
        at = (self.req_prod_pvt & self._mask) * self.abi.request_size
        self._slots[at : at + self.abi.request_size] = entry
        self.req_prod_pvt = (self.req_prod_pvt + 1) & _MASK

    def push(self) -> bool:
        """Publish the requests; True if the backend wants an event."""
        old, new = self._req_prod, self.req_prod_pvt
        if old == new:
            return False
        self._fence()
        self._words[_REQ_PROD] = new
        self._req_prod = new
        self._fence()
        return (new - self._words[_REQ_EVENT]) & _MASK < (new - old) & _MASK

    def responses(self) -> list[tuple[int, int, int]]:
        """All responses that are there: id, operation, status.

        Raises `RingCorrupt` when the backend claims more than was asked.
        """
        rsp_prod = self._words[_RSP_PROD]
        count = (rsp_prod - self.rsp_cons) & _MASK
        if count > (self._req_prod - self.rsp_cons) & _MASK:
            raise RingCorrupt(f"the backend claims {count} responses")
        self._fence()
        unpack = self.abi.response.unpack_from
        size = self.abi.request_size
        found = []
        for index in range(self.rsp_cons, self.rsp_cons + count):
            found.append(unpack(self._slots, (index & self._mask) * size))
        self.rsp_cons = rsp_prod
        return found

    def final_check(self) -> bool:
        """Before sleeping: ask for an event with the next response; True if one is there."""
        if self._words[_RSP_PROD] != self.rsp_cons:
            return True
        self._words[_RSP_EVENT] = (self.rsp_cons + 1) & _MASK
        self._fence()
        return self._words[_RSP_PROD] != self.rsp_cons
