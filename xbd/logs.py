"""The daemon's log: one line an event on stderr, for people, for journald, or as JSON."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, Final, Literal, TextIO

import structlog

_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Of syslog, by the names that structlog uses."""
_IN_THE_TEXT: Final = ("domain",)
"""Fields that say again what the sentence says."""


Level = Literal["debug", "info", "warning", "error"]


def setup_logs(
    level: Level, format_: Literal["text", "json"], *, stream: TextIO | None = None
) -> None:
    """Send structlog's and the standard library's events to `stream` (stderr)."""
    stream = stream or sys.stderr
    threshold = getattr(logging, level.upper())
    to_journal = _is_journal(stream)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.format_exc_info,
    ]
    if format_ == "json":
        final: list[Any] = [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(default=str),
        ]
    else:
        stamp = [] if to_journal else [structlog.processors.TimeStamper(fmt="iso", utc=False)]
        final = [*stamp, _journal_line if to_journal else _terminal_line]
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared[:2],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                *final,
            ],
        )
    )
    logging.basicConfig(level=threshold, handlers=[handler], force=True)


def _is_journal(stream: TextIO) -> bool:
    """Whether journald reads it: systemd.exec(5) on JOURNAL_STREAM."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _sentence(event: MutableMapping[str, Any]) -> str:
    """``device: text key=value``, on one line unless there is a traceback."""
    device = event.pop("device", None)
    text = str(event.pop("event", ""))
    traceback = event.pop("exception", None)
    for name in _IN_THE_TEXT:
        if device is not None:
            event.pop(name, None)
    fields = "".join(f" {key}={value}" for key, value in sorted(event.items()))
    line = _printable(f"{device}: {text}{fields}" if device else f"{text}{fields}")
    return f"{line}\n{traceback}" if traceback else line


def _printable(line: str) -> str:
    """Nothing that a terminal or a log reader would take for more than text."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _terminal_line(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    stamp, level = event.pop("timestamp", ""), event.pop("level", "info")
    return f"{stamp} {level}: {_sentence(event)}"


def _journal_line(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    level = event.pop("level", "info")
    prefix = f"<{_PRIORITIES.get(level, 6)}>"
    return "\n".join(prefix + line for line in _sentence(event).split("\n"))
