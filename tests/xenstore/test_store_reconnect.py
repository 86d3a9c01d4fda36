"""XenStore dies, hangs, comes back, or never was there."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing
from xenstore_relay import Relay, character_device

from xbd.core.errors import StoreLost, StoreUnavailable
from xbd.core.units import Domid
from xbd.core.xenstore.client import StoreClient
from xbd.core.xenstore.places import default_store_path, unavailable
from xbd.core.xenstore.server import EmbeddedXenStore

WITHIN_S = 15


@pytest.fixture
async def relay(server, store_dir):
    async with Relay.between(store_dir / "relay", server.path) as between:
        yield between


async def until_lost(guest):
    while True:
        await guest.domain_path(0)


class Killable:
    """An embedded XenStore in a process of its own."""

    def __init__(self, directory):
        self.directory = directory
        self.path = directory / "xenstored.socket"

    async def start(self):
        code = (
            "import sys, trio; from pathlib import Path;"
            "from xbd.core.xenstore.server import EmbeddedXenStore\n"
            "async def main():\n"
            "    async with EmbeddedXenStore.serve(Path(sys.argv[1])):\n"
            "        print('up', flush=True); await trio.sleep_forever()\n"
            "trio.run(main)"
        )
        self.process = await trio.lowlevel.open_process(
            [sys.executable, "-c", code, str(self.directory)], stdout=subprocess.PIPE
        )
        said = b""
        while said != b"up\n":
            said += await self.process.stdout.receive_some()

    async def kill(self):
        """As kill -9 does."""
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()
        await self.process.stdout.aclose()


async def test_back_within_a_second_and_watching_again(store_dir):
    xenstored = Killable(store_dir)
    with trio.fail_after(WITHIN_S):
        await xenstored.start()
        async with StoreClient.connect(xenstored.path) as store, store.watch("/a") as watch:
            assert await watch.changed() == ["/a"]
            assert store.generation == 1
            await xenstored.kill()
            await xenstored.start()
            try:
                with trio.fail_after(1):
                    assert await watch.changed() == ["/a"]
                    assert store.generation == 2
                    await store.write("/a/b", "1")
                while "/a/b" not in await watch.changed():
                    pass
            finally:
                await xenstored.kill()


async def test_listeners_are_called_when_it_is_back(relay):
    called = trio.Event()
    with trio.fail_after(WITHIN_S):
        async with StoreClient.connect(relay.path) as store:
            async with store.listen("/a", lambda: called.set()):
                await called.wait()
                called = trio.Event()
                await relay.cut()
                await called.wait()
                called = trio.Event()
                await store.write("/a/b", "1")
                await called.wait()
            assert store.generation == 2


async def test_calls_in_progress_are_lost_and_later_ones_wait(relay):
    with trio.fail_after(WITHIN_S):
        async with StoreClient.connect(relay.path) as store:
            relay.hang()
            async with trio.open_nursery() as nursery:

                async def call():
                    with pytest.raises(StoreLost, match="closed"):
                        await store.read("/")

                for _ in range(100):
                    nursery.start_soon(call)
                await trio.testing.wait_all_tasks_blocked()
                await relay.cut()
            relay.resume()
            assert await store.read("/") == ""
            assert store.generation == 2


async def test_a_hang_is_noticed_by_deadline(relay):
    with trio.fail_after(WITHIN_S):
        connection = StoreClient.connect(relay.path, answer_within_s=0.2)
        async with connection as store, store.watch("/a") as watch:
            await watch.changed()
            relay.hang()
            with pytest.raises(StoreLost, match=r"no answer within 0\.2 s"):
                await store.read("/a")
            relay.resume()
            assert await watch.changed() == ["/a"]
            assert await store.read("/a") is None


async def test_a_hang_in_silence_is_noticed_too(relay):
    with trio.fail_after(WITHIN_S):
        connection = StoreClient.connect(relay.path, answer_within_s=0.2, probe_after_s=0.1)
        async with connection as store, store.watch("/a") as watch:
            await watch.changed()
            relay.hang()
            await relay.second_client.wait()
            relay.resume()
            assert await watch.changed() == ["/a"]


async def test_a_transaction_is_lost_as_a_whole(relay):
    with trio.fail_after(WITHIN_S):
        async with StoreClient.connect(relay.path) as store:

            async def body(reader):
                await reader.write("/a", "1")
                await relay.cut()
                await reader.write("/b", "1")

            with pytest.raises(StoreLost):
                await store.transact(body)
            assert await store.read("/a") is None


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("IIII", 2, 1, 0, 4097),
        struct.pack("IIII", 2, 4_000_000_000, 0, 0),
        struct.pack("IIII", 15, 0, 0, 4) + b"a\0b\0" + b"\xff" * 16,
        struct.pack("IIII", 15, 0, 0, 1) + b"\0",
        bytes(range(256)),
    ],
    ids=["too-long", "unknown-id", "event-then-junk", "no-token", "junk"],
)
async def test_garbage_costs_the_connection_only(relay, data):
    with trio.fail_after(WITHIN_S):
        async with StoreClient.connect(relay.path) as store, store.watch("/a") as watch:
            await watch.changed()
            await relay.say(data)
            assert await watch.changed() == ["/a"]
            assert store.generation == 2
            assert await store.read("/") == ""


async def test_watching_while_it_hangs(relay):
    """The first attempt is lost with the connection, and made again on the next one."""
    with trio.fail_after(WITHIN_S):
        async with StoreClient.connect(relay.path, answer_within_s=0.3) as store:
            relay.hang()
            async with trio.open_nursery() as nursery:

                async def look():
                    async with store.watch("/a") as watch:
                        assert await watch.changed() == ["/a"]
                        await store.write("/a", "1")
                        assert "/a" in await watch.changed()

                nursery.start_soon(look)
                await trio.testing.wait_all_tasks_blocked()
                await relay.cut()
                relay.resume()
            assert store.generation >= 2


async def test_watches_given_up_leave_nothing_behind(server):
    with trio.fail_after(WITHIN_S):
        async with StoreClient.connect(server.path) as store:
            for number in range(50):
                with trio.CancelScope() as scope:
                    scope.deadline = trio.current_time() + number / 50_000
                    async with store.watch("/a"):
                        pass
            await store.read("/")
            assert server.watches_of(0) == 0
            assert server.transactions_of(0) == 0


async def test_patience_ends(relay):
    with trio.fail_after(WITHIN_S):
        connection = StoreClient.connect(relay.path, patience_s=0.3)
        async with connection as store, store.watch("/a") as watch:
            await watch.changed()
            relay.path.unlink()
            await relay.cut()
            with pytest.raises(StoreLost, match=r"within 0\.3 s"):
                await watch.changed()
            with pytest.raises(StoreLost, match=r"within 0\.3 s"):
                await store.read("/")


async def test_errors_of_the_body_are_not_wrapped(server):
    with pytest.raises(LookupError):
        async with StoreClient.connect(server.path):
            raise LookupError


async def test_closed_for_good(server):
    async with StoreClient.connect(server.path) as store, store.watch("/a") as watch:
        await watch.changed()
    with pytest.raises(StoreLost, match="closed"):
        await watch.changed()
    with pytest.raises(StoreLost, match="closed"):
        await store.read("/")


async def test_through_a_character_device(server):
    async with character_device(server.path) as device:
        with trio.fail_after(WITHIN_S):
            async with StoreClient.connect(device) as store, store.watch("/a") as watch:
                await watch.changed()
                await store.write("/a/b", "x" * 2000)
                assert await watch.changed() == ["/a/b"]
                assert await store.read("/a/b") == "x" * 2000
                await store.write_all({f"/a/{number}": str(number) for number in range(100)})
                assert await store.read_all(["/a/7", "/b", "/a/99"]) == ["7", None, "99"]


async def test_nothing_there(store_dir):
    with pytest.raises(StoreUnavailable, match=r"No such file.*is xenstored running"):
        async with StoreClient.connect(store_dir / "socket"):
            pass


async def test_a_dead_socket(store_dir):
    path = store_dir / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(StoreUnavailable, match="nobody answers"):
        async with StoreClient.connect(path):
            pass


async def test_not_a_socket(store_dir):
    path = store_dir / "file"
    path.write_text("")
    with pytest.raises(StoreUnavailable, match="neither a socket nor a device"):
        async with StoreClient.connect(path):
            pass


def test_no_permission():
    """Root may connect everywhere, so this asks only for the text."""
    error = unavailable(Path("/run/xenstored/socket"), PermissionError(13, "Permission denied"))
    assert str(error).endswith("/run/xenstored/socket: Permission denied (run as root)")


async def test_a_server_that_hangs_from_the_start(relay):
    relay.hang()
    with pytest.raises(StoreUnavailable, match=r"not a working XenStore.*no answer"):
        async with StoreClient.connect(relay.path, answer_within_s=0.1):
            pass


async def test_a_server_that_is_something_else(store_dir):
    async def greet(stream):
        await stream.send_all(b"220 mail.example ESMTP ready, what do you want?\r\n")

    path = store_dir / "other"
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, greet, [trio.SocketListener(listener)])
            with pytest.raises(StoreUnavailable, match="not a working XenStore"):
                async with StoreClient.connect(path):
                    pass
            nursery.cancel_scope.cancel()


def test_default_path(monkeypatch):
    monkeypatch.setenv("XENSTORED_PATH", "/somewhere/socket")
    assert str(default_store_path()) == "/somewhere/socket"
    monkeypatch.delenv("XENSTORED_PATH")
    assert default_store_path().is_absolute()


async def test_released_domain_loses_its_connection(server):
    with trio.fail_after(WITHIN_S):
        async with StoreClient.connect(server.path) as dom0:
            await dom0.introduce(Domid(3))
            async with StoreClient.connect(server.path_for(Domid(3)), patience_s=0.1) as guest:
                await dom0.release(Domid(3))
                with pytest.raises(StoreLost):
                    await until_lost(guest)


async def test_a_cancelled_caller_can_still_tidy_up(tmp_path):
    async with EmbeddedXenStore.serve(tmp_path) as server:
        with trio.move_on_after(0.05) as scope:
            async with StoreClient.connect(server.path) as store:
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True), trio.fail_after(5):
                        await store.write("/tool/tidy", "done")
        assert scope.cancelled_caught
        async with StoreClient.connect(server.path) as store:
            assert await store.read("/tool/tidy") == "done"


async def test_a_client_that_is_cancelled_while_it_connects_ends(tmp_path):
    async with EmbeddedXenStore.serve(tmp_path) as server:
        for steps in range(12):
            with trio.fail_after(5), trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_after, steps, scope)
                    async with StoreClient.connect(server.path):
                        await trio.sleep_forever()
            assert scope.cancelled_caught


async def _cancel_after(steps, scope):
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    scope.cancel()
