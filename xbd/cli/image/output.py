"""What the image commands have in common in what they print."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import click

from xbd.core.driver.image import ImageInfo, Progress, SnapshotInfo, no_progress

Command = TypeVar("Command", bound=Callable[..., Any])

_NANOSECONDS = 1_000_000_000


def json_option(command: Command) -> Command:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="For programs.")(command)


def share_option(command: Command) -> Command:
    """``-U``, as qemu-img calls it."""
    return click.option(
        "-U",
        "--share",
        is_flag=True,
        help="Look even while somebody writes to it; what is told may be inconsistent.",
    )(command)


def print_json(value: Any) -> None:
    """As all of xbd's commands do it."""
    click.echo(json.dumps(value, indent=2))


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(printable(what), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM is an exception here, so that nothing half-made is left."""

    def end(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def finished_first() -> Iterator[None]:
    """SIGINT and SIGTERM end the command after the block; a second one ends it at once.

    For what is short, and leaves something to be mended where it is broken off.
    """
    came: list[int] = []

    def wait(number: int, _frame: object) -> None:
        came.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        sys.exit(128 + came[0])


def printable(text: object) -> str:
    """Nothing that a terminal would obey: names come out of images."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def human(size: int) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    from xbd.cli.list import human_size

    return str(human_size(size))


def info_json(info: ImageInfo) -> dict[str, Any]:
    """An image under the names that qemu-img's JSON has."""
    told: dict[str, Any] = {
        "filename": str(info.path),
        "format": info.format,
        "virtual-size": info.virtual_size,
        "actual-size": info.actual_size,
        "dirty-flag": info.dirty,
    }
    if info.cluster_size is not None:
        told["cluster-size"] = info.cluster_size
    if info.encrypted:
        told["encrypted"] = True
    if info.backing_file is not None:
        told["backing-filename"] = info.backing_file
        if info.backing_path is not None:
            told["full-backing-filename"] = str(info.backing_path)
        if info.backing_format is not None:
            told["backing-filename-format"] = info.backing_format
    if info.snapshots:
        told["snapshots"] = [snapshot_json(snapshot) for snapshot in info.snapshots]
    if info.details:
        told["format-specific"] = {"type": info.format, "data": dict(info.details)}
    return told


def snapshot_json(snapshot: SnapshotInfo) -> dict[str, Any]:
    """A snapshot under the names that qemu-img's JSON has."""
    told = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": int(snapshot.date.timestamp()),
        "date-nsec": snapshot.date.microsecond * 1000,
        "vm-clock-sec": snapshot.vm_clock_ns // _NANOSECONDS,
        "vm-clock-nsec": snapshot.vm_clock_ns % _NANOSECONDS,
    }
    if snapshot.icount is not None:
        told["icount"] = snapshot.icount
    return told


def print_snapshots(snapshots: Sequence[SnapshotInfo]) -> None:
    """A table as wide as its names."""
    rows = [("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK")]
    for snapshot in snapshots:
        seconds, rest = divmod(snapshot.vm_clock_ns, _NANOSECONDS)
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        rows.append(
            (
                printable(snapshot.id),
                printable(snapshot.name),
                human(snapshot.vm_state_size),
                f"{snapshot.date.astimezone():%Y-%m-%d %H:%M:%S}",
                f"{clock}.{rest // 1_000_000:03}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())
