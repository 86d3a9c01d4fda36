"""The embedded XenStore over its sockets: domains, rights, quotas, and clients that misbehave."""

from __future__ import annotations

import errno
import random
import socket
import struct
import tracemalloc

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.errors import ConfigError, StoreError
from xbd.core.units import Domid
from xbd.core.xenstore.client import StoreClient
from xbd.core.xenstore.client_watch import ClientWatch
from xbd.core.xenstore.outbox import LIMIT_BYTES, Outbox
from xbd.core.xenstore.protocol import NUL, Op, PacketStream, WireError, encode, packet
from xbd.core.xenstore.quotas import Quotas
from xbd.core.xenstore.server import EmbeddedXenStore, serve_forever

WITHIN_S = 20
GUEST = Domid(5)


@pytest.fixture
async def dom0(server):
    async with StoreClient.connect(server.path) as store:
        yield store


@pytest.fixture
async def guest(server, dom0):
    """Domain 5, with a directory of its own."""
    await dom0.introduce(GUEST)
    await dom0.mkdir("/local/domain/5")
    await dom0.set_permissions("/local/domain/5", ["n5"])
    async with StoreClient.connect(server.path_for(GUEST)) as store:
        yield store


async def refusal(call, *arguments):
    with pytest.raises(StoreError) as caught:
        await call(*arguments)
    return errno.errorcode[caught.value.errno]


class RawClient:
    """Sends what no decent client does."""

    def __init__(self, stream):
        self.stream = stream
        self.packets = PacketStream()
        self.received = []

    @classmethod
    async def connect(cls, path):
        return cls(await trio.open_unix_socket(str(path)))

    async def send(self, op, payload, req_id=1, tx_id=0):
        await self.stream.send_all(encode(packet(op, payload, req_id, tx_id)))

    async def answer(self):
        while not self.received:
            data = await self.stream.receive_some()
            assert data, "the server closed the connection"
            self.received += self.packets.feed(data)
        return self.received.pop(0)

    async def ask(self, op, payload, tx_id=0):
        await self.send(op, payload, tx_id=tx_id)
        answer = await self.answer()
        return answer.payload if answer.op != Op.ERROR else answer.payload.rstrip(NUL).decode()

    async def closed_by_server(self):
        try:
            while await self.stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        await self.stream.aclose()


async def test_guest_in_its_own_directory(guest, dom0):
    await guest.write("device/vbd/768/state", "1")
    assert await dom0.read("/local/domain/5/device/vbd/768/state") == "1"
    assert await dom0.get_permissions("/local/domain/5/device") == ["n5"]
    assert await guest.domain_path(5) == "/local/domain/5"


async def test_guest_elsewhere(guest, dom0):
    await dom0.write("/local/domain/0/backend/vbd/5/768/state", "2")
    assert await refusal(guest.read, "/local/domain/0/backend/vbd/5/768/state") == "EACCES"
    await dom0.set_permissions("/local/domain/0/backend/vbd/5/768", ["n0", "r5"])
    await dom0.write("/local/domain/0/backend/vbd/5/768/online", "1")
    assert await guest.read("/local/domain/0/backend/vbd/5/768/online") == "1"
    path = "/local/domain/0/backend/vbd/5/768/online"
    assert await refusal(guest.write, path, "0") == "EACCES"
    assert await refusal(guest.introduce, Domid(6)) == "EACCES"
    assert await refusal(guest.release, Domid(5)) == "EACCES"


async def test_events_need_the_right_to_read(guest, dom0):
    with trio.fail_after(WITHIN_S):
        async with guest.watch("/secret") as watch:
            assert await watch.changed() == ["/secret"]
            await dom0.write("/secret/a", "1")
            await guest.domain_path(0)
            assert not watch.pending
            await dom0.write("/secret/b", "1")
            await dom0.set_permissions("/secret/b", ["n0", "r5"])
            assert await watch.changed() == ["/secret/b"]
            await dom0.set_permissions("/secret/b", ["n0"])  # heard: it could read it before
            assert await watch.changed() == ["/secret/b"]
            await dom0.write("/secret/b", "2")
            await guest.domain_path(0)
            assert not watch.pending


