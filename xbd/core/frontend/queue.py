"""One ring of a frontend: requests in flight, and the answers that end them."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import trio

from xbd.core.blkif import Abi, FrontRing
from xbd.core.frontend.errors import FrontendError
from xbd.core.hostio.fence import full_fence
from xbd.core.hypervisor.embedded_guest import GuestDomain, GuestPort
from xbd.core.units import PAGE_SIZE, Domid, GrantRef


@attrs.define(eq=False)
class _Pending:
    operation: int
    answered: trio.Event = attrs.field(factory=trio.Event)
    status: int | None = None


class FrontQueue:
    """The front half of a ring with its pages and port.  As strict as Linux: an answer to a
    request that is not there, or with another operation, breaks the queue for good."""

    def __init__(
        self, guest: GuestDomain, port: GuestPort, backend: Domid, abi: Abi, order: int
    ) -> None:
        self.port = port
        self._guest = guest
        self.refs: list[GrantRef] = guest.alloc_pages(1 << order)
        first = self.refs[0]
        if self.refs != list(range(first, first + len(self.refs))):
            guest.free_pages(self.refs)
            raise FrontendError("no pages side by side are left for the ring")
        view = guest.memory[first * PAGE_SIZE : (first + len(self.refs)) * PAGE_SIZE]
        self.ring = FrontRing(view, abi, order, fence=full_fence)
        for ref in self.refs:
            guest.grant(ref, backend, readonly=False)
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._room = trio.lowlevel.ParkingLot()
        self._broken: FrontendError | None = None

    @property
    def in_flight(self) -> int:
        """Requests without an answer."""
        return len(self._pending)

    async def request(self, operation: int, encode: Callable[[int], bytes]) -> int:
        """Send what `encode` makes for an id; the answer's status.

        Waits while the ring is full.  Raises `FrontendError` when the ring is broken.
        """
        while not self.ring.free and self._broken is None:
            await self._room.park()
        if self._broken is not None:
            raise self._broken
        request_id = self._next_id
        self._next_id += 1
        pending = self._pending[request_id] = _Pending(operation)
        self.ring.submit(encode(request_id))
        if self.ring.push():
            self.port.notify()
        await pending.answered.wait()
        if pending.status is None:
            assert self._broken is not None
            raise self._broken
        return pending.status

    async def run(self) -> None:
        """Take answers until cancelled.  Raises `FrontendError` when the backend cheats."""
        while True:
            self._take_answers()
            if self.ring.final_check():
                await trio.lowlevel.checkpoint()
                continue
            await trio.lowlevel.wait_readable(self.port.fd)
            self.port.take()

    def _take_answers(self) -> None:
        for request_id, operation, status in self.ring.responses():
            pending = self._pending.pop(request_id, None)
            if pending is None or pending.operation != operation:
                error = FrontendError(
                    f"the backend answered request {request_id} (operation {operation}), "
                    "which is not in flight"
                )
                self.fail(error)
                raise error
            pending.status = status
            pending.answered.set()
        self._room.unpark_all()

    def fail(self, error: FrontendError) -> None:
        """Nothing more will be answered: end everything that waits."""
        self._broken = error
        for pending in self._pending.values():
            pending.answered.set()
        self._pending.clear()
        self._room.unpark_all()

    def release(self) -> None:
        """Take the ring's pages and port back."""
        self.ring.release()
        for ref in self.refs:
            self._guest.revoke(ref)
        self._guest.free_pages(self.refs)
        self.port.close()
