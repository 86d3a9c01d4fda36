"""Runs ``xbd`` as a process, and waits for what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import partial

import trio

SECONDS = 60.0
"""Processes start slowly on a busy machine."""


class Process:
    """A running ``xbd``; what it writes to stderr is kept."""

    def __init__(self, process):
        self.process = process
        self.said = ""
        self.silent = False
        self._more = trio.Event()

    async def listen(self):
        async for chunk in self.process.stderr:
            self.said += chunk.decode()
            self._more.set()
            self._more = trio.Event()
        self.silent = True
        self._more.set()

    async def says(self, text):
        with trio.fail_after(SECONDS):
            while text not in self.said:
                assert not self.silent, self.said
                await self._more.wait()

    async def ends(self):
        with trio.fail_after(SECONDS):
            return await self.process.wait()

    async def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return await self.ends()


@asynccontextmanager
async def running(*arguments, **environment):
    command = [sys.executable, "-m", "xbd", *map(str, arguments)]
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    env.pop("JOURNAL_STREAM", None)
    async with trio.open_nursery() as nursery:
        start = partial(
            trio.run_process,
            command,
            stderr=subprocess.PIPE,
            check=False,
            env=env,
            deliver_cancel=kill,
        )
        process = Process(await nursery.start(start))
        nursery.start_soon(process.listen)
        yield process
        nursery.cancel_scope.cancel()


async def kill(process):
    process.kill()


async def run(*arguments, **environment):
    """A command that ends by itself: its status, stdout and stderr."""
    command = [sys.executable, "-m", "xbd", *map(str, arguments)]
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    with trio.fail_after(SECONDS):
        done = await trio.run_process(
            command, capture_stdout=True, capture_stderr=True, check=False, env=env
        )
    return done.returncode, done.stdout.decode(), done.stderr.decode()
