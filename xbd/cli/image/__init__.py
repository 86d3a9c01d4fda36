"""``xbd image``: work on images that nobody has open.

The commands do what those of qemu-img do, under the same names.
"""

from __future__ import annotations

from typing import Final

import click

from xbd.cli.image.change import commit, rebase, resize
from xbd.cli.image.check import check
from xbd.cli.image.convert import convert
from xbd.cli.image.create import create
from xbd.cli.image.info import info
from xbd.cli.image.map import map_
from xbd.cli.image.snapshot import snapshot

_COMMANDS: Final = (create, info, check, resize, snapshot, map_, convert, commit, rebase)


@click.group("image")
def image() -> None:
    """Make, look at, check and change disk images.

    An IMAGE is written DRIVER:PATH, for example qcow2:/srv/a.qcow2 or imagefile:/srv/b.img.
    """


for _command in _COMMANDS:
    image.add_command(_command)
