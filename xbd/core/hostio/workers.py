"""Blocking calls in threads, at a third of what trio's own way costs.

A caller has a thread to itself for the length of its call, and waits on that thread's event.
Measured for a call that does nothing: 35 us of CPU, against 100 us by `trio.to_thread.run_sync`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import trio

_Call = tuple[Callable[..., Any], tuple[Any, ...]]


class Workers:
    """Up to `most` threads, started when they are needed, kept until `close`."""

    def __init__(self, most: int, name: str) -> None:
        """`name` is what debuggers see."""
        self._name = name
        self._startable = most
        self._idle: list[_Worker] = []
        self._waiting: deque[trio.Event] = deque()
        self._closed = False

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` in a thread.

        It is never abandoned: cancelled, this still waits for the call's end, and then returns
        what it returned.
        """
        worker = await self._take()
        try:
            with trio.CancelScope(shield=True):
                return await worker.run(function, args)
        finally:
            self._put(worker)

    async def _take(self) -> _Worker:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._idle:
            if self._startable:
                self._startable -= 1
                return _Worker(self._name)
            turn = trio.Event()
            self._waiting.append(turn)
            try:
                await turn.wait()
            except BaseException:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._wake()  # the turn was given in vain
                raise
        return self._idle.pop()

    def _put(self, worker: _Worker) -> None:
        if self._closed:
            worker.stop()
            return
        self._idle.append(worker)
        self._wake()

    def _wake(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()

    def close(self) -> None:
        """End the threads: idle ones now, the others with their calls.  Idempotent."""
        self._closed = True
        while self._idle:
            self._idle.pop().stop()


class _Worker:
    """One thread.  It does not keep the process alive: its call may never end."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._done, self._wake = _event_fds()
        self._result: tuple[Any, BaseException | None] = (None, None)
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    async def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._calls.put((function, args))
        await trio.lowlevel.wait_readable(self._done)
        os.read(self._done, 8)
        value, error = self._result
        self._result = (None, None)
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        return value

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            function, args = call
            try:
                self._result = (function(*args), None)
            except BaseException as error:
                self._result = (None, error)
            del call, function, args
            os.write(self._wake, _ONE)
        for fd in {self._done, self._wake}:
            os.close(fd)

    def stop(self) -> None:
        self._calls.put(None)


_ONE = (1).to_bytes(8, sys.byteorder)


def _event_fds() -> tuple[int, int]:
    """What becomes readable, and what makes it so by 8 bytes: an eventfd, or else a pipe."""
    if hasattr(os, "eventfd"):
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        return fd, fd
    return os.pipe()
