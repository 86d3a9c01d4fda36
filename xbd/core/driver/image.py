"""What a driver of an image format offers to ``xbd image``: work on images nobody has open.

Everything here blocks and runs in a command, never in the daemon.  Each method opens and locks
the image itself, raises `OpenFailed` or another `DriverError` for what is wrong with the image or
the host, and `ConfigError` for what is wrong with the user's wishes: one line each, the image as
it was.  All offsets, lengths and sizes are bytes.
"""

from __future__ import annotations

import abc
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in bytes or whatever the work is counted in; may be called often."""


def no_progress(done: int, total: int) -> None:
    """For those who don't want to know."""


@attrs.frozen(kw_only=True)
class Backing:
    """The image behind an image, as it is written into it."""

    file: str
    """Absolute, or relative to the overlay's directory."""
    format: str
    """A format's name in the image's own words: ``raw``, ``qcow2``."""


@attrs.frozen(kw_only=True)
class SnapshotInfo:
    """An internal snapshot."""

    id: str
    name: str
    size: int
    """Of the disk when it was taken."""
    vm_state_size: int
    date: datetime.datetime
    vm_clock_ns: int
    icount: int | None = None


@attrs.frozen(kw_only=True)
class ImageInfo:
    """What ``xbd image info`` tells of one image, without those behind it."""

    path: Path
    format: str
    virtual_size: int
    actual_size: int
    """What it occupies on the host."""
    cluster_size: int | None = None
    encrypted: bool = False
    dirty: bool = False
    """It was not closed properly."""
    corrupt: bool = False
    backing_file: str | None = None
    """As it is written in the image."""
    backing_format: str | None = None
    """As it is written in the image; None: the image does not say it."""
    backing_path: Path | None = None
    """`backing_file`, found from the image's directory; None: it names no file."""
    data_file: str | None = None
    """The file with the data, as it is written in the image: the image has only the tables."""
    snapshots: Sequence[SnapshotInfo] = ()
    details: Mapping[str, Any] = attrs.field(factory=dict)
    """The format's own: names as qemu-img's JSON has them, values that JSON has."""


@attrs.frozen(kw_only=True)
class CheckReport:
    """What ``xbd image check`` found, and what of it is mended."""

    corruptions: int = 0
    """Still there: data may be lost or be lost later."""
    leaks: int = 0
    """Still there: clusters that nothing uses and nobody can get."""
    errors: int = 0
    """What could not be read, so that nothing is known of it."""
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    messages: Sequence[str] = ()
    """A line each, at most some thousands."""
    total_clusters: int = 0
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    image_end: int = 0
    """Offset in the host file of the end of the last cluster in use."""


@attrs.frozen(kw_only=True)
class MapEntry:
    """Where a range of the disk comes from; entries follow each other and cover the disk."""

    start: int
    length: int
    depth: int
    """0: this image, 1: the one behind it..."""
    present: bool
    """Some image of the chain says something of the range."""
    zero: bool
    data: bool
    compressed: bool = False
    file: Path | None = None
    offset: int | None = None
    """In `file`, where the bytes simply lie there."""


class ImageFormat(abc.ABC):
    """Offline work on images of one format."""

    create_options: type
    """A frozen attrs class whose fields were made by `option()`: what ``-o NAME=VALUE`` takes."""

    @abc.abstractmethod
    def create(
        self,
        path: Path,
        size: int | None,
        options: Any,
        *,
        backing: Backing | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Make a new image; `size` None: that of the backing image.  Never replaces a file."""

    @abc.abstractmethod
    def info(self, path: Path, *, share: bool = False) -> ImageInfo:
        """`share`: even while somebody writes to it."""

    def check(
        self, path: Path, *, repair: str | None = None, progress: Progress = no_progress
    ) -> CheckReport:
        """`repair`: None, ``leaks`` or ``all``."""
        raise NotImplementedError

    def resize(
        self,
        path: Path,
        size: int,
        *,
        shrink: bool = False,
        preallocation: str = "off",
        key_file: Path | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """`shrink`: losing what lies behind `size` is meant; `preallocation`: of what is new, as
        for `create`; `key_file`: with the passphrase of an encrypted image."""
        raise NotImplementedError

    def map(
        self, path: Path, *, image_dirs: Sequence[Path] | None = None, share: bool = False
    ) -> Iterator[MapEntry]:
        """`image_dirs`: see `OpenContext.image_dirs`; None: anywhere, the user is trusted."""
        raise NotImplementedError

    def create_snapshot(self, path: Path, name: str) -> None:
        """Keep the disk as it is now."""
        raise NotImplementedError

    def apply_snapshot(self, path: Path, name: str) -> None:
        """Make the disk what it was; `name` may be a snapshot's id."""
        raise NotImplementedError

    def delete_snapshot(self, path: Path, name: str) -> None:
        """Free what only the snapshot kept."""
        raise NotImplementedError

    def commit(self, path: Path, *, progress: Progress = no_progress) -> None:
        """Write what the image has into the one behind it, and empty the image."""
        raise NotImplementedError

    def rebase(
        self,
        path: Path,
        backing: Backing | None,
        *,
        unsafe: bool = False,
        progress: Progress = no_progress,
    ) -> None:
        """Put another image (None: none) behind it; the disk reads as before.

        `unsafe`: only change the name, because the new one has the old one's content.
        """
        raise NotImplementedError
