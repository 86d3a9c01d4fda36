"""The daemon's end of the control socket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from xbd.core.control.protocol import (
    MAX_REQUEST,
    ControlError,
    LineReader,
    Request,
    decode_request,
    encode_error,
    encode_result,
)
from xbd.core.errors import XbdError
from xbd.core.hostio import listen as unix_socket
from xbd.core.hostio.listen import SocketUnavailable

Handler = Callable[[dict[str, Any]], Awaitable[Any]]
"""Takes a request's arguments, returns what JSON can carry; an `XbdError` becomes the answer."""

_MAX_CLIENTS: Final = 16
_IDLE_SECONDS: Final = 60.0

log = structlog.get_logger(__name__)


def listen(path: Path) -> trio.SocketListener:
    """A listening socket at `path`, for root alone.  Replaces what a dead daemon left behind.

    Raises `SocketUnavailable` with one line.
    """
    what = "control socket "
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SocketUnavailable(f"cannot listen on {what}{path}: {error.strerror}") from None
    sock = unix_socket.listen(path, what=what, other="daemon")
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


async def serve(
    path: Path,
    handlers: Mapping[str, Handler],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until cancelled; the socket is removed at the end."""
    listener = listen(path)
    limiter = trio.CapacityLimiter(_MAX_CLIENTS)

    async def client(stream: trio.SocketStream) -> None:
        async with stream:
            await _serve_client(stream, handlers, limiter)

    try:
        async with listener:
            task_status.started()
            await trio.serve_listeners(client, [listener])
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


async def _serve_client(
    stream: trio.SocketStream, handlers: Mapping[str, Handler], limiter: trio.CapacityLimiter
) -> None:
    try:
        try:
            limiter.acquire_nowait()
        except trio.WouldBlock:
            await stream.send_all(encode_error("too many clients"))
            return
        try:
            await _talk(stream, handlers)
        finally:
            limiter.release()
    except trio.BrokenResourceError:
        return


async def _talk(stream: trio.SocketStream, handlers: Mapping[str, Handler]) -> None:
    reader = LineReader(stream, MAX_REQUEST)
    while True:
        try:
            with trio.move_on_after(_IDLE_SECONDS) as idle:
                line = await reader.line()
            if idle.cancelled_caught or line is None:
                return
            request = decode_request(line)
        except ControlError as error:
            await stream.send_all(encode_error(str(error)))
            return
        await stream.send_all(await _answer(request, handlers))


async def _answer(request: Request, handlers: Mapping[str, Handler]) -> bytes:
    handler = handlers.get(request.command)
    if handler is None:
        return encode_error(
            f"unknown command {request.command[:40]!r} (known: {', '.join(sorted(handlers))})"
        )
    try:
        return encode_result(await handler(request.arguments))
    except XbdError as error:
        return encode_error(str(error))
    except Exception:
        log.exception("a control command failed", command=request.command)
        return encode_error("the daemon failed on this command; its log says why")