async def test_relative_watches_report_relative_paths(guest, dom0):
    with trio.fail_after(WITHIN_S):
        async with guest.watch("device") as watch:
            assert await watch.changed() == ["device"]
            await dom0.write("/local/domain/5/device/vbd/768/state", "1")
            assert await watch.changed() == ["device/vbd/768/state"]


async def test_domains_come_and_go(server, dom0):
    with trio.fail_after(WITHIN_S):
        async with dom0.watch("@introduceDomain") as come, dom0.watch("@releaseDomain") as gone:
            await come.changed()
            await gone.changed()
            await dom0.introduce(Domid(7))
            assert await come.changed() == ["@introduceDomain"]
            assert await dom0.is_introduced(Domid(7))
            assert server.path_for(Domid(7)).exists()
            await dom0.introduce(Domid(7))
            await dom0.write("/local/domain/7/a", "1")
            await dom0.set_permissions("/local/domain/7/a", ["n7"])
            await dom0.release(Domid(7))
            assert await gone.changed() == ["@releaseDomain"]
            assert not come.pending
            assert not await dom0.is_introduced(Domid(7))
            assert not server.path_for(Domid(7)).exists()
            assert await dom0.read("/local/domain/7/a") is None
            assert await refusal(dom0.release, Domid(7)) == "ENOENT"
            assert await refusal(dom0.introduce, Domid(0)) == "EINVAL"


async def test_special_watches_need_permission(guest, dom0):
    with trio.fail_after(WITHIN_S):
        async with guest.watch("@releaseDomain") as watch:
            await watch.changed()
            await dom0.introduce(Domid(6))
            await dom0.release(Domid(6))
            await guest.domain_path(0)
            assert not watch.pending
            await dom0.set_permissions("@releaseDomain", ["n0", "r5"])
            await dom0.introduce(Domid(6))
            await dom0.release(Domid(6))
            assert await watch.changed() == ["@releaseDomain"]


async def test_quotas_of_a_guest(store_dir):
    quotas = Quotas(nodes=20, watches=2, transactions=2, connections=2)
    async with EmbeddedXenStore.serve(store_dir, quotas=quotas) as server:
        server.introduce(GUEST)
        one = await RawClient.connect(server.path_for(GUEST))
        two = await RawClient.connect(server.path_for(GUEST))
        with trio.fail_after(WITHIN_S):
            for client, token in ((one, b"1"), (two, b"2")):
                assert await client.ask(Op.WATCH, b"a\0" + token + NUL) == b"OK\0"
                assert (await client.answer()).payload == b"a\0" + token + NUL
            assert await one.ask(Op.WATCH, b"a\x003\0") == "ENOSPC"
            assert await one.ask(Op.WATCH, b"a\x001\0") == "EEXIST"
            assert await one.ask(Op.UNWATCH, b"a\x009\0") == "ENOENT"
            assert await one.ask(Op.TRANSACTION_START, NUL) == b"1\0"
            assert await two.ask(Op.TRANSACTION_START, NUL) == b"1\0"
            assert await two.ask(Op.TRANSACTION_START, NUL) == "ENOSPC"
            assert await two.ask(Op.TRANSACTION_START, NUL, tx_id=1) == "EBUSY"
            assert await two.ask(Op.TRANSACTION_END, b"F\0", tx_id=9) == "ENOENT"
            assert await two.ask(Op.TRANSACTION_END, b"X\0", tx_id=1) == "EINVAL"
            three = await RawClient.connect(server.path_for(GUEST))
            await three.closed_by_server()
            await two.stream.aclose()
            await trio.testing.wait_all_tasks_blocked()
            assert await one.ask(Op.WATCH, b"a\x003\0") == b"OK\0"
            await one.stream.aclose()


async def test_reset_watches(server):
    client = await RawClient.connect(server.path)
    with trio.fail_after(WITHIN_S):
        await client.ask(Op.WATCH, b"/a\0t\0")
        await client.answer()
        assert server.watches_of(0) == 1
        assert await client.ask(21, NUL) == b"OK\0"
        assert server.watches_of(0) == 0
        await client.stream.aclose()


