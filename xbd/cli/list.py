"""``xbd list``: the disks that a running daemon serves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from xbd.cli.asking import PIPE_WIDTH, ask_daemon, console_of_output, daemon_options

_NOTHING = "-"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@click.command("list")
@daemon_options
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON list.")
def list_(socket: Path | None, embedded: Path | None, as_json: bool) -> None:
    """Show every disk: whose it is, what is behind it, and what it has done."""
    devices = ask_daemon(socket, embedded, "list")
    if as_json:
        click.echo(json.dumps(devices, indent=2))
    elif devices:
        print_devices(console_of_output(), devices)
    else:
        click.echo("No disks.")


def print_devices(console: Console, devices: Sequence[dict[str, Any]]) -> None:
    """The answer to the control command ``list``, for people.

    One table if it fits, else three: what the disks are, how they are used, and what was done.
    """
    everything = range(len(_COLUMNS))
    table = device_table(devices, everything)
    unbounded = console.options.update(max_width=PIPE_WIDTH)
    if Measurement.get(console, unbounded, table).maximum <= console.width:
        console.print(table)
        return
    for number, columns in enumerate(_NARROW):
        if number:
            console.print()
        console.print(device_table(devices, columns))


def device_table(devices: Sequence[dict[str, Any]], columns: Sequence[int]) -> Table:
    """Some columns, by number; without those that are empty."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    rows = [_row(device) for device in devices]
    used = [i for i in columns if any(row[i] != _NOTHING for row in rows)]
    for name, right in (_COLUMNS[i] for i in used):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[i]) for i in used))
    return table


_COLUMNS = (
    ("name", False),
    ("vdev", False),
    ("driver", False),
    ("image", False),
    ("size", True),
    ("mode", False),
    ("state", False),
    ("protocol", False),
    ("rings", True),
    ("data path", False),
    ("reads", True),
    ("writes", True),
    ("read", True),
    ("written", True),
    ("errors", True),
    ("last error", False),
)


_NARROW = ((0, 1, 2, 3, 4, 5, 6), (0, 7, 8, 9, 15), (0, 10, 11, 12, 13, 14))
"""Columns by number, for terminals that are not wide enough for all."""


def _row(device: dict[str, Any]) -> list[str]:
    stats = device["stats"]
    rings = f"{device['queues']}x{device['ring_pages']}" if device["queues"] else None
    cells = (
        device["name"],
        device["vdev"],
        device["driver"],
        device["image"],
        human_size(device["size"]),
        device["mode"],
        f"{device['state']}, paused" if device["paused"] else device["state"],
        device["protocol"],
        rings,
        device["data_path"],
        str(stats["rd_req"]),
        str(stats["wr_req"]),
        human_size(stats["rd_bytes"]),
        human_size(stats["wr_bytes"]),
        str(stats["errors"]),
        device["last_error"],
    )
    return [_NOTHING if cell is None else _printable(cell) for cell in cells]


def human_size(size: int | None) -> str | None:
    """Bytes in the largest unit that leaves at least 1, with three digits."""
    if size is None:
        return None
    value = float(size)
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            return f"{size} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes everything")


def _printable(text: str) -> str:
    """Nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
