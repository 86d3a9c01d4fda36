"""``xbd serve`` and ``xbd xenstored``: the long-running commands."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

if TYPE_CHECKING:
    from xbd.logs import Level

_PATH = click.Path(path_type=Path)


@click.command("serve")
@click.option("--config", "config_path", type=_PATH, help="Configuration file (TOML).")
@click.option(
    "--embedded",
    type=_PATH,
    metavar="DIR",
    help="Serve processes as guests, through sockets in DIR, without Xen.",
)
@click.option("--check", is_flag=True, help="Check the configuration and go no further.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="Instead of the configuration's.",
)
def serve(
    config_path: Path | None, embedded: Path | None, check: bool, log_level: Level | None
) -> None:
    """Serve guests' disks until SIGTERM."""
    import trio

    from xbd.config import load_config
    from xbd.logs import setup_logs

    config = load_config(config_path)
    if check:
        from xbd.core.datapath.native.threads import check_data_path

        check_data_path(config.backend.datapath)
        click.echo("The configuration is good.")
        return
    if log_level:
        config = attrs.evolve(config, log=attrs.evolve(config.log, level=log_level))
    setup_logs(config.log.level, config.log.format)
    from xbd.daemon import run_daemon

    directory = embedded.absolute() if embedded is not None else None
    trio.run(partial(run_daemon, config, embedded=directory))


@click.command("xenstored")
@click.argument("directory", type=_PATH)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
)
def xenstored(directory: Path, log_level: Level) -> None:
    """Serve a XenStore in DIRECTORY, for embedded hosts, until SIGTERM."""
    import trio

    from xbd.daemon import run_xenstored
    from xbd.logs import setup_logs

    setup_logs(log_level, "text")
    trio.run(run_xenstored, directory.absolute())
