"""``xbd status``: what a running daemon is, and how it serves its disks."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from xbd.cli.asking import ask_daemon, console_of_output, daemon_options


@click.command("status")
@daemon_options
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object.")
def status(socket: Path | None, embedded: Path | None, as_json: bool) -> None:
    """Show the daemon's version, where it runs, and which data path serves its disks, and why."""
    told = ask_daemon(socket, embedded, "status")
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in _lines(told):
        table.add_row(Text(name, style="bold"), Text(text, overflow="fold"))
    console_of_output().print(table)


def _lines(told: dict[str, Any]) -> list[tuple[str, str]]:
    uptime = timedelta(seconds=int(told["uptime_seconds"]))
    stopping = ", stopping" if told["stopping"] else ""
    lines = [
        ("daemon", f"xbd {told['version']}, process {told['pid']}, up {uptime}{stopping}"),
        ("hypervisor", told["hypervisor"]),
        ("data path", told["data_path"]),
        ("watches", ", ".join(f"backend/{kind}" for kind in told["kinds"])),
        ("disks", str(told["devices"])),
    ]
    lines += [("", f"{count} x {how}") for how, count in told["connections"].items()]
    lines.append(("pages mapped", str(told["mapped_pages"])))
    lines.append(("event channels", str(told["bound_ports"])))
    return lines
