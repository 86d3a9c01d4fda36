"""One connection to XenStore: many requests in flight, answers by id, events as they come.

A link ends once, for one reason: the other side closed, sent garbage, or did not answer in time.
Whoever waits for an answer then gets `StoreLost`.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

import attrs
import trio

from xbd.core.errors import StoreError, StoreLost
from xbd.core.xenstore.protocol import (
    NUL,
    Op,
    Packet,
    PacketStream,
    WireError,
    encode,
    errno_of,
    operation_name,
    packet,
    strings,
)

_READ_BYTES: Final = 16 << 10
"""Bounds what one round of a flood of events costs before other tasks run."""
_IN_FLIGHT: Final = 64
"""Callers waiting for their answers; more than that queue up."""
_POSTED: Final = 1024
"""Likewise of requests that nobody waits for."""
_SENT_TOGETHER: Final = 64
"""Packets per call of ``write``."""
_PROBE: Final = b"0" + NUL


@attrs.define(eq=False)
class _Caller:
    """Who waits for some requests' answers."""

    unanswered: int
    done: trio.Event = attrs.field(factory=trio.Event)
    gone: bool = False
    if_gone: Callable[[bytes], None] | None = None


@attrs.define(eq=False)
class _Pending:
    op: int
    caller: _Caller | None
    """None: nobody waits."""
    answer: Packet | None = None


