"""One guest's conversation with the embedded host.  Every byte of it is untrusted."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Final

import attrs
import structlog
import trio

from xbd.core.hypervisor.embedded_hypervisor import (
    EmbeddedGuest,
    Limits,
    OfferedPort,
    require_eventfd,
)
from xbd.core.hypervisor.embedded_memory import GuestMemory
from xbd.core.hypervisor.embedded_wire import (
    MAX_FDS,
    REQUEST_SIZE,
    Hello,
    Kind,
    Offer,
    Reply,
    Request,
    WireError,
    Withdraw,
    decode_request,
    refusal,
)
from xbd.core.ratelimit import RateLimit

_FD_SIZE: Final = array.array("i").itemsize
_GO_ON: Final = frozenset({errno.EEXIST, errno.ENOENT, errno.ENOSPC})
"""Refusals after which the guest may go on; any other ends the connection."""
_REFUSAL_SECONDS: Final = 1.0

_log = structlog.get_logger(__name__)


@attrs.define(eq=False)
class GuestLog:
    """Lines that guests cause, of all guests together: they come and go as they like."""

    _limit: RateLimit = attrs.Factory(lambda: RateLimit(burst=20, seconds=10.0))

    def info(self, event: str, **details: object) -> None:
        self._say(_log.info, event, details)

    def warning(self, event: str, **details: object) -> None:
        self._say(_log.warning, event, details)

    def _say(self, write: Callable[..., object], event: str, details: dict[str, object]) -> None:
        held = self._limit.allows()
        if held is not None:
            write(event, **details, **({"suppressed": held} if held else {}))


@attrs.define(eq=False)
class _Packet:
    """What one receive brought; owns the descriptors."""

    data: bytes
    fds: list[int]
    truncated: bool

    def __enter__(self) -> _Packet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for fd in self.fds:
            os.close(fd)

    def request(self) -> Request:
        """Parse it; raises `WireError`."""
        if self.truncated:
            raise WireError(errno.EPROTO, "a message too long, or with too many descriptors")
        request = decode_request(self.data)
        expected = 0 if isinstance(request, Withdraw) else MAX_FDS
        if len(self.fds) != expected:
            raise WireError(errno.EPROTO, f"{len(self.fds)} descriptors came, not {expected}")
        return request


class Session:
    """A connection, from its first message to its end."""

    def __init__(self, connection: trio.socket.SocketType, limits: Limits, log: GuestLog) -> None:
        self._connection = connection
        self._limits = limits
        self._log = log
        self._last = b""

    async def hello(self) -> tuple[Hello, GuestMemory] | None:
        """Wait for the first message; None if the guest went.  Raises `WireError`."""
        packet = await self._receive()
        if packet is None:
            return None
        with packet:
            request = packet.request()
            if not isinstance(request, Hello):
                raise WireError(errno.EPROTO, "the first message must be HELLO")
            if not 0 < request.pages <= self._limits.pages:
                raise WireError(
                    errno.E2BIG, f"{request.pages} pages; a guest has 1 to {self._limits.pages}"
                )
            return request, GuestMemory(packet.fds[0], packet.fds[1], request.pages)

    async def welcome(self, hello: Hello, guest: EmbeddedGuest) -> None:
        """Answer HELLO."""
        limits = self._limits
        await self._send(Reply(Kind.HELLO, hello.id, 0, guest.domid, limits.pages, limits.ports))

    async def serve(self, guest: EmbeddedGuest) -> None:
        """Carry out requests until the guest goes, or breaks the protocol."""
        while (packet := await self._receive()) is not None:
            with packet:
                try:
                    reply = self._carry_out(packet, guest)
                except WireError as error:
                    if error.errno not in _GO_ON:
                        self._log.warning(
                            "guest broke the protocol", domain=guest.domid, why=error.text
                        )
                        await self.refuse(error)
                        return
                    reply = refusal(packet.data, error)
            await self._send(reply)

    async def refuse(self, error: WireError) -> None:
        """Tell the guest what is wrong with its last message, if it listens."""
        with trio.move_on_after(_REFUSAL_SECONDS):
            await self._send(refusal(self._last, error))

    def _carry_out(self, packet: _Packet, guest: EmbeddedGuest) -> Reply:
        match packet.request():
            case Offer() as offer:
                self._offer(guest, offer, *packet.fds)
                return Reply(Kind.OFFER, offer.id)
            case Withdraw(ident, port):
                offered = guest.ports.pop(port, None)
                if offered is None:
                    raise WireError(errno.ENOENT, f"port {port} is not offered")
                offered.close()
                return Reply(Kind.WITHDRAW, ident)
        raise WireError(errno.EPROTO, "a second HELLO")

    def _offer(self, guest: EmbeddedGuest, offer: Offer, to_backend: int, to_guest: int) -> None:
        if offer.port in guest.ports:
            raise WireError(errno.EEXIST, f"port {offer.port} is offered already")
        if len(guest.ports) >= self._limits.ports:
            raise WireError(errno.ENOSPC, f"a guest has at most {self._limits.ports} ports")
        require_eventfd(to_backend)
        require_eventfd(to_guest)
        fds: list[int] = []
        try:
            fds += [os.dup(to_backend)]
            fds += [os.dup(to_guest)]
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise WireError(errno.ENOSPC, "the host is out of file descriptors") from error
        guest.ports[offer.port] = OfferedPort(offer.port, offer.remote, fds[0], fds[1])

    async def _receive(self) -> _Packet | None:
        """The next message; None at the end of the connection."""
        try:
            data, ancillary, flags, _ = await self._connection.recvmsg(
                REQUEST_SIZE, socket.CMSG_SPACE(MAX_FDS * _FD_SIZE), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return None  # reset: the guest went with answers unread
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % _FD_SIZE])
        packet = _Packet(data, list(fds), bool(flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)))
        self._last = data
        if data:
            return packet
        with packet:  # an empty message is as good as the end
            return None

    async def _send(self, reply: Reply) -> None:
        with contextlib.suppress(OSError):  # the guest went; the next receive says so
            await self._connection.send(reply.encode())
