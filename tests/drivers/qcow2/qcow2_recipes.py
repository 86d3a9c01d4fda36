"""Images of every kind, with their content known: all but encrypted ones are made by QEMU."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import attrs
from qcow2_walk import prose, tool

from xbd.core.driver.image import Backing
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2.create import create
from xbd.drivers.qcow2.create_options import CreateOptions
from xbd.drivers.qcow2.opening import Wishes

SECRET = "correct horse"
_SECRET_OBJECT = ("--object", f"secret,id=s,data={SECRET}")


@attrs.frozen
class Made:
    """An image and what its disk reads as."""

    path: Path
    content: bytearray
    encrypted: bool = False

    @property
    def size(self) -> int:
        return len(self.content)

    def named(self) -> tuple[str, ...]:
        """What QEMU's tools are told of it."""
        if not self.encrypted:
            return ("-f", "qcow2", str(self.path))
        return (*_SECRET_OBJECT, "--image-opts", self._options())

    def _options(self) -> str:
        return f"driver=qcow2,encrypt.key-secret=s,file.filename={self.path}"

    def wishes(self, *, writable: bool = True, direct: bool = False) -> Wishes:
        """How xbd opens it."""
        key = SECRET.encode() if self.encrypted else None
        return Wishes(writable=writable, direct=direct, key=key)

    def qemu_io(self, *commands: str) -> str:
        """Let qemu-io carry out commands; what fails or reads otherwise is an error."""
        # 0x00 and patterns that differ are told in the output only.
        told = tool("qemu-io", *self.named(), *(word for c in commands for word in ("-c", c)))
        assert "fail" not in told.lower(), told
        assert "error" not in told.lower(), told
        return told

    def qemu_reads(self) -> bytes:
        """The disk as QEMU sees it."""
        copy = self.path.with_name("as-qemu-sees-it")
        tool("qemu-img", "convert", "-O", "raw", *self.named(), copy)
        data = copy.read_bytes()
        copy.unlink()
        return data

    def qemu_checks(self) -> None:
        """QEMU finds neither corruptions nor leaks."""
        tool("qemu-img", "check", "-q", *self.named())

    def agree(self) -> None:
        """QEMU finds nothing wrong, and reads what the model says."""
        self.qemu_checks()
        assert_same(self.qemu_reads(), self.content)


def assert_same(got: bytes | memoryview, wanted: bytes | bytearray) -> None:
    """Compare disks, and tell the first place where they differ rather than all bytes."""
    assert len(got) == len(wanted)
    if bytes(got) != bytes(wanted):
        at = next(i for i in range(len(wanted)) if got[i] != wanted[i])
        raise AssertionError(
            f"byte {at:#x} is {got[at]:#04x} instead of {wanted[at]:#04x}, "
            f"{sum(a != b for a, b in zip(got, wanted, strict=True))} bytes differ"
        )


@attrs.frozen(kw_only=True)
class Recipe:
    """How to make an image."""

    name: str
    options: str = ""
    """For ``qemu-img create -o``."""
    size: int = 512 * KIB
    backing: str = ""
    """``raw`` or ``qcow2``, or ``chain``: qcow2 over raw."""
    backing_size: int = 300 * KIB + 512
    compressed: bool = False
    """The content was put in compressed."""
    snapshot: bool = False
    """What was written first is kept by a snapshot, some of it overwritten since."""
    written: bool = False
    """Has content before anybody else writes."""
    encrypted: bool = False
    bitmap: bool = False
    """A dirty bitmap should follow every write."""

    def __str__(self) -> str:
        return self.name

    @property
    def external(self) -> bool:
        return "data_file=" in self.options

    @property
    def cluster_size(self) -> int:
        for option in self.options.split(","):
            name, _, value = option.partition("=")
            if name == "cluster_size":
                units = {"k": KIB, "M": MIB}
                return int(value.rstrip("kM")) * units.get(value[-1], 1)
        return 64 * KIB

    def make(self, directory: Path, seed: int = 0) -> Made:
        """Make it in an empty directory."""
        chance = random.Random(f"{self.name} {seed}")
        path = directory / "image.qcow2"
        content = bytearray(self.size)
        command: list[str | Path] = []
        if self.backing:
            below = patchwork(chance, self.backing_size)
            command += self._make_backing(directory, below, chance)
            content[: len(below)] = below[: self.size]
        options = self.options.replace("DIR", str(directory))
        if self.compressed:
            self._fill_compressed(directory, path, options, content, command, chance)
        elif self.encrypted:
            self._make_encrypted(directory, path)
        else:
            told: Sequence[str] = ("-o", options) if options else ()
            create_command = ("qemu-img", "create", "-q", "-f", "qcow2", *told, *command)
            tool(*create_command, path, str(self.size))
        made = Made(path, content, self.encrypted)
        if self.bitmap:
            tool("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "backup")
        if self.written or self.snapshot:
            scribble(made, chance)
        if self.snapshot:
            tool("qemu-img", "snapshot", "-c", "first", path)
            scribble(made, chance)
            tool("qemu-img", "snapshot", "-c", "second", path)
        return made

    def _make_encrypted(self, directory: Path, path: Path) -> None:
        """By ourselves: QEMU measures the processor for seconds first."""
        key = directory / "key"
        key.write_text(SECRET)
        key.chmod(0o600)
        options = CreateOptions(
            cluster_size=self.cluster_size,
            encrypt_format="luks",
            encrypt_key_file=key,
            encrypt_cipher_alg="aes-128",
        )
        behind = Backing(file="base.raw", format="raw") if self.backing else None
        with patch("xbd.drivers.qcow2.luks.UNLOCK_SECONDS", 0.0):
            create(path, self.size, options, backing=behind)

    def _make_backing(
        self, directory: Path, below: bytearray, chance: random.Random
    ) -> list[str | Path]:
        raw = directory / "base.raw"
        raw.write_bytes(below)
        if self.backing == "raw":
            return ["-b", raw, "-F", "raw"]
        base = directory / "base.qcow2"
        if self.backing == "qcow2":
            tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, base)
        else:
            create = ("qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", base)
            tool(*create, str(len(below)))
            scribble(Made(base, below), chance)
        return ["-b", base, "-F", "qcow2"]

    def _fill_compressed(
        self,
        directory: Path,
        path: Path,
        options: str,
        content: bytearray,
        backing: list[str | Path],
        chance: random.Random,
    ) -> None:
        half = self.size // 2
        content[:half] = prose(half, chance.randrange(1 << 30))
        content[half : half + half // 2] = bytes(half // 2)
        raw = directory / "content.raw"
        raw.write_bytes(content)
        behind = ["-B", backing[1], *backing[2:]] if backing else []
        told = ["-o", options] if options else []
        convert = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *told, *behind]
        tool(*convert, raw, path)
        raw.unlink()


