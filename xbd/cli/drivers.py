"""``xbd drivers``: which storage drivers are installed, and what they take."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from xbd.core.driver.api import Capability
    from xbd.core.driver.options import OptionInfo
    from xbd.core.driver.registry import DriverInfo


@click.group()
def drivers() -> None:
    """Show the installed storage drivers."""


@drivers.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON list.")
def list_(as_json: bool) -> None:
    """Show all drivers, those that can't be used with the reason."""
    from xbd.core.driver.registry import list_drivers

    found = list_drivers()
    if as_json:
        click.echo(json.dumps([_driver_json(info) for info in found], indent=2))
        return
    usable = [info for info in found if info.error is None]
    if usable:
        rows = (
            (info.name, info.summary, _words(info.capabilities), f"{info.package} {info.version}")
            for info in usable
        )
        _print(_table(("name", "summary", "can", "package"), rows))
    for info in found:
        if info.error is not None:
            click.echo(f"not usable, from {info.package} {info.version}: {info.error}")
    if not found:
        click.echo("No drivers.")


@drivers.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object.")
def show(name: str, as_json: bool) -> None:
    """Show what the driver NAME can do, and its options."""
    from xbd.core.driver.options import describe_options
    from xbd.core.driver.registry import driver_info, load_driver

    driver, info = load_driver(name), driver_info(name)
    options = describe_options(driver.options)
    if as_json:
        about = _driver_json(info) | {
            "api_version": list(driver.api_version),
            "concurrency": driver.concurrency.value,
            "options": [_option_json(option) for option in options],
        }
        click.echo(json.dumps(about, indent=2))
        return
    click.echo(f"{driver.name}: {driver.summary}")
    click.echo(f"package    {info.package} {info.version} ({info.target})")
    click.echo(f"interface  {'.'.join(map(str, driver.api_version))}")
    click.echo(f"can        {_words(driver.capabilities) or 'read'}")
    click.echo(f"written    {driver.name}:PATH?OPTION=VALUE&...\n")
    rows = ((option.name, option.type, _default(option), option.help) for option in options)
    _print(_table(("option", "type", "default", "meaning"), rows))


def _table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


def _capability_names(capabilities: Capability) -> list[str]:
    return [(flag.name or "?").lower().replace("_", "-") for flag in capabilities]


def _words(capabilities: Capability) -> str:
    return " ".join(_capability_names(capabilities))


def _default(option: OptionInfo) -> str:
    if option.required:
        return "required"
    if option.secret:
        return "secret"
    if option.default is None or option.default == "":
        return "-"
    if isinstance(option.default, bool):
        return "yes" if option.default else "no"
    return str(option.default)


def _driver_json(info: DriverInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "summary": info.summary,
        "package": info.package,
        "version": info.version,
        "target": info.target,
        "capabilities": _capability_names(info.capabilities),
        "error": info.error,
    }


def _option_json(option: OptionInfo) -> dict[str, Any]:
    default = None if option.required or option.secret else option.default
    if not isinstance(default, bool | int | float | str | None):
        default = str(default)
    return {
        "name": option.name,
        "type": option.type,
        "required": option.required,
        "default": default,
        "secret": option.secret,
        "help": option.help,
    }