@pytest.mark.parametrize(
    ("op", "payload", "expected"),
    [
        (Op.READ, b"/", "EINVAL"),
        (Op.READ, b"", "EINVAL"),
        (Op.READ, b"/a\0/b\0", "EINVAL"),
        (Op.READ, b"@releaseDomain\0", "EINVAL"),
        (Op.WRITE, b"/a", "EINVAL"),
        (Op.RM, b"/\0", "EINVAL"),
        (Op.RM, b"/no/such\0", "ENOENT"),
        (Op.WATCH, b"/a\0", "EINVAL"),
        (Op.WATCH, b"@other\0t\0", "EINVAL"),
        (Op.SET_PERMS, b"", "EINVAL"),
        (Op.SET_PERMS, b"/\0", "EINVAL"),
        (Op.SET_PERMS, b"/\0x1\0", "EINVAL"),
        (Op.INTRODUCE, b"5\0", "EINVAL"),
        (Op.INTRODUCE, b"5\x001\0" + b"9" * 30 + NUL, "EINVAL"),
        (Op.GET_DOMAIN_PATH, b"-1\0", "EINVAL"),
        (Op.SET_TARGET, b"5\x006\0", "ENOENT"),
        (Op.RESUME, b"5\0", "ENOENT"),
        (Op.DEBUG, b"print\0x\0", "EINVAL"),
        (Op.WATCH_EVENT, b"/a\0t\0", "ENOSYS"),
        (Op.ERROR, b"", "ENOSYS"),
        (23, b"", "ENOSYS"),
        (0xFFFF_FFFF, b"", "ENOSYS"),
        (22, b"/\0x\0", "EINVAL"),
    ],
)
async def test_refusals(server, op, payload, expected):
    client = await RawClient.connect(server.path)
    with trio.fail_after(WITHIN_S):
        assert await client.ask(op, payload) == expected
        await client.stream.aclose()


async def test_bytes_in_pieces_and_packets_in_heaps(server):
    client = await RawClient.connect(server.path)
    with trio.fail_after(WITHIN_S):
        data = encode(packet(Op.WRITE, b"/a\0value", 7))
        for byte in data:
            await client.stream.send_all(bytes([byte]))
        assert (await client.answer()).rq_id == 7
        await client.stream.send_all(
            b"".join(encode(packet(Op.READ, b"/a\0", number)) for number in range(500))
        )
        for number in range(500):
            answer = await client.answer()
            assert (answer.rq_id, answer.payload) == (number, b"value")
        await client.stream.aclose()


async def test_too_long_a_packet_costs_the_connection(server, dom0):
    client = await RawClient.connect(server.path)
    with trio.fail_after(WITHIN_S):
        await client.stream.send_all(struct.pack("IIII", Op.READ, 1, 0, 4097))
        await client.closed_by_server()
        assert await dom0.read("/") == ""


async def test_random_bytes_never_hurt_others(server, dom0):
    source = random.Random(20)
    with trio.fail_after(WITHIN_S):
        for _ in range(150):
            client = await RawClient.connect(server.path)
            for _ in range(source.randrange(1, 6)):
                op, tx_id = source.randrange(26), source.choice([0, 0, 0, 1, 2])
                payload = source.choice([b"/a", b"a/b", b"T", b"5", b"@releaseDomain", b""])
                payload += source.choice([b"", NUL, NUL + b"n0\0", NUL + source.randbytes(40)])
                await client.send(op, payload, tx_id=tx_id)
            await client.stream.send_all(source.randbytes(source.randrange(60)))
            await client.stream.aclose()
        assert await dom0.domain_path(1) == "/local/domain/1"


@given(st.binary(max_size=200), st.integers(1, 50))
def test_stream_of_any_bytes(data, size):
    packets, seen = PacketStream(), b""
    try:
        for start in range(0, len(data), size):
            for message in packets.feed(data[start : start + size]):
                seen += encode(message)
    except WireError:
        pass
    assert data.startswith(seen)