class Link:
    """Drives a non-blocking descriptor, which it owns from now on."""

    def __init__(
        self, fd: int, *, answer_within_s: float, probe_after_s: float, one_at_a_time: bool = False
    ) -> None:
        """After `probe_after_s` seconds of silence it asks something, to notice a hang.

        `one_at_a_time`: no request is written before the last one is answered.
        """
        self.on_event: Callable[[bytes, bytes], None] = _nobody_listens
        """Called with path and token of each event; must not raise."""
        self.lost = trio.Event()
        self.reason = ""
        """Why it was lost."""
        self._fd = fd
        self._answer_within_s = answer_within_s
        self._probe_after_s = probe_after_s
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._posted = 0
        self._slots = trio.Semaphore(_IN_FLIGHT)
        self._unsent: deque[bytes] = deque()
        self._full = False
        """Whether the other side has to read before anything more can be written."""
        self._work = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope()
        self._heard = False
        self._one_at_a_time = one_at_a_time
        self._awaited = False
        """Whether a request that was written whole has no answer yet; only kept if it matters."""

    async def run(self) -> None:
        """Move bytes until the link is lost; then the descriptor is closed."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._receive)
                    nursery.start_soon(self._send_rest)
                    nursery.start_soon(self._probe)
        finally:
            self.lose("closed")
            trio.lowlevel.notify_closing(self._fd)
            os.close(self._fd)

    def lose(self, reason: str) -> None:
        """Give the link up, and everyone who waits for an answer."""
        if self.lost.is_set():
            return
        self.reason = reason
        self.lost.set()
        self._scope.cancel()
        for pending in self._pending.values():
            self._settle(pending)
        self._pending.clear()

    async def request(
        self,
        op: int,
        payload: bytes,
        tx_id: int = 0,
        *,
        if_abandoned: Callable[[bytes], None] | None = None,
    ) -> bytes:
        """The answer's payload.  Raises `StoreError` if refused, `StoreLost`.

        A cancelled caller's answer goes to `if_abandoned` when it comes.
        """
        (answer,) = await self.request_all(op, [payload], tx_id, if_abandoned=if_abandoned)
        if isinstance(answer, StoreError):
            raise answer
        return answer

    async def request_all(
        self,
        op: int,
        payloads: Sequence[bytes],
        tx_id: int = 0,
        *,
        if_abandoned: Callable[[bytes], None] | None = None,
    ) -> list[bytes | StoreError]:
        """As `request`, of several that are sent one behind the other.  Raises `StoreLost`."""
        for payload in payloads:
            packet(op, payload, 0)  # too long: refuse before waiting for anything
        if not payloads:
            return []
        await self._slots.acquire()
        if self.lost.is_set():
            self._slots.release()
            raise self._gone()
        caller = _Caller(len(payloads), if_gone=if_abandoned)
        pending = [self._submit(op, payload, tx_id, caller) for payload in payloads]
        self._send()
        try:
            with trio.move_on_after(self._answer_within_s):
                await caller.done.wait()
        except trio.Cancelled:
            caller.gone = True
            raise
        if not caller.done.is_set():
            self.lose(f"no answer within {self._answer_within_s:g} s")
        return [self._judged(one, payload) for one, payload in zip(pending, payloads, strict=True)]

    def _judged(self, pending: _Pending, payload: bytes) -> bytes | StoreError:
        if pending.answer is None:
            raise self._gone()
        if pending.answer.op == Op.ERROR:
            return _refusal(pending.op, payload, pending.answer.payload)
        return pending.answer.payload

    def post(self, op: int, payload: bytes, tx_id: int = 0) -> None:
        """Send a request whose answer nobody waits for.  For tidying up; never blocks."""
        if self.lost.is_set():
            return
        if self._posted >= _POSTED:
            # Left undone, it would fill XenStore up; and an XenStore so far behind hangs.
            self.lose("too many requests without an answer")
            return
        self._posted += 1
        self._submit(op, payload, tx_id, None)
        self._send()

    def _gone(self) -> StoreLost:
        return StoreLost(f"the connection to XenStore broke: {self.reason}")

    def _submit(self, op: int, payload: bytes, tx_id: int, caller: _Caller | None) -> _Pending:
        self._last_id = self._last_id % 0xFFFF_FFFF + 1
        pending = self._pending[self._last_id] = _Pending(op, caller)
        self._unsent.append(encode(packet(op, payload, self._last_id, tx_id)))
        return pending

    def _send(self) -> None:
        """As much as goes without waiting."""
        while self._unsent and not (self._awaited or self._full or self.lost.is_set()):
            # Linux's device wants each packet in a call of its own.
            count = 1 if self._one_at_a_time else min(len(self._unsent), _SENT_TOGETHER)
            rest = self._write(b"".join(islice(self._unsent, count)))
            for _ in range(count):
                self._unsent.popleft()
            if rest:
                self._unsent.appendleft(rest)
                self._full = True
        if self._unsent:
            self._work.unpark_all()

    def _write(self, data: bytes) -> bytes:
        """What could not be written yet."""
        try:
            rest = data[os.write(self._fd, data) :]
            self._awaited = self._one_at_a_time and not rest
            return rest
        except BlockingIOError:
            return data
        except OSError as error:
            self.lose(f"writing failed: {error.strerror}")
            return b""

    async def _send_rest(self) -> None:
        while True:
            while not self._unsent or self._awaited:
                await self._work.park()
            if self._one_at_a_time:  # Linux's device never says that it is writable; it always is
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_writable(self._fd)
            self._full = False
            self._send()

    async def _receive(self) -> None:
        packets = PacketStream()
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                data = os.read(self._fd, _READ_BYTES)
                if not data:
                    self.lose("xenstored closed it")
                    return
                self._heard = True
                for message in packets.feed(data):
                    self._dispatch(message)
            except BlockingIOError:
                continue
            except OSError as error:
                self.lose(f"reading failed: {error.strerror}")
                return
            except WireError as error:
                self.lose(f"xenstored sent {error}")
                return

    def _dispatch(self, message: Packet) -> None:
        if message.op == Op.WATCH_EVENT:
            parts = strings(message.payload)
            if len(parts) < 2:
                raise WireError("an event without a token")
            self.on_event(parts[0], parts[1])
            return
        pending = self._pending.pop(message.rq_id, None)
        if pending is None:
            raise WireError("an answer to no request")
        if self._awaited:
            self._awaited = False
            self._work.unpark_all()
        if message.op in (pending.op, Op.ERROR):
            pending.answer = message
        self._settle(pending)
        if pending.answer is None:
            raise WireError(f"{operation_name(message.op)} in answer to another request")
        caller = pending.caller
        if caller and caller.gone and caller.if_gone and message.op != Op.ERROR:
            caller.if_gone(message.payload)

    def _settle(self, pending: _Pending) -> None:
        caller = pending.caller
        if caller is None:
            self._posted -= 1
            return
        caller.unanswered -= 1
        if not caller.unanswered:
            caller.done.set()
            self._slots.release()

    async def _probe(self) -> None:
        while True:
            self._heard = False
            await trio.sleep(self._probe_after_s)
            if not self._heard:
                try:
                    await self.request(Op.GET_DOMAIN_PATH, _PROBE)
                except (StoreError, StoreLost):
                    continue  # refused: it is alive; lost: `run` is ending


def _nobody_listens(path: bytes, token: bytes) -> None:
    """Until the link is of use, no event is: afterwards everyone looks for themselves."""


def _refusal(op: int, payload: bytes, answer: bytes) -> StoreError:
    number = errno_of(answer)
    subject = payload.partition(NUL)[0].decode(errors="backslashreplace")[:200]
    return StoreError(
        f"XenStore refuses {operation_name(op)} {subject}: {os.strerror(number)}"
        + (f" [{errno.errorcode[number]}]" if number in errno.errorcode else ""),
        errno=number,
    )
