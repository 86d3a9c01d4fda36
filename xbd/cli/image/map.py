"""``xbd image map``: where the disk's bytes come from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import click

from xbd.cli.image.naming import IMAGE, NamedImage
from xbd.cli.image.output import json_option, printable, share_option
from xbd.core.driver.image import MapEntry
from xbd.core.errors import ConfigError


@click.command("map")
@click.argument("image", type=IMAGE)
@click.option("--picture", is_flag=True, help="Draw it, as wide as the terminal.")
@share_option
@json_option
def map_(image: NamedImage, picture: bool, share: bool, as_json: bool) -> None:
    """Show which parts of the disk in IMAGE are stored, and where."""
    if picture and as_json:
        raise ConfigError("either --picture or --json")
    image_format = image.require("map", "can't tell where their bytes are")
    entries = image_format.map(image.path, share=share)
    if as_json:
        _print_json(entries)
    elif picture:
        from rich.console import Console

        from xbd.cli.image.picture import draw

        draw(Console(), entries, image_format.info(image.path, share=share).virtual_size)
    else:
        _print(entries)


def _print_json(entries: Iterator[MapEntry]) -> None:
    # One by one: a large image has millions.
    separator = "["
    for entry in entries:
        click.echo(separator + json.dumps(_json(entry)), nl=False)
        separator = ",\n"
    click.echo("]" if separator != "[" else "[]")


def _json(entry: MapEntry) -> dict[str, Any]:
    told: dict[str, Any] = {
        "start": entry.start,
        "length": entry.length,
        "depth": entry.depth,
        "present": entry.present,
        "zero": entry.zero,
        "data": entry.data,
        "compressed": entry.compressed,
    }
    if entry.offset is not None:
        told["offset"] = entry.offset
        if entry.file is not None:
            told["filename"] = str(entry.file)
    return told


def _print(entries: Iterator[MapEntry]) -> None:
    first = list(islice(entries, 1))  # before anything is printed: it may turn out to be no image
    click.echo(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for entry in chain(first, entries):
        if entry.data and not entry.zero:
            where = "-" if entry.offset is None else f"{entry.offset:#x}"
            if entry.compressed:
                where = "compressed"
            file = "" if entry.file is None else printable(entry.file)
            click.echo(f"{entry.start:<#16x}{entry.length:<#16x}{where:<16}{file}".rstrip())
