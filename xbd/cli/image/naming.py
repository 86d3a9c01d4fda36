"""How images are named on the command line: ``DRIVER:PATH``, and never guessed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import click

from xbd.core.driver.api import DriverDescriptor
from xbd.core.driver.image import Backing, ImageFormat
from xbd.core.driver.options import size
from xbd.core.driver.spec import DRIVER_NAME, DiskSpec
from xbd.core.errors import ConfigError

_FORMAT_OF_DRIVER: Final = {"imagefile": "raw", "raw": "raw"}
"""Formats as image headers name them, where that is not the driver's name."""

_DRIVER_OF_FORMAT: Final = {"raw": "imagefile"}


@attrs.frozen(kw_only=True)
class NamedImage:
    """An image that a command is about."""

    spec: DiskSpec
    path: Path

    @property
    def driver(self) -> DriverDescriptor[Any]:
        """Raises `ConfigError`: not installed, not usable."""
        from xbd.core.driver.registry import load_driver

        return load_driver(self.spec.driver)

    @property
    def format(self) -> ImageFormat:
        """Raises `ConfigError` if the driver is not one of an image format."""
        make = self.driver.image_format
        if make is None:
            raise ConfigError(
                f"the driver {self.spec.driver!r} has no images that could be worked on"
            )
        if self.spec.options:
            raise ConfigError(
                f"{self.spec}: options after '?' are for opening a disk, this command takes none"
            )
        return make()

    def can(self, work: str) -> bool:
        """Whether the format has this method of `ImageFormat`."""
        return getattr(type(self.format), work) is not getattr(ImageFormat, work)

    def require(self, work: str, what: str) -> ImageFormat:
        """The format, if it has this method; `what` completes "...: NAME images ..."."""
        if not self.can(work):
            raise ConfigError(f"{self.spec}: {self.spec.driver} images {what}")
        return self.format

    def with_options(self, options: Mapping[str, str]) -> NamedImage:
        """The same with other options for opening it."""
        return attrs.evolve(self, spec=attrs.evolve(self.spec, options=options))

    def at(self, path: Path) -> NamedImage:
        """The same at another place."""
        return attrs.evolve(self, spec=attrs.evolve(self.spec, path=str(path)), path=path)

    def __str__(self) -> str:
        return str(self.spec)


def parse_image(text: str) -> NamedImage:
    """Take apart ``DRIVER:PATH``; relative paths are from here.  Raises `ConfigError`."""
    driver, colon, _ = text.partition(":")
    if text and (not colon or not DRIVER_NAME.fullmatch(driver)):
        shown = text if text.isprintable() else ascii(text)
        raise ConfigError(
            f"{shown!r} does not say what it is: write qcow2:{shown} or imagefile:{shown}"
        )
    spec = DiskSpec.parse(text)
    place = Path(spec.path).absolute()
    return NamedImage(spec=attrs.evolve(spec, path=str(place)), path=place)


class ImageType(click.ParamType[NamedImage]):
    """An image, as a command's argument."""

    name = "image"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> NamedImage:
        """See `parse_image`."""
        return value if isinstance(value, NamedImage) else parse_image(value)


IMAGE: Final = ImageType()


def parse_backing(text: str) -> Backing:
    """What is written into an image of ``DRIVER:PATH``; the path stays as it is given.

    Relative paths are from the image's directory.
    """
    parse_image(text)  # for its complaints
    spec = DiskSpec.parse(text)
    if spec.options:
        raise ConfigError(f"{spec}: an image has no room for a backing file's options after '?'")
    return Backing(file=spec.path, format=_FORMAT_OF_DRIVER.get(spec.driver, spec.driver))


def behind(path: Path, format_name: str) -> NamedImage:
    """An image that another one names."""
    driver = _DRIVER_OF_FORMAT.get(format_name, format_name)
    if not DRIVER_NAME.fullmatch(driver):
        raise ConfigError(f"{path}: there is no driver for the format {format_name!r}")
    path = path.absolute()
    return NamedImage(spec=DiskSpec(driver, str(path)), path=path)


def parse_size(text: str) -> int:
    """Bytes, with K, M, G... for powers of 1024; raises `ConfigError`."""
    try:
        return size(text)
    except ValueError as error:
        raise ConfigError(f"size: {error}") from None


def new_size(text: str, old_size: Callable[[], int], name: str) -> int:
    """``20G``, or ``+5G`` or ``-5G`` from the old size on, in bytes; raises `ConfigError`."""
    match = re.fullmatch(r"([+-]?)(.*)", text, re.DOTALL)
    assert match is not None
    size = parse_size(match[2])
    if not match[1]:
        return size
    old = old_size()
    if match[1] == "+":
        return old + size
    if size > old:
        raise ConfigError(f"{name} has only {old} bytes, not {size}")
    return old - size


def parse_create_options(image_format: ImageFormat, pairs: tuple[str, ...]) -> Any:
    """An instance of the format's `create_options`, from ``NAME=VALUE,...``.

    As with qemu-img, a comma separates options, and two commas are a comma in a value.
    """
    from xbd.core.driver.options import parse_options

    return parse_options(image_format.create_options, _split(pairs))


def _split(texts: tuple[str, ...]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        for part in text.replace(",,", "\0").split(","):
            name, equals, value = part.replace("\0", ",").partition("=")
            if not equals or not name:
                raise ConfigError(f"-o {text}: options are written NAME=VALUE")
            # QEMU's names: cluster_size, encrypt.key-secret...
            normal = name.replace("_", "-").replace(".", "-")
            if normal in found:
                raise ConfigError(f"-o {text}: {normal} is given twice")
            found[normal] = value
    return found
