"""A machine of two processors whose stores reach memory late, run in every order.

Each processor has a store buffer, as x86 has (TSO): it sees its own stores at once, the other one
sees them when a fence, or the end, writes them out; an eager processor writes them out at once.
A processor stops before each step that the other one could notice or that notices the other one: a
load, and memory being written.  There the scheduler decides who goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

INDICES = 4


class Processor:
    """Runs one script in a thread of its own, a step at a time."""

    def __init__(self, memory: list[int], *, eager: bool) -> None:
        self.memory = memory
        self.eager = eager
        self.stores: list[tuple[int, int]] = []
        self.done = False
        self.error: BaseException | None = None
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    # -- what the ring sees: its words and its fence ----------------------------------------

    def __getitem__(self, index: int) -> int:
        self._stop()
        for at, value in reversed(self.stores):
            if at == index:
                return value
        return self.memory[index]

    def __setitem__(self, index: int, value: int) -> None:
        self.stores.append((index, value))
        if self.eager:
            self.fence()

    def fence(self) -> None:
        if self.stores:
            self._stop()
            self.drain()

    def no_fence(self) -> None:
        """What a fence would be if it were none."""

    def drain(self) -> None:
        for at, value in self.stores:
            self.memory[at] = value
        self.stores.clear()

    # -- what the scheduler sees ------------------------------------------------------------

    def start(self, script: Callable[[], None]) -> None:
        def run() -> None:
            self._go.acquire()
            try:
                script()
            except BaseException as error:
                self.error = error
            self.done = True
            self._stopped.release()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        if threading.current_thread() is self._thread:
            self._stopped.release()
            self._go.acquire()

    def step(self) -> None:
        self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error


def run(processors: Sequence[Processor], schedule: Sequence[int]) -> list[tuple[int, int]]:
    """Run to the end, by `schedule` while it lasts and then the first that can.

    Returns for each step who ran, and how many could have.
    """
    taken = []
    while runnable := [who for who, one in enumerate(processors) if not one.done]:
        wanted = schedule[len(taken)] if len(taken) < len(schedule) else 0
        who = runnable[wanted % len(runnable)]
        processors[who].step()
        taken.append((runnable.index(who), len(runnable)))
    for processor in processors:
        processor.drain()
    return taken


def every_schedule(attempt: Callable[[Sequence[int]], list[tuple[int, int]]]) -> int:
    """Call `attempt` with every schedule there is; returns how many there were."""
    waiting: list[tuple[int, ...]] = [()]
    count = 0
    while waiting:
        prefix = waiting.pop()
        taken = attempt(prefix)
        count += 1
        choices = tuple(choice for choice, _ in taken)
        for at in range(len(prefix), len(taken)):
            waiting += [(*choices[:at], other) for other in range(1, taken[at][1])]
    return count
