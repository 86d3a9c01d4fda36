"""A disk as the backends are told of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Disk:
    """A file and how to open it."""

    path: Path
    through_cache: bool
    driver: str = "imagefile"
    """xbd's."""
    options: str = ""
    """More for that, ``&name=value``."""
    format: str = "raw"
    """QEMU's name for it."""
    backing: Path | None = None
    """What the image names as lying behind it: qcow2."""

    @property
    def spec(self) -> str:
        """As xbd wants it."""
        cache = "writeback" if self.through_cache else "none"
        return f"{self.driver}:{self.path}?cache={cache}{self.options}"

    def qemu_blockdevs(self, name: str, *, locking: bool) -> list[str]:
        """Arguments for qemu-storage-daemon; the node is called `name`."""
        arguments = self._file(f"{name}-file", self.path, locking=locking)
        node = f"driver={self.format},node-name={name},file={name}-file"
        if self.backing is not None:
            arguments += self._file(f"{name}-base-file", self.backing, locking=locking)
            base = f"driver=qcow2,node-name={name}-base,file={name}-base-file,read-only=on"
            arguments += ["--blockdev", base]
            node += f",backing={name}-base"
        return [*arguments, "--blockdev", node]

    def _file(self, name: str, path: Path, *, locking: bool) -> list[str]:
        file = f"driver=file,node-name={name},filename={path},aio=io_uring"
        file += f",cache.direct={'off' if self.through_cache else 'on'}"
        return ["--blockdev", file if locking else f"{file},locking=off"]
