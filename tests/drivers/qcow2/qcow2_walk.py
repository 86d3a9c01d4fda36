"""QEMU's tools, and a reader of their images' tables that shares nothing with the driver's."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from xbd.drivers.qcow2.header import Header, parse_header
from xbd.drivers.qcow2.layout import COMPRESSED, OFFSET_MASK


def tool(*command: str | Path) -> str:
    """Run one of QEMU's tools; its complaint becomes the test's."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def prose(length: int, seed: int) -> bytes:
    """Bytes that pack well, without being all the same."""
    chance = random.Random(seed)
    words = [chance.randbytes(chance.randrange(2, 9)) for _ in range(200)]
    text = bytearray()
    while len(text) < length:
        text += chance.choice(words)
    return bytes(text[:length])


@attrs.frozen
class Walk:
    """The file of an image, taken apart."""

    path: Path
    header: Header

    @classmethod
    def open(cls, path: Path) -> Walk:
        with path.open("rb") as file:
            return cls(path, parse_header(file.read(2 << 20)))

    def read(self, offset: int, length: int) -> bytes:
        """Zeroes behind the file's end."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def entries(self) -> Iterator[tuple[int, int, int]]:
        """(guest offset, L2 entry, where that entry lies in the file) of what is allocated."""
        cluster, width = self.header.cluster_size, self.header.l2_entry_bytes
        l1 = self.read(self.header.l1_table_offset, self.header.l1_size * 8)
        for index, (table,) in enumerate(struct.iter_unpack(">Q", l1)):
            if not table & OFFSET_MASK:
                continue
            l2 = self.read(table & OFFSET_MASK, cluster)
            for place in range(cluster // width):
                (entry,) = struct.unpack_from(">Q", l2, place * width)
                if entry:
                    guest = index * self.header.l1_coverage + place * cluster
                    yield guest, entry, (table & OFFSET_MASK) + place * width

    def host_offset(self, guest: int) -> int:
        """Of an allocated, uncompressed cluster."""
        entry = next(entry for offset, entry, _ in self.entries() if offset == guest)
        assert not entry & COMPRESSED
        return entry & OFFSET_MASK
