"""``xbd image info``: what an image is, and what lies behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import click

from xbd.cli.image.naming import IMAGE, NamedImage, behind
from xbd.cli.image.output import (
    human,
    info_json,
    json_option,
    print_json,
    print_snapshots,
    printable,
    share_option,
)
from xbd.core.driver.image import ImageInfo
from xbd.core.errors import ConfigError

_DEEPEST: Final = 200


@click.command("info")
@click.argument("image", type=IMAGE)
@click.option("--chain", "--backing-chain", is_flag=True, help="And all images behind it.")
@share_option
@json_option
def info(image: NamedImage, chain: bool, share: bool, as_json: bool) -> None:
    """Show what IMAGE is."""
    found = (
        _chain(image, share=share) if chain else iter([image.format.info(image.path, share=share)])
    )
    if as_json:
        told = [info_json(one) for one in found]
        print_json(told if chain else told[0])
        return
    for number, one in enumerate(found):
        if number:
            click.echo()
        _print(one)


def _chain(image: NamedImage, *, share: bool) -> Iterator[ImageInfo]:
    seen = set()
    while True:
        found = image.format.info(image.path, share=share)
        yield found
        status = image.path.stat()
        seen.add((status.st_dev, status.st_ino))
        if found.backing_file is None:
            return
        if found.backing_path is None or found.backing_format is None:
            what = "its format" if found.backing_path else "a file's name"
            raise ConfigError(
                f"{image}: what lies behind it ({printable(found.backing_file)}) is not told by "
                f"{what}, so the chain can't be followed"
            )
        image = behind(found.backing_path, found.backing_format)
        _check_new(image, seen)


def _check_new(image: NamedImage, seen: set[tuple[int, int]]) -> None:
    try:
        status = image.path.stat()
    except OSError:
        return  # the driver has the better words for it
    if (status.st_dev, status.st_ino) in seen:
        raise ConfigError(f"{image} lies behind itself: the chain is a loop")
    if len(seen) >= _DEEPEST:
        raise ConfigError(f"{image}: {_DEEPEST} images in front of it are enough")


def _print(found: ImageInfo) -> None:
    lines = [
        ("image", found.path),
        ("file format", found.format),
        ("virtual size", f"{human(found.virtual_size)} ({found.virtual_size} bytes)"),
        ("disk size", human(found.actual_size)),
    ]
    if found.encrypted:
        lines.append(("encrypted", "yes"))
    if found.cluster_size is not None:
        lines.append(("cluster_size", found.cluster_size))
    if found.dirty:
        lines.append(("cleanly shut down", "no"))
    if found.backing_file is not None:
        name = found.backing_file
        if found.backing_path is not None and str(found.backing_path) != name:
            name += f" (actual path: {found.backing_path})"
        lines.append(("backing file", name))
        if found.backing_format is not None:
            lines.append(("backing file format", found.backing_format))
    for name, value in lines:
        click.echo(f"{name}: {printable(value)}")
    if found.snapshots:
        click.echo("Snapshot list:")
        print_snapshots(found.snapshots)
    if found.details:
        click.echo("Format specific information:")
        _print_details(found.details, 1)


def _print_details(details: Mapping[str, Any], depth: int) -> None:
    indent = "    " * depth
    for name, value in details.items():
        shown = printable(name.replace("-", " "))
        if isinstance(value, Mapping):
            click.echo(f"{indent}{shown}:")
            _print_details(value, depth + 1)
        elif isinstance(value, list):
            click.echo(f"{indent}{shown}:")
            for number, member in enumerate(value):
                if isinstance(member, Mapping):
                    click.echo(f"{indent}    [{number}]:")
                    _print_details(member, depth + 2)
                else:
                    click.echo(f"{indent}    [{number}]: {printable(member)}")
        else:
            text = {True: "true", False: "false"}[value] if isinstance(value, bool) else value
            click.echo(f"{indent}{shown}: {printable(text)}")
