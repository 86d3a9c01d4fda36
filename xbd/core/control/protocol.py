"""The control socket's language: one JSON object a line, one answer for each request, in order.

Request: ``{"v": 1, "do": "list", "with": {...}}``.  Answer: ``{"v": 1, "ok": true, "result": ...}``
or ``{"v": 1, "ok": false, "error": "one line"}``.  ``with`` may be left out.
"""

from __future__ import annotations

import json
from typing import Any, Final

import attrs
import trio

from xbd.core.errors import XbdError

VERSION: Final = 1
MAX_REQUEST: Final = 64 << 10
"""Bytes of a request line; an honest one has a few hundred."""
MAX_ANSWER: Final = 64 << 20
"""Bytes of an answer that a client takes."""
_CHUNK: Final = 64 << 10


class ControlError(XbdError):
    """A request or answer that is not of this language, or was refused."""


@attrs.frozen
class Request:
    """A checked request."""

    command: str
    arguments: dict[str, Any]


def encode_request(command: str, arguments: dict[str, Any]) -> bytes:
    """A request's line."""
    return _line({"v": VERSION, "do": command, "with": arguments})


def encode_result(result: Any) -> bytes:
    """The line for success."""
    return _line({"v": VERSION, "ok": True, "result": result})


def encode_error(message: str) -> bytes:
    """The line for failure."""
    return _line({"v": VERSION, "ok": False, "error": message})


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ControlError("not a line of JSON") from None
    if not isinstance(value, dict):
        raise ControlError("not a JSON object")
    if value.get("v") != VERSION:
        raise ControlError(f"the other side speaks another version than {VERSION}")
    return value


def decode_request(line: bytes) -> Request:
    """Raises `ControlError`."""
    value = _object(line)
    command, arguments = value.get("do"), value.get("with", {})
    if not isinstance(command, str) or not isinstance(arguments, dict):
        raise ControlError('a request has "do", a name, and "with", an object')
    return Request(command, arguments)


def decode_answer(line: bytes) -> Any:
    """The result; raises `ControlError` with the other side's words if it refused."""
    value = _object(line)
    if value.get("ok") is True:
        return value.get("result")
    raise ControlError(str(value.get("error", "refused without a reason")))


class LineReader:
    """Lines of a stream, each bounded."""

    def __init__(self, stream: trio.abc.ReceiveStream, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._buffer = bytearray()

    async def line(self) -> bytes | None:
        """The next line without its end; None at the end of the stream.

        Raises `ControlError` if it is too long.
        """
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > self._limit:
                raise ControlError(f"a line is longer than {self._limit} bytes")
            chunk = await self._stream.receive_some(_CHUNK)
            if not chunk:
                return None
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        if len(line) > self._limit:
            raise ControlError(f"a line is longer than {self._limit} bytes")
        return line
