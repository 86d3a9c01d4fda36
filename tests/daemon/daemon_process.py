"""Runs ``xbd`` as a process, and waits for what it says; and a guest for it, in the test itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import partial

import trio

from xbd.core.frontend.device import connect
from xbd.core.frontend.options import FrontendOptions
from xbd.core.frontend.toolstack import DiskLine, Toolstack
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import Domid
from xbd.core.xenstore.client import StoreClient

SECONDS = 60.0
"""Processes start slowly on a busy machine."""
DOMID = Domid(5)


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
async def starter():
    """A function that starts processes; those that are left at the end are killed."""
    async with trio.open_nursery() as nursery:

        async def start(*arguments, **environment):
            run_it = partial(
                trio.run_process,
                [sys.executable, "-m", "xbd", *map(str, arguments)],
                stderr=subprocess.PIPE,
                check=False,
                env=environment_with(environment),
                deliver_cancel=kill,
            )
            process = Process(await nursery.start(run_it))
            nursery.start_soon(process.listen)
            return process

        yield start
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def running(*arguments, **environment):
    async with starter() as start:
        yield await start(*arguments, **environment)


def environment_with(more):
    env = {**os.environ, **{name: str(value) for name, value in more.items()}}
    env.pop("JOURNAL_STREAM", None)
    return env


async def kill(process):
    process.kill()


async def run(*arguments, **environment):
    """A command that ends by itself: its status, stdout and stderr."""
    command = [sys.executable, "-m", "xbd", *map(str, arguments)]
    with trio.fail_after(SECONDS):
        done = await trio.run_process(
            command,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=environment_with(environment),
        )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@asynccontextmanager
async def guest_with(directory, line):
    """A guest with one disk attached; its toolstack and memory."""
    async with (
        StoreClient.connect(directory / "xenstored.socket") as store,
        GuestDomain.connect(directory, DOMID, pages=2048) as guest,
    ):
        toolstack = Toolstack(store)
        await toolstack.create_domain(DOMID, "test")
        await toolstack.attach(DOMID, line)
        yield toolstack, store, guest


@asynccontextmanager
async def disk_of(directory, guest, line, options=None):
    path = directory / f"xenstored-{DOMID}.socket"
    async with (
        StoreClient.connect(path) as own,
        connect(own, guest, line.devid, options) as disk,
    ):
        yield disk


@asynccontextmanager
async def guest_disk(directory, target):
    """A guest's disk, connected, and detached at the end."""
    line = DiskLine(target=target)
    options = FrontendOptions(ring_order=1, queues=1)
    async with guest_with(directory, line) as (toolstack, _, guest):
        async with disk_of(directory, guest, line, options) as disk:
            yield disk
        await toolstack.detach(DOMID, line)
        await toolstack.destroy_domain(DOMID)
