"""``xbd demo``: guests, disks and a daemon on a machine without Xen."""

from __future__ import annotations

import signal
import sys
from functools import partial

import click
import trio
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from xbd import demo as demonstration
from xbd.cli.list import print_devices
from xbd.core.control.client import ask
from xbd.core.errors import XbdError
from xbd.core.units import MIB


@click.command("demo")
@click.option(
    "--size", type=click.IntRange(1, 1024), default=32, show_default=True, help="MiB per disk."
)
def demo(size: int) -> None:
    """Show xbd at work without Xen: write, read back and compare disks of every driver."""
    console = Console()
    try:
        results = trio.run(_show, console, size * MIB)
    except BaseExceptionGroup as group:
        raise first_leaf(group) from None
    wrong = sum(len(result.wrong) for result in results)
    total = sum(result.write.size for result in results)
    if wrong:
        console.print(f"[bold red]{wrong} places came back different.[/]")
        sys.exit(1)
    console.print(f"[bold green]Every one of {total:,} bytes came back right.[/]")


async def _show(console: Console, size: int) -> list[demonstration.DemoResult]:
    """As `_exercise_all`, but SIGTERM cleans up as Ctrl-C does."""
    results: list[demonstration.DemoResult] = []
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                async for number in signals:
                    raise SystemExit(128 + number)

            nursery.start_soon(stop)
            results = await _exercise_all(console, size)
            nursery.cancel_scope.cancel()
    return results


async def _exercise_all(console: Console, size: int) -> list[demonstration.DemoResult]:
    results: list[demonstration.DemoResult] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    async with demonstration.running(size) as running:
        for note in running.notes:
            console.print(f"[yellow]{note}[/]")
        console.print(
            "Every guest writes its whole disk, reads it back through its rings and compares:"
        )
        meeting = _Meeting(len(running.disks))
        with Progress(*columns, console=console) as progress:

            async def use(number: int) -> None:
                disk = running.disks[number]
                advance = partial(
                    progress.advance, progress.add_task(disk.title, total=2 * disk.size)
                )
                results.append(
                    await demonstration.use_disk(running, number, advance, meeting.arrive)
                )

            async with trio.open_nursery() as nursery:
                for number in range(len(running.disks)):
                    nursery.start_soon(use, number)
                await meeting.complete.wait()
                progress.refresh()
                devices = await ask(running.control_socket, "list")
                meeting.part.set()
        print_devices(console, devices)
    console.print()
    console.print(_figures(results))
    console.print()
    return results


class _Meeting:
    """All guests wait here with their disks connected, until the table was read."""

    def __init__(self, guests: int) -> None:
        self.complete = trio.Event()
        self.part = trio.Event()
        self._missing = guests

    async def arrive(self) -> None:
        self._missing -= 1
        if not self._missing:
            self.complete.set()
        await self.part.wait()


def first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One error of many, the most telling: a deliberate one if there is any."""
    known = group.subgroup(XbdError)
    error: BaseException = known if known is not None else group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _figures(results: list[demonstration.DemoResult]) -> Table:
    table = Table(title="As the guests saw it", box=None, title_justify="left")
    table.add_column("disk", no_wrap=True)
    for name in ("write\nMiB/s", "read\nMiB/s", "4 KiB\nreads/s", "median\nµs", "99 %\nµs"):
        table.add_column(name, justify="right")
    table.add_column("data")
    for result in results:
        table.add_row(
            result.disk.title,
            f"{result.write.bytes_per_second / MIB:.0f}",
            f"{result.read.bytes_per_second / MIB:.0f}",
            f"{result.random.per_second:,.0f}",
            f"{result.random.percentile(50) * 1e6:,.0f}",
            f"{result.random.percentile(99) * 1e6:,.0f}",
            "[red]WRONG[/]" if result.wrong else "[green]right[/]",
        )
    return table
