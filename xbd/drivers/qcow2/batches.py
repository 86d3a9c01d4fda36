"""Many requests, few thread hops: those that arrive together are worked off together."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

import attrs
import trio

RequestT = TypeVar("RequestT")

MOST_REQUESTS: Final = 128
"""In one batch, unless they come together: bounds its memory, and how long the first one waits."""

PATIENCE_SECONDS: Final = 0.0005
"""How long a batch is alone.  What arrives meanwhile makes the next one: two threads that compute
at a time get in each other's way.  When storage is slow, the next batch does not wait for it."""


@attrs.define(eq=False)
class _Waiting(Generic[RequestT]):
    requests: Sequence[RequestT]
    task: trio.lowlevel.Task
    done: bool = False
    error: BaseException | None = None


class Batches(Generic[RequestT]):
    """Runs ``await work(requests)``, shielded from cancellation, in the task of one who has some.

    `work` notes the failure of a single request in that request; what it raises concerns all.
    """

    def __init__(self, work: Callable[[list[RequestT]], Awaitable[None]], most: int) -> None:
        """`most`: batches under way at a time."""
        self._work = work
        self._most = most
        self._queue: deque[_Waiting[RequestT]] = deque()
        self._running = 0
        self._gathering = False
        """Whether the first in the queue is about to lead a batch."""
        self._began = 0.0
        """When the last batch did."""

    async def run(self, requests: Sequence[RequestT], *, gather: bool = True) -> None:
        """Returns when the batch with these requests has ended; can't be cancelled before.

        `gather`: others may be about to come with some, and are waited for.
        """
        mine = _Waiting(requests, trio.lowlevel.current_task())
        self._queue.append(mine)
        begins = not self._gathering and self._may_begin()
        self._gathering = self._gathering or begins
        if begins and self._queue[0] is mine:
            if gather:
                # Those who were woken together with this task come along.
                await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            if begins:
                trio.lowlevel.reschedule(self._queue[0].task)
            await trio.lowlevel.wait_task_rescheduled(_never_aborted)
        if not mine.done:
            with trio.CancelScope(shield=True):
                await self._lead()
        if mine.error is not None:
            raise mine.error

    def _may_begin(self) -> bool:
        if not self._running:
            return True
        waited = trio.current_time() - self._began
        return self._running < self._most and waited > PATIENCE_SECONDS

    async def _lead(self) -> None:
        """Work off what waits; whoever calls is the first of it."""
        self._gathering = False
        self._running += 1
        self._began = trio.current_time()
        batch = [self._queue.popleft()]
        count = len(batch[0].requests)
        while self._queue and count + len(self._queue[0].requests) <= MOST_REQUESTS:
            batch.append(self._queue.popleft())
            count += len(batch[-1].requests)
        error: BaseException | None = None
        try:
            await self._work([request for waiting in batch for request in waiting.requests])
        except BaseException as raised:
            error = raised
        for waiting in batch:
            waiting.done = True
            waiting.error = error
        for waiting in batch[1:]:
            trio.lowlevel.reschedule(waiting.task)
        self._running -= 1
        if self._queue and not self._gathering:
            self._gathering = True
            trio.lowlevel.reschedule(self._queue[0].task)


def _never_aborted(_: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED
