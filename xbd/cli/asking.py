"""What the commands that talk to a running daemon have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from rich.console import Console

from xbd.core.control import DEFAULT_SOCKET, SOCKET_NAME

PIPE_WIDTH: Final = 1000
_ANSWER_SECONDS: Final = 30.0
_ORDER_SECONDS: Final = 600.0
"""Large disks take some seconds; on a busy host it can be more."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def daemon_options(command: _Command) -> _Command:
    """``--socket`` and ``--embedded``: which daemon; `ask_daemon` takes both."""
    socket = click.option(
        "--socket",
        type=click.Path(path_type=Path),
        help="The daemon's control socket, where it is not the usual one.",
    )
    embedded = click.option(
        "--embedded",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Ask the daemon of the embedded host in DIR.",
    )
    return socket(embedded(command))


def console_of_output() -> Console:
    """For standard output.  A pipe has no width: nothing is folded there."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def ask_daemon(socket: Path | None, embedded: Path | None, command: str) -> Any:
    """The daemon's answer to a question.  Raises `ConfigError` with one line."""
    return _ask(socket, embedded, command, _ANSWER_SECONDS)


def order_daemon(
    socket: Path | None, embedded: Path | None, command: str, **arguments: Any
) -> None:
    """Have the daemon do something, and wait for it.  Raises `ConfigError` with one line."""
    _ask(socket, embedded, command, _ORDER_SECONDS, **arguments)


def _ask(
    socket: Path | None, embedded: Path | None, command: str, seconds: float, **arguments: Any
) -> Any:
    import trio

    from xbd.core.control.client import ask

    path = socket or (embedded / SOCKET_NAME if embedded else DEFAULT_SOCKET)
    return trio.run(partial(ask, path, command, answer_seconds=seconds, **arguments))
