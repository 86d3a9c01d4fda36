"""The command ``xbd``.

Each subcommand's module is imported when it is used, and only then: most of a small command's
time is imports, and the daemon may start in a very slow domain.
"""

from __future__ import annotations

import importlib
from typing import Any, Final, NoReturn

import attrs
import click

from xbd import __version__
from xbd.core.errors import ConfigError, XbdError

EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130
"""As a shell reports a program that SIGINT ended."""


@attrs.frozen
class Subcommand:
    """Where a subcommand is, and its line in ``xbd --help``."""

    target: str
    help: str


SUBCOMMANDS: Final = {
    "serve": Subcommand("xbd.cli.serve:serve", "Serve guests' disks until SIGTERM."),
    "list": Subcommand("xbd.cli.list:list_", "Show the disks that a running daemon serves."),
    "status": Subcommand("xbd.cli.status:status", "Show how a running daemon is doing."),
    "pause": Subcommand("xbd.cli.orders:pause", "Let a guest wait for its disk."),
    "resume": Subcommand("xbd.cli.orders:resume", "Let it go on."),
    "resize": Subcommand("xbd.cli.orders:resize", "Change the size of a disk in use."),
    "snapshot": Subcommand("xbd.cli.orders:snapshot", "Keep a disk in use as it is now."),
    "export": Subcommand("xbd.cli.export:export", "Serve a disk to NBD clients."),
    "image": Subcommand("xbd.cli.image:image", "Make, look at, check and change disk images."),
    "drivers": Subcommand("xbd.cli.drivers:drivers", "Show the installed storage drivers."),
    "demo": Subcommand("xbd.cli.demo:demo", "Serve a disk to a guest in user space, without Xen."),
    "xenstored": Subcommand("xbd.cli.serve:xenstored", "Serve a XenStore on UNIX sockets."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use, and whose errors are one line each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        found = SUBCOMMANDS.get(cmd_name)
        if found is None:
            return None
        module, _, name = found.target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table: click would import every command for its help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, found.help) for name, found in SUBCOMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what users and administrators cause ends in a line, no traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        except XbdError as error:
            _fail(ctx, [error])
        except BaseExceptionGroup as group:
            leaves = _leaves(group)
            if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
                ctx.exit(EXIT_INTERRUPTED)
            deliberate = [leaf for leaf in leaves if isinstance(leaf, XbdError)]
            if len(deliberate) < len(leaves):
                raise
            _fail(ctx, deliberate)


def _fail(ctx: click.Context, errors: list[XbdError]) -> NoReturn:
    for line in dict.fromkeys(str(error) for error in errors):
        click.echo(f"xbd: {line}", err=True)
    ctx.exit(
        max(error.exit_code if isinstance(error, ConfigError) else EXIT_FAILED for error in errors)
    )


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for member in error.exceptions for leaf in _leaves(member)]
    return [error]


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="xbd", message="%(prog)s %(version)s")
def main() -> None:
    """Xen block backend in user space."""
