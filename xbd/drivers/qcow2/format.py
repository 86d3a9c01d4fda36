"""What ``xbd image`` does to qcow2 images; each kind of work is in a module of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from xbd.core.driver import Backing, CheckReport, ImageFormat, ImageInfo, MapEntry, Progress
from xbd.core.driver.image import no_progress
from xbd.drivers.qcow2.create_options import CreateOptions


class Qcow2Format(ImageFormat):
    """Offline work on qcow2 images.  Modules are imported on use: a command needs few."""

    create_options = CreateOptions

    def create(
        self,
        path: Path,
        size: int | None,
        options: CreateOptions,
        *,
        backing: Backing | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Make an image with the options of qemu-img."""
        from xbd.drivers.qcow2.create import create

        create(path, size, options, backing=backing, progress=progress)

    def info(self, path: Path, *, share: bool = False) -> ImageInfo:
        """What the image's own file says."""
        from xbd.drivers.qcow2.info import read_info

        return read_info(path, share=share)

    def check(
        self, path: Path, *, repair: str | None = None, progress: Progress = no_progress
    ) -> CheckReport:
        """Look for damage, and mend it."""
        from xbd.drivers.qcow2.check import check_image

        return check_image(path, repair=repair, progress=progress)

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
        """Make the disk larger or smaller."""
        from xbd.drivers.qcow2.resize import resize

        resize(
            path,
            size,
            shrink=shrink,
            preallocation=preallocation,
            key_file=key_file,
            progress=progress,
        )

    def map(
        self, path: Path, *, image_dirs: Sequence[Path] | None = None, share: bool = False
    ) -> Iterator[MapEntry]:
        """Where the disk's bytes come from, through the whole chain."""
        from xbd.drivers.qcow2.map import map_image

        return map_image(path, image_dirs=image_dirs, share=share)

    def create_snapshot(self, path: Path, name: str) -> None:
        """Keep the disk as it is now."""
        from xbd.drivers.qcow2.snapshots import create_snapshot

        create_snapshot(path, name)

    def apply_snapshot(self, path: Path, name: str) -> None:
        """Make the disk what it was."""
        from xbd.drivers.qcow2.snapshots import apply_snapshot

        apply_snapshot(path, name)

    def delete_snapshot(self, path: Path, name: str) -> None:
        """Free what only the snapshot kept."""
        from xbd.drivers.qcow2.snapshots import delete_snapshot

        delete_snapshot(path, name)

    def commit(self, path: Path, *, progress: Progress = no_progress) -> None:
        """Write what the image has into the one behind it, and empty the image."""
        from xbd.drivers.qcow2.commit import commit

        commit(path, progress=progress)

    def rebase(
        self,
        path: Path,
        backing: Backing | None,
        *,
        unsafe: bool = False,
        progress: Progress = no_progress,
    ) -> None:
        """Put another image behind it."""
        from xbd.drivers.qcow2.rebase import rebase

        rebase(path, backing, unsafe=unsafe, progress=progress)