async def test_who_does_not_read_is_throttled(server, dom0):
    """Requests without end: the server stops taking them rather than storing the answers."""
    await dom0.write("/big", "x" * 3000)
    client = await RawClient.connect(server.path)
    request = encode(packet(Op.READ, b"/big\0", 1)) * 1000
    with trio.fail_after(WITHIN_S):
        with trio.move_on_after(0.5) as patience:
            while True:
                await client.stream.send_all(request)
        assert patience.cancelled_caught
        assert await dom0.read("/big") == "x" * 3000
        await client.stream.aclose()


async def test_who_does_not_read_its_events_is_dropped(server, dom0):
    client = await RawClient.connect(server.path)
    long = "/flood/" + "x" * 2000
    with trio.fail_after(WITHIN_S):
        await client.ask(Op.WATCH, b"/flood\0t\0")
        for number in range(1500):
            await dom0.write(f"{long}{number}", "")
            if server.watches_of(0) == 0:
                break
        assert server.watches_of(0) == 0
        await client.closed_by_server()


def test_outbox_is_bounded_and_sends_no_event_twice():
    outbox = Outbox(lambda: None)
    for _ in range(1000):
        outbox.event(b"/a", b"t")
    assert outbox.bytes_waiting == len(outbox.take())
    outbox.event(b"/a", b"t")
    assert outbox
    for number in range(100_000):
        outbox.event(b"/a/%d" % number, b"t")
    assert outbox.overflown
    assert outbox.bytes_waiting < LIMIT_BYTES + 8192


def test_watch_of_a_client_is_bounded():
    watch = ClientWatch("/a", b"t")
    tracemalloc.start()
    try:
        for number in range(100_000):
            watch.notify(f"/a/{number:02000}")
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 500_000


async def test_a_flood_leaves_others_their_turn(server, guest, dom0):
    """A guest writes as fast as it can below a watched path; the watcher still gets answers."""
    with trio.fail_after(WITHIN_S):
        async with dom0.watch("/local/domain/5") as watch:
            await watch.changed()
            flooder = await RawClient.connect(server.path_for(GUEST))
            heap = b"".join(
                encode(packet(Op.WRITE, b"data/%d\0x" % (number % 200), number))
                for number in range(5000)
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flooder.stream.send_all, heap)
                nursery.start_soon(flooder.closed_by_server)
                for _ in range(20):
                    assert await dom0.read("/local/domain/0/name") == "Domain-0"
                assert len(await watch.changed()) <= 64
                nursery.cancel_scope.cancel()
            await trio.aclose_forcefully(flooder.stream)


async def test_two_servers_in_one_directory(server, store_dir):
    with pytest.raises(ConfigError, match=r"another XenStore answers on .*xenstored\.socket"):
        await serve_forever(store_dir)
    async with StoreClient.connect(server.path) as store:
        assert await store.read("/") == ""


async def test_somebody_elses_server_is_respected(store_dir):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(store_dir / "xenstored.socket"))
        other.listen()
        with pytest.raises(ConfigError, match="another XenStore answers"):
            await serve_forever(store_dir)


async def test_starts_again_after_a_death(store_dir):
    for name in ("xenstored.socket", "xenstored-5.socket"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(store_dir / name))
    async with EmbeddedXenStore.serve(store_dir) as server:
        assert server.path.stat().st_mode & 0o777 == 0o600
        assert not server.path_for(GUEST).exists()
        server.introduce(GUEST)
    assert not list(store_dir.glob("*.socket"))


async def test_no_such_directory(store_dir):
    with pytest.raises(ConfigError, match="can't make XenStore's sockets in"):
        await serve_forever(store_dir / "missing")


async def test_too_long_a_directory(store_dir):
    deep = store_dir / ("x" * 100)
    deep.mkdir()
    with pytest.raises(ConfigError, match=r"can't listen on .*too long"):
        await serve_forever(deep)


async def test_errors_of_the_body_are_not_wrapped(store_dir):
    with pytest.raises(LookupError):
        async with EmbeddedXenStore.serve(store_dir):
            raise LookupError
