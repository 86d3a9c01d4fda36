"""``xbd image convert``: one disk's content as another disk."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import click

from xbd.cli.image.naming import (
    IMAGE,
    NamedImage,
    parse_backing,
    parse_create_options,
)
from xbd.cli.image.output import human, json_option, print_json, progress_bar
from xbd.core.errors import ConfigError

if TYPE_CHECKING:
    from xbd.core.driver.access import DeviceAccess
    from xbd.core.driver.image import Backing, Progress

_ANYWHERE: Final = (Path("/"),)
"""Where files that an image names may lie: the user of a command could read them anyway."""


@attrs.frozen(kw_only=True)
class _Job:
    source: NamedImage
    target: NamedImage
    create: bool
    options: tuple[str, ...]
    backing: Backing | None
    compress: bool
    target_is_zero: bool


@click.command("convert")
@click.argument("source", type=IMAGE, metavar="SRC")
@click.argument("target", type=IMAGE, metavar="DST")
@click.option(
    "-o",
    "options",
    metavar="NAME=VALUE",
    multiple=True,
    help="An option of the new image, as for 'create'.",
)
@click.option("-c", "--compress", is_flag=True, help="Store it compressed.")
@click.option(
    "-b",
    "-B",
    "--backing",
    metavar="IMAGE",
    help="The image behind DST, as for 'create'; DST then stores only what differs from it.",
)
@click.option("-n", "--no-create", is_flag=True, help="DST exists, and is written over.")
@click.option(
    "--target-is-zero", is_flag=True, help="With -n: DST reads as zeroes, write none of them."
)
@click.option(
    "-U",
    "--share",
    is_flag=True,
    help="Read SRC even while somebody writes to it; the copy may be inconsistent.",
)
@json_option
def convert(
    source: NamedImage,
    target: NamedImage,
    options: tuple[str, ...],
    compress: bool,
    backing: str | None,
    no_create: bool,
    target_is_zero: bool,
    share: bool,
    as_json: bool,
) -> None:
    """Copy the disk SRC to the new image DST.

    Both are written DRIVER:PATH[?OPTION=VALUE&...], with the driver's options for opening them.
    """
    if no_create and (options or backing):
        raise ConfigError("with --no-create nothing is made that -o or -b could apply to")
    if target_is_zero and not no_create:
        raise ConfigError("--target-is-zero is for --no-create: a new image is known to be zero")
    if share:
        source = _with_option(source, "locking", "no")
    if compress:
        target = _with_option(target, "compress", "yes")
    job = _Job(
        source=source,
        target=target,
        create=not no_create,
        options=options,
        backing=None if backing is None else parse_backing(backing),
        compress=compress,
        target_is_zero=target_is_zero,
    )
    with progress_bar(f"converting {source}") as progress:
        size = _run(job, progress)
    if as_json:
        print_json({"source": str(source), "target": str(target), "virtual-size": size})
    else:
        click.echo(f"Converted {source} to {target}: a disk of {human(size)} ({size} bytes).")


def _with_option(image: NamedImage, name: str, value: str) -> NamedImage:
    from xbd.core.driver.options import describe_options

    if name not in {option.name for option in describe_options(image.driver.options)}:
        raise ConfigError(f"{image}: the driver {image.spec.driver!r} has no option {name!r}")
    options = {key: text for key, text in image.spec.options.items() if key != name}
    return image.with_options(options | {name: value})


def _run(job: _Job, progress: Progress) -> int:
    import trio

    signalled, size = trio.run(partial(_convert_or_stop, job, progress))
    if signalled:
        click.get_current_context().exit(128 + signalled)
    return size


async def _convert_or_stop(job: _Job, progress: Progress) -> tuple[int, int]:
    """Which signal came (0: none), which leaves nothing half-made, and the disk's size."""
    import trio

    signalled, size = 0, 0

    async def stop(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        nonlocal signalled
        # Python's own way for SIGINT, an exception anywhere, may be lost in a destructor.
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                signalled = number
                scope.cancel()

    async with trio.open_nursery() as nursery:
        await nursery.start(stop, nursery.cancel_scope)
        size = await _convert(job, progress)
        nursery.cancel_scope.cancel()
    return signalled, size


async def _convert(job: _Job, progress: Progress) -> int:
    from xbd.core.driver.convert import Copier
    from xbd.core.driver.open import open_disk

    with ExitStack() as stack:
        opening = open_disk(
            job.source.spec, device_id="source", writable=False, image_dirs=_ANYWHERE
        )
        async with opening as source:
            size = source.geometry.size
            target = stack.enter_context(_made(job, size)) if job.create else job.target
            unit = _cluster_size(target) if job.compress else None
            opening = open_disk(
                target.spec, device_id="target", writable=True, image_dirs=_ANYWHERE
            )
            async with opening as access:
                _require_room(job, access, size)
                await Copier(
                    source,
                    access,
                    target_is_zero=job.create or job.target_is_zero,
                    compare=job.backing is not None,
                    unit=unit,
                    progress=progress,
                ).run()
    return size


def _cluster_size(image: NamedImage) -> int | None:
    """Only whole clusters can be compressed."""
    return image.with_options({}).format.info(image.path).cluster_size


def _require_room(job: _Job, access: DeviceAccess, size: int) -> None:
    there = access.geometry.size
    if there < size:
        raise ConfigError(f"{job.target} has {there} bytes, {job.source} has {size}")


@contextmanager
def _made(job: _Job, size: int) -> Iterator[NamedImage]:
    """The new image, under another name until the block ends without an error."""
    from xbd.core.hostio.newfile import publish, require_absent

    path = job.target.path
    unopened = job.target.with_options({})
    options = parse_create_options(unopened.format, job.options)
    require_absent(path)
    draft = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")
    unopened.format.create(draft, size, options, backing=job.backing)
    made = [draft]
    try:
        info = unopened.format.info(draft)
        if info.data_file is not None:
            made.append(draft.parent / info.data_file)
        yield job.target.at(draft)
        publish(draft, path)
    except BaseException:
        for file in made:
            file.unlink(missing_ok=True)
        raise
