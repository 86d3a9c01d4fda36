"""Asking the daemon something."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import trio

from xbd.core.control.protocol import (
    MAX_ANSWER,
    ControlError,
    LineReader,
    decode_answer,
    encode_request,
)
from xbd.core.errors import ConfigError

_ANSWER_SECONDS: Final = 30.0


class DaemonUnavailable(ConfigError):
    """No daemon answers, or it refuses."""

    exit_code = 1


async def ask(
    path: Path, command: str, /, *, answer_seconds: float = _ANSWER_SECONDS, **arguments: Any
) -> Any:
    """One command's result.  Raises `DaemonUnavailable` with one line."""
    try:
        with trio.fail_after(answer_seconds):
            stream = await trio.open_unix_socket(path)
            async with stream:
                with suppress(trio.BrokenResourceError):  # refused unread: the answer says why
                    await stream.send_all(encode_request(command, arguments))
                line = await LineReader(stream, MAX_ANSWER).line()
    except (FileNotFoundError, ConnectionRefusedError):
        raise DaemonUnavailable(f"no daemon is running: nothing answers on {path}") from None
    except PermissionError:
        raise DaemonUnavailable(
            f"no permission to use control socket {path}: run this as root"
        ) from None
    except (OSError, trio.BrokenResourceError) as error:
        raise DaemonUnavailable(f"control socket {path}: {error}") from None
    except trio.TooSlowError:
        raise DaemonUnavailable(
            f"the daemon on {path} did not answer in {answer_seconds:.0f} s"
        ) from None
    if line is None:
        raise DaemonUnavailable(f"the daemon on {path} closed the connection without an answer")
    try:
        return decode_answer(line)
    except ControlError as error:
        raise DaemonUnavailable(f"the daemon on {path}: {error}") from None
