"""``xbd export``: a disk for clients of the NBD protocol, on a UNIX socket."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import attrs
import click
import sdnotify
import structlog

from xbd.core.hostio.failures import shown

if TYPE_CHECKING:
    import trio

    from xbd.core.nbd import NbdServer
    from xbd.logs import Level

_log = structlog.get_logger("xbd.export")

_GC_THRESHOLD: Final = 20_000
"""Objects more than were freed, before young ones are looked through."""

_PATH = click.Path(path_type=Path)


def _mode(_context: click.Context, _parameter: click.Parameter, value: str) -> int:
    """Permissions of a file, from ``0660`` or ``660``."""
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{value!r} is no mode such as 0660")
    return mode


@attrs.frozen(kw_only=True)
class _Wishes:
    disk: str
    socket: Path
    mode: int
    readonly: bool
    name: str
    description: str
    image_dirs: Sequence[Path]
    exit_after_last: bool


@click.command("export")
@click.argument("disk")
@click.option(
    "--nbd", "socket", type=_PATH, required=True, metavar="SOCKET", help="Where to listen."
)
@click.option(
    "--mode", callback=_mode, default="0600", show_default=True, help="The socket's permissions."
)
@click.option("--readonly", "-r", is_flag=True, help="Open the disk read-only.")
@click.option("--name", default="", help="The export's name; the empty one means it, too.")
@click.option("--description", default="", help="For people who list the exports.")
@click.option(
    "--image-dirs",
    type=_PATH,
    multiple=True,
    metavar="DIR",
    help="Where files may lie that an image names, such as backing files.  Repeatable.",
)
@click.option("--exit-after-last", is_flag=True, help="End when the last client has left.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
)
def export(log_level: Level, **wishes: Any) -> None:
    """Serve DISK (DRIVER:PATH[?OPTION=VALUE&...]) to NBD clients until SIGTERM."""
    import trio

    from xbd.logs import setup_logs

    setup_logs(log_level, "text")
    trio.run(_export, _Wishes(**wishes))


async def _export(wishes: _Wishes) -> None:
    """Until it is done or told to stop.

    Raises `ConfigError` if it can't begin, `DriverError` if it can't go on, and KeyboardInterrupt
    if it could not end in order.
    """
    import trio

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            serving = _Serving()
            nursery.start_soon(serving.obey, signals, nursery.cancel_scope)
            await serving.serve(wishes)
            nursery.cancel_scope.cancel()
    if not serving.finished:
        raise KeyboardInterrupt


@attrs.define
class _Serving:
    """A disk being served."""

    finished: bool = False
    """Everything that was answered is on the disk."""
    _server: NbdServer | None = None

    async def serve(self, wishes: _Wishes) -> None:
        """Open the disk, make the socket, serve, and take everything back in order."""
        import trio

        from xbd.core.driver import DiskSpec, open_disk
        from xbd.core.nbd import serve_nbd

        path = wishes.socket.absolute()
        spec = DiskSpec.parse(wishes.disk)
        opening = open_disk(
            spec,
            device_id=f"nbd:{shown(path)}",
            writable=not wishes.readonly,
            image_dirs=[directory.absolute() for directory in wishes.image_dirs],
        )
        async with opening as access:
            serving = partial(
                serve_nbd,
                mode=wishes.mode,
                name=wishes.name,
                description=wishes.description,
                until_last=wishes.exit_after_last,
                alone=True,
            )
            async with trio.open_nursery() as nursery:
                self._server = await nursery.start(serving, access, path)
                _settle_memory()
                _announce(str(spec), path, wishes.name)
            await access.flush()
        self.finished = True

    async def obey(self, signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
        """The first signal ends it in order, the next one at once."""
        async for number in signals:
            if self._server is None:
                everything.cancel()
                return
            _log.info(f"stopping on {signal.Signals(number).name}")
            self._server.stop()
            self._server = None


def _settle_memory() -> None:
    """What is there now stays: looking through it again and again cost 10 % of the requests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)


def _announce(disk: str, path: Path, name: str) -> None:
    uri = f"nbd+unix:///{quote(name, safe='')}?socket={quote(os.fsencode(path), safe='/')}"
    click.echo(f"serving {disk} at {uri}")
    sdnotify.SystemdNotifier().notify("READY=1")
