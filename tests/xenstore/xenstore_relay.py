"""A relay in front of a live XenStore that can hang, cut and corrupt what passes."""

from __future__ import annotations

import os
import tty
from contextlib import asynccontextmanager
from pathlib import Path

import trio


class Relay:
    def __init__(self, path, target, nursery):
        self.path = path
        self.target = target
        self.second_client = trio.Event()
        self._accepted = 0
        self._nursery = nursery
        self._streams = []
        self._flowing = trio.Event()
        self._flowing.set()

    @classmethod
    @asynccontextmanager
    async def between(cls, path, target):
        async with trio.open_nursery() as nursery:
            relay = cls(path, target, nursery)
            with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as listener:
                await listener.bind(str(path))
                listener.listen()
                nursery.start_soon(relay._accept, listener)
                yield relay
                nursery.cancel_scope.cancel()

    def hang(self):
        """Pass nothing on, close nothing."""
        self._flowing = trio.Event()

    def resume(self):
        self._flowing.set()

    async def say(self, data):
        """Send these bytes to the clients, as if XenStore had."""
        for stream in self._streams:
            await stream.send_all(data)

    async def cut(self):
        for stream in self._streams:
            await stream.aclose()

    async def _accept(self, listener):
        while True:
            client, _ = await listener.accept()
            self._accepted += 1
            if self._accepted == 2:
                self.second_client.set()
            self._nursery.start_soon(self._serve, trio.SocketStream(client))

    async def _serve(self, client):
        self._streams.append(client)
        try:
            server = await trio.open_unix_socket(str(self.target))
        except OSError:
            await client.aclose()
            return
        async with server, client, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, client, server, nursery)
            nursery.start_soon(self._pass, server, client, nursery)
        self._streams.remove(client)

    async def _pass(self, source, sink, nursery):
        try:
            while data := await source.receive_some():
                await self._flowing.wait()
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def character_device(target):
    """A character device that passes packets on to XenStore, as the kernel's does (a pty)."""
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    try:
        async with await trio.open_unix_socket(str(target)) as server, trio.open_nursery() as pump:
            pump.start_soon(_from_device, master, server)
            pump.start_soon(_to_device, server, master)
            yield Path(os.ttyname(slave))
            pump.cancel_scope.cancel()
    finally:
        os.close(slave)
        os.close(master)


async def _from_device(master, server):
    while True:
        await trio.lowlevel.wait_readable(master)
        await server.send_all(os.read(master, 4096))


async def _to_device(server, master):
    while data := await server.receive_some():
        while data:
            await trio.lowlevel.wait_writable(master)
            data = data[os.write(master, data) :]
