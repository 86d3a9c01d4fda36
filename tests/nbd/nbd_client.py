"""A client of the NBD protocol, written from its document and from nothing of the server's."""

from __future__ import annotations

import struct

import attrs
import trio

(READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS) = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16

(EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META) = (
    range(1, 11)
)
ACK, SERVER, REP_INFO, REP_META = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN = (2**31 + n for n in (1, 2, 3, 6))

EPERM, EIO, EINVAL, ENOSPC = 1, 5, 22, 28

REQUEST = struct.Struct(">IHHQQI")


def string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data


def info(name: bytes = b"", *asked: int) -> bytes:
    """The data of INFO and GO."""
    return string(name) + struct.pack(f">H{len(asked)}H", len(asked), *asked)


def queries(name: bytes = b"", *wanted: bytes) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return string(name) + struct.pack(">I", len(wanted)) + b"".join(map(string, wanted))


def request(
    kind: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 0,
    data: bytes = b"",
) -> bytes:
    return REQUEST.pack(0x25609513, flags, kind, cookie, offset, length or len(data)) + data


@attrs.define
class Reply:
    """All that was said about one request."""

    error: int = 0
    text: bytes = b""
    data: dict[int, bytes] = attrs.field(factory=dict)
    """By offset; holes as the zeroes that they are."""
    holes: list[tuple[int, int]] = attrs.field(factory=list)
    status: list[tuple[int, int]] | None = None
    chunks: int = 0

    @property
    def content(self) -> bytes:
        """The data in order; it must be without gaps."""
        content, end = b"", None
        for offset, part in sorted(self.data.items()):
            assert end in (None, offset), "chunks overlap or leave a gap"
            content += part
            end = offset + len(part)
        return content


class Gone(Exception):
    """The server has closed the connection."""


@attrs.define(slots=False)
class Client:
    stream: trio.SocketStream
    structured: bool = False
    flags: int = 0
    size: int = 0
    _received: bytes = b""
    _lengths: dict[int, tuple[int, int, int]] = attrs.field(factory=dict)
    """Of requests in flight: kind, offset, length."""
    _partial: dict[int, Reply] = attrs.field(factory=dict)
    _cookie: int = 1000

    # -- negotiation ------------------------------------------------------------------------

    async def greet(self, flags: int = 3) -> None:
        assert await self.receive(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        await self.say(struct.pack(">I", flags))

    async def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """All replies to an option."""
        await self.say(option(number, data))
        replies = []
        while True:
            magic, answered, kind, length = struct.unpack(">QIII", await self.receive(20))
            assert (magic, answered) == (0x3E889045565A9, number)
            replies.append((kind, await self.receive(length)))
            if kind == ACK or kind >> 31:
                return replies

    async def negotiate(
        self, *, structured: bool = True, allocation: bool = True, name: bytes = b""
    ) -> Client:
        await self.greet()
        return await self.negotiate_further(structured=structured, allocation=allocation, name=name)

    async def negotiate_further(
        self, *, structured: bool = True, allocation: bool = True, name: bytes = b""
    ) -> Client:
        """After the greeting."""
        if structured:
            assert await self.option(STRUCTURED) == [(ACK, b"")]
            self.structured = True
            if allocation:
                (kind, context), end = await self.option(
                    SET_META, queries(name, b"base:allocation")
                )
                assert kind == REP_META
                assert context[4:] == b"base:allocation"
                assert end == (ACK, b"")
        replies = dict(await self.option(GO, info(name)))
        assert ACK in replies, replies
        kind, self.size, self.flags = struct.unpack(">HQH", replies[REP_INFO])
        assert kind == 0
        return self

    # -- transmission -----------------------------------------------------------------------

    async def send(
        self,
        kind: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        data: bytes = b"",
    ) -> int:
        """Send a request; its cookie."""
        self._cookie += 1
        self._lengths[self._cookie] = (kind, offset, length or len(data))
        await self.say(request(kind, offset, length, flags=flags, cookie=self._cookie, data=data))
        return self._cookie

    async def do(self, kind: int, offset: int = 0, length: int = 0, **more) -> Reply:
        """Send a request and wait for its reply, which is the next one."""
        cookie = await self.send(kind, offset, length, **more)
        answered, reply = await self.reply()
        assert answered == cookie
        return reply

    async def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        reply = await self.do(READ, offset, length, flags=flags)
        assert not reply.error, reply
        assert not reply.data or min(reply.data) == offset
        assert len(reply.content) == length
        return reply.content

    async def write(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        reply = await self.do(WRITE, offset, flags=flags, data=data)
        assert not reply.error, reply

    async def reply(self) -> tuple[int, Reply]:
        """The next reply that is complete, and its cookie."""
        while True:
            cookie, done = await self._message()
            if done:
                del self._lengths[cookie]
                return cookie, self._partial.pop(cookie)

    async def _message(self) -> tuple[int, bool]:
        magic = struct.unpack(">I", await self.receive(4))[0]
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", await self.receive(12))
            reply = self._partial.setdefault(cookie, Reply())
            kind, offset, length = self._lengths[cookie]
            assert not (self.structured and kind == READ), "a simple reply to a read"
            reply.error = error
            if kind == READ and not error and length:
                reply.data[offset] = await self.receive(length)
            return cookie, True
        assert magic == 0x668E33EF
        assert self.structured
        flags, kind, cookie, length = struct.unpack(">HHQI", await self.receive(16))
        payload = await self.receive(length)
        self._chunk(self._partial.setdefault(cookie, Reply()), cookie, kind, payload)
        return cookie, bool(flags & 1)

    def _chunk(self, reply: Reply, cookie: int, kind: int, payload: bytes) -> None:
        asked, offset, length = self._lengths[cookie]
        reply.chunks += 1
        if kind == 1:
            assert asked == READ
            assert len(payload) > 8
            at = int.from_bytes(payload[:8], "big")
            reply.data[at] = payload[8:]
            assert offset <= at
            assert at + len(payload) - 8 <= offset + length
        elif kind == 2:
            assert asked == READ
            at, size = struct.unpack(">QI", payload)
            assert size
            reply.data[at] = bytes(size)
            reply.holes.append((at, size))
            assert offset <= at
            assert at + size <= offset + length
        elif kind == 5:
            assert asked == BLOCK_STATUS
            assert reply.status is None
            reply.status = list(struct.iter_unpack(">II", payload[4:]))
            assert reply.status
            assert all(size for size, _ in reply.status)
            assert sum(size for size, _ in reply.status[:-1]) < length
        elif kind == 0x8001:
            reply.error, size = struct.unpack_from(">IH", payload)
            assert reply.error
            reply.text = payload[6:]
            assert len(reply.text) == size
        else:
            assert (kind, payload) == (0, b"")

    async def disconnect(self) -> None:
        """Say good-bye, and wait until the server has hung up, too."""
        await self.say(request(DISC))
        await self.hung_up()

    async def hung_up(self) -> None:
        """The server closes the connection, and says nothing more."""
        try:
            assert not self._received
            assert await self.stream.receive_some(1) == b""
        except trio.BrokenResourceError:
            pass
        await self.stream.aclose()

    async def say(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError:
            raise Gone from None

    async def receive(self, size: int) -> bytes:
        while len(self._received) < size:
            try:
                more = await self.stream.receive_some(1 << 20)
            except trio.BrokenResourceError:
                raise Gone from None
            if not more:
                raise Gone
            self._received += more
        data, self._received = self._received[:size], self._received[size:]
        return data
