"""``xbd snapshot``, ``pause``, ``resume`` and ``resize``: for disks that a running daemon serves.

DISK is always a name as ``xbd list`` shows it, for example xbdback3i51712.
"""

from __future__ import annotations

from pathlib import Path

import click

from xbd.cli.asking import ask_daemon, daemon_options, order_daemon
from xbd.core.errors import ConfigError


@click.command("snapshot")
@click.argument("disk")
@click.argument("name")
@daemon_options
def snapshot(disk: str, name: str, socket: Path | None, embedded: Path | None) -> None:
    """Keep DISK, as it is at this moment, inside its image under NAME.

    DISK is named as 'xbd list' names it, for example xbdback3i51712.  The guest goes on; what it
    writes waits until the snapshot is complete.  See 'xbd image snapshot' for what can be done
    with it when the disk is not in use any more.
    """
    order_daemon(socket, embedded, "snapshot", disk=disk, name=name)
    click.echo(f"Created snapshot {name!r} of {disk}.")


@click.command("pause")
@click.argument("disk")
@daemon_options
def pause(disk: str, socket: Path | None, embedded: Path | None) -> None:
    """Finish what the guest has asked of DISK, make it durable, and let the guest wait.

    DISK is named as 'xbd list' names it, for example xbdback3i51712.  Until 'xbd resume' nothing
    is read from its storage or written to it for the guest, which sees a disk that takes long.
    The image stays open and locked.
    """
    order_daemon(socket, embedded, "pause", disk=disk)
    click.echo(f"Paused {disk}.")


@click.command("resume")
@click.argument("disk")
@daemon_options
def resume(disk: str, socket: Path | None, embedded: Path | None) -> None:
    """Let the guest use DISK again after 'xbd pause'."""
    order_daemon(socket, embedded, "resume", disk=disk)
    click.echo(f"Resumed {disk}.")


@click.command("resize", context_settings={"ignore_unknown_options": True})
@click.argument("disk")
@click.argument("size")
@click.option("--shrink", is_flag=True, help="Losing what lies behind the new end is meant.")
@daemon_options
def resize(disk: str, size: str, shrink: bool, socket: Path | None, embedded: Path | None) -> None:
    """Make DISK SIZE bytes large (20G), or by SIZE larger (+5G) or smaller (-5G), while in use.

    DISK is named as 'xbd list' names it, for example xbdback3i51712.  Guests that understand it
    (Linux, Windows) see the new size at once, others when they attach the disk again.  Of a block
    device the guest gets what there is: extend the device first.
    """
    from xbd.cli.image.naming import new_size

    def old_size() -> int:
        for device in ask_daemon(socket, embedded, "list"):
            if device["name"] == disk and device["size"] is not None:
                return int(device["size"])
        raise ConfigError(f"{disk} is not open: see xbd list")

    wanted = new_size(size, old_size, disk)
    order_daemon(socket, embedded, "resize", disk=disk, size=wanted, shrink=shrink)
    click.echo(f"Resized {disk}: it has {wanted} bytes now.")