def patchwork(chance: random.Random, size: int) -> bytearray:
    """Noise with holes in it."""
    data = bytearray(chance.randbytes(size))
    for _ in range(4):
        length = min(chance.randrange(1, max(2, size // 6)), size)
        at = chance.randrange(size - length + 1)
        data[at : at + length] = bytes(length)
    return data


def scribble(made: Made, chance: random.Random, times: int = 6) -> None:
    """Let qemu-io write, zero and discard here and there, in units of 512 bytes."""
    commands = []
    size = made.size - made.size % 512
    for _ in range(times):
        length = min(512 * chance.choice((1, 3, 8, 40, 128, 200)), size)
        at = 512 * chance.randrange((size - length) // 512 + 1)
        part = slice(at, at + length)
        kind = chance.random()
        if kind < 0.7:
            pattern = chance.randrange(1, 256)
            commands.append(f"write -q -P {pattern} {at} {length}")
            made.content[part] = bytes((pattern,)) * length
        else:
            commands.append(f"write -q -z {'-u ' if kind < 0.85 else ''}{at} {length}")
            made.content[part] = bytes(length)
    made.qemu_io(*commands)


RECIPES = (
    Recipe(name="default"),
    Recipe(name="v2", options="compat=0.10"),
    Recipe(name="512", options="cluster_size=512", size=256 * KIB),
    Recipe(name="4k", options="cluster_size=4k"),
    Recipe(name="2M", options="cluster_size=2M", size=3 * MIB),
    Recipe(name="1-bit", options="refcount_bits=1"),
    Recipe(name="2-bit-512", options="refcount_bits=2,cluster_size=512", size=256 * KIB),
    Recipe(name="64-bit-512", options="refcount_bits=64,cluster_size=512", size=256 * KIB),
    Recipe(name="8-bit", options="refcount_bits=8,cluster_size=8k"),
    Recipe(name="subclusters", options="extended_l2=on"),
    Recipe(name="subclusters-16k", options="extended_l2=on,cluster_size=16k"),
    Recipe(name="lazy", options="lazy_refcounts=on"),
    Recipe(name="metadata", options="preallocation=metadata"),
    Recipe(name="falloc", options="preallocation=falloc,cluster_size=4k"),
    Recipe(name="full", options="preallocation=full"),
    Recipe(name="written", written=True),
    Recipe(name="over-shorter", backing="raw"),
    Recipe(name="over-longer", backing="raw", backing_size=700 * KIB),
    Recipe(name="over-qcow2", backing="qcow2"),
    Recipe(name="over-two", backing="chain", options="cluster_size=4k"),
    Recipe(name="v2-over", options="compat=0.10,cluster_size=4k", backing="raw"),
    Recipe(name="subclusters-over", options="extended_l2=on", backing="raw"),
    Recipe(name="subclusters-over-two", options="extended_l2=on,cluster_size=16k", backing="chain"),
    Recipe(name="zlib", compressed=True),
    Recipe(name="zlib-4k", options="cluster_size=4k", compressed=True),
    Recipe(name="zstd", options="compression_type=zstd", compressed=True),
    Recipe(name="zlib-subclusters", options="extended_l2=on", compressed=True),
    Recipe(name="snapshots", options="cluster_size=4k", snapshot=True),
    Recipe(name="snapshots-over", options="cluster_size=4k", snapshot=True, backing="raw"),
    Recipe(name="snapshots-zlib", snapshot=True, compressed=True, size=MIB),
    Recipe(name="snapshots-v2", options="compat=0.10,cluster_size=512", snapshot=True),
    Recipe(name="snapshots-subclusters", options="extended_l2=on,cluster_size=16k", snapshot=True),
    Recipe(name="bitmap", options="cluster_size=4k", bitmap=True),
    Recipe(name="external", options="data_file=DIR/image.data"),
    Recipe(name="external-raw", options="data_file=DIR/image.data,data_file_raw=on"),
    Recipe(name="external-4k", options="data_file=DIR/image.data,cluster_size=4k"),
    Recipe(name="luks", encrypted=True),
    Recipe(name="luks-4k-over", encrypted=True, options="cluster_size=4k", backing="raw"),
)
"""At least one of each feature, and the combinations that have ways of their own."""

NAMED = {recipe.name: recipe for recipe in RECIPES}

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


def some(names: str) -> list[Recipe]:
    """These recipes; all, when there is time."""
    return list(RECIPES) if THOROUGH else [NAMED[name] for name in names.split()]
