"""``xbd image create``."""

from __future__ import annotations

import click

from xbd.cli.image.naming import (
    IMAGE,
    NamedImage,
    parse_backing,
    parse_create_options,
    parse_size,
)
from xbd.cli.image.output import (
    ended_by_sigterm,
    human,
    info_json,
    json_option,
    print_json,
    progress_bar,
)


@click.command("create")
@click.argument("image", type=IMAGE)
@click.argument("size", required=False)
@click.option(
    "-o",
    "options",
    metavar="NAME=VALUE",
    multiple=True,
    help="An option of the format; may be repeated.  'help' shows them all.",
)
@click.option(
    "-b",
    "--backing",
    metavar="IMAGE",
    help="The image behind this one: DRIVER:PATH, the path absolute or relative to IMAGE's "
    "directory.  SIZE may be left out then.",
)
@json_option
def create(
    image: NamedImage,
    size: str | None,
    options: tuple[str, ...],
    backing: str | None,
    as_json: bool,
) -> None:
    """Make the new IMAGE of SIZE bytes (or 512K, 10M, 20G, 1T...)."""
    if options == ("help",):
        _print_options(image)
        return
    chosen = parse_create_options(image.format, options)
    wanted = None if size is None else parse_size(size)
    behind = None if backing is None else parse_backing(backing)
    with ended_by_sigterm(), progress_bar(f"creating {image}") as progress:
        image.format.create(image.path, wanted, chosen, backing=behind, progress=progress)
    made = image.format.info(image.path)
    if as_json:
        print_json(info_json(made))
    else:
        virtual = made.virtual_size
        click.echo(f"Created {image}: a disk of {human(virtual)} ({virtual} bytes).")


def _print_options(image: NamedImage) -> None:
    from xbd.core.driver.options import describe_options

    click.echo(f"Options of new {image.spec.driver} images:")
    for option in describe_options(image.format.create_options):
        default = {True: "yes", False: "no", None: "none"}.get(option.default, option.default)
        click.echo(f"  {option.name}={option.type} ({default})")
        click.echo(click.wrap_text(option.help, 78, "      ", "      "))
