"""``xbd image snapshot``: snapshots inside an image."""

from __future__ import annotations

import click

from xbd.cli.image.naming import IMAGE, NamedImage
from xbd.cli.image.output import (
    finished_first,
    json_option,
    print_json,
    print_snapshots,
    printable,
    share_option,
    snapshot_json,
)

_NONE = "have no snapshots inside"


@click.group("snapshot")
def snapshot() -> None:
    """List, create, apply or delete snapshots inside an image."""


@snapshot.command("list")
@click.argument("image", type=IMAGE)
@share_option
@json_option
def list_(image: NamedImage, share: bool, as_json: bool) -> None:
    """Show the snapshots inside IMAGE."""
    image_format = image.require("create_snapshot", _NONE)
    snapshots = image_format.info(image.path, share=share).snapshots
    if as_json:
        print_json([snapshot_json(one) for one in snapshots])
    elif snapshots:
        print_snapshots(snapshots)
    else:
        click.echo("No snapshots.")


@snapshot.command("create")
@click.argument("image", type=IMAGE)
@click.argument("name")
@json_option
def create(image: NamedImage, name: str, as_json: bool) -> None:
    """Keep the disk as it is now, under NAME."""
    with finished_first():
        image.require("create_snapshot", _NONE).create_snapshot(image.path, name)
        _tell(image, f"Created snapshot {name}", as_json)


@snapshot.command("apply")
@click.argument("image", type=IMAGE)
@click.argument("name")
@json_option
def apply(image: NamedImage, name: str, as_json: bool) -> None:
    """Make the disk what it was in the snapshot NAME (or its ID); what it is now is lost."""
    with finished_first():
        image.require("apply_snapshot", _NONE).apply_snapshot(image.path, name)
        _tell(image, f"Applied snapshot {name}", as_json)


@snapshot.command("delete")
@click.argument("image", type=IMAGE)
@click.argument("name")
@json_option
def delete(image: NamedImage, name: str, as_json: bool) -> None:
    """Forget the snapshot NAME (or its ID)."""
    with finished_first():
        image.require("delete_snapshot", _NONE).delete_snapshot(image.path, name)
        _tell(image, f"Deleted snapshot {name}", as_json)


def _tell(image: NamedImage, done: str, as_json: bool) -> None:
    if as_json:
        snapshots = image.format.info(image.path).snapshots
        print_json([snapshot_json(one) for one in snapshots])
    else:
        click.echo(f"{printable(done)}: {image}")
