"""``xbd image resize``, ``commit`` and ``rebase``."""

from __future__ import annotations

from pathlib import Path

import click

from xbd.cli.image.naming import IMAGE, NamedImage, new_size, parse_backing
from xbd.cli.image.output import human, info_json, json_option, print_json, progress_bar


@click.command("resize", context_settings={"ignore_unknown_options": True})
@click.argument("image", type=IMAGE)
@click.argument("size")
@click.option("--shrink", is_flag=True, help="Losing what lies behind the new end is meant.")
@click.option(
    "--preallocation",
    type=click.Choice(["off", "metadata", "falloc", "full"]),
    default="off",
    help="Of what is new, as for 'create'.",
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help="The file with the passphrase of an encrypted image.",
)
@json_option
def resize(
    image: NamedImage,
    size: str,
    shrink: bool,
    preallocation: str,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Make the disk in IMAGE SIZE bytes large (20G), or by SIZE larger (+5G) or smaller (-5G)."""
    image_format = image.require("resize", "can't be resized")
    with progress_bar(f"resizing {image}") as progress:
        image_format.resize(
            image.path,
            new_size(size, lambda: image.format.info(image.path).virtual_size, str(image)),
            shrink=shrink,
            preallocation=preallocation,
            key_file=key_file,
            progress=progress,
        )
    _tell(image, "Resized", as_json)


@click.command("commit")
@click.argument("image", type=IMAGE)
@json_option
def commit(image: NamedImage, as_json: bool) -> None:
    """Write what IMAGE has into the image behind it, and empty IMAGE."""
    image_format = image.require("commit", "have nothing behind them")
    with progress_bar(f"committing {image}") as progress:
        image_format.commit(image.path, progress=progress)
    _tell(image, "Committed", as_json)


@click.command("rebase")
@click.argument("image", type=IMAGE)
@click.option(
    "-b",
    "--backing",
    metavar="IMAGE",
    required=True,
    help="The new image behind IMAGE, as for 'create'; '' for none.",
)
@click.option(
    "-u",
    "--unsafe",
    is_flag=True,
    help="Only write the name: the new one has the same content as the old one.",
)
@json_option
def rebase(image: NamedImage, backing: str, unsafe: bool, as_json: bool) -> None:
    """Put another image behind IMAGE; its disk reads as before."""
    image_format = image.require("rebase", "can't have anything behind them")
    behind = parse_backing(backing) if backing else None
    with progress_bar(f"rebasing {image}") as progress:
        image_format.rebase(image.path, behind, unsafe=unsafe, progress=progress)
    _tell(image, "Rebased", as_json)


def _tell(image: NamedImage, done: str, as_json: bool) -> None:
    found = image.format.info(image.path)
    if as_json:
        print_json(info_json(found))
    else:
        size = found.virtual_size
        click.echo(f"{done} {image}: a disk of {human(size)} ({size} bytes).")
