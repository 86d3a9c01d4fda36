"""Small qcow2 images by QEMU, with every feature that the format has, and ways to damage them."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import attrs

from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2.bitmaps import directory_of, load_bitmaps
from xbd.drivers.qcow2.check import load_header
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.host import open_host
from xbd.drivers.qcow2.layout import COMPRESSED, OFFSET_MASK, compressed_extent

SECRET = ("--object", "secret,id=key,data=quite secret")
KEY = b"quite secret"

WRITES = "write -P 1 0 200k;write -P 2 1M 64k;write -P 3 1500k 300k;write -z 1100k 8k"


@attrs.frozen(kw_only=True)
class Recipe:
    """How a seed is made."""

    name: str
    options: str = ""
    size: int = 4 * MIB
    encrypted: bool = False
    writes: Sequence[str] = (WRITES,)
    """In between, snapshots are taken."""
    bitmaps: bool = False
    backing: str | None = None
    """Format of the image behind it."""
    abort: bool = False
    """QEMU is killed in the end."""


RECIPES = (
    Recipe(name="plain"),
    Recipe(name="version2", options="compat=0.10", writes=(WRITES, "write -P 4 100k 200k")),
    Recipe(name="tiny-clusters", options="cluster_size=512,refcount_bits=1", size=2 * MIB),
    Recipe(
        name="wide-refcounts",
        options="cluster_size=4k,refcount_bits=64",
        writes=(WRITES, "write -P 5 0 64k", "write -P 6 32k 64k"),
    ),
    Recipe(name="refcounts32", options="cluster_size=2k,refcount_bits=32", writes=(WRITES, "")),
    Recipe(
        name="refcounts8",
        options="cluster_size=1k,refcount_bits=8",
        size=MIB,
        writes=("write -P 1 0 64k", "write -P 7 0 3k", "write -z 8k 8k"),
    ),
    Recipe(
        name="refcounts4",
        options="cluster_size=4k,refcount_bits=4",
        writes=(WRITES, "write -P 8 0 64k"),
    ),
    Recipe(name="refcounts2", options="cluster_size=4k,refcount_bits=2", writes=(WRITES, "")),
    Recipe(
        name="extended",
        options="cluster_size=16k,extended_l2=on",
        writes=("write -P 1 1k 2k;write -P 2 20k 40k;write -z 512 512", "write -P 3 2k 30k"),
    ),
    Recipe(name="compressed", options="cluster_size=4k", writes=("write -c -P 9 0 256k",)),
    Recipe(
        name="zstd",
        options="compression_type=zstd",
        writes=("write -c -P 9 0 1M;write -P 1 128k 64k", "write -P 2 0 192k"),
    ),
    Recipe(
        name="extended-compressed",
        options="cluster_size=64k,extended_l2=on",
        writes=("write -c -P 9 0 512k;write -P 1 600k 4k",),
    ),
    Recipe(name="bitmaps", options="cluster_size=4k", bitmaps=True),
    Recipe(name="data-file", options="data_file={directory}/data,cluster_size=16k"),
    Recipe(
        name="raw-data-file",
        options="data_file={directory}/raw-data,data_file_raw=on",
        size=2 * MIB,
    ),
    Recipe(
        name="extended-data-file",
        options="data_file={directory}/extended-data,extended_l2=on,cluster_size=16k",
    ),
    Recipe(name="luks", encrypted=True, size=MIB, writes=("write -P 1 0 128k", "")),
    Recipe(name="lazy", options="lazy_refcounts=on,cluster_size=8k", abort=True),
    Recipe(name="overlay", options="cluster_size=8k", backing="qcow2"),
    Recipe(name="overlay-of-raw", options="cluster_size=32k", backing="raw", size=8 * MIB),
    Recipe(name="preallocated", options="preallocation=metadata,cluster_size=16k", size=2 * MIB),
    Recipe(
        name="extended-zeroes",
        options="preallocation=metadata,extended_l2=on,cluster_size=32k",
        size=MIB,
        writes=("write -z 0 4k;write -z 64k 64k;write -P 1 130k 1k",),
    ),
    Recipe(
        name="zeroes",
        options="cluster_size=4k",
        writes=("write -P 1 0 256k;write -z 16k 64k;write -z -u 128k 32k;discard 200k 16k",),
    ),
)


@attrs.frozen(kw_only=True)
class Seed:
    """A whole image."""

    name: str
    path: Path
    encrypted: bool

    @property
    def options(self) -> str:
        """For ``--image-opts``."""
        return image_options(self.path, encrypted=self.encrypted)


def image_options(path: Path, *, encrypted: bool) -> str:
    told = f"driver=qcow2,cache.no-flush=on,file.driver=file,file.filename={path}"
    return f"{told},encrypt.key-secret=key" if encrypted else told


def run(*command: str | Path, good: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=120,
    )
    assert done.returncode == 0 or not good, f"{command}: {done.stdout}{done.stderr}"
    return done


def make_seed(recipe: Recipe, directory: Path) -> Seed:
    """Make one image in a directory."""
    path = directory / f"{recipe.name}.qcow2"
    options = [option for option in recipe.options.format(directory=directory).split(",") if option]
    if recipe.encrypted:
        options += ["encrypt.format=luks", "encrypt.key-secret=key", "encrypt.iter-time=10"]
    command: list[str | Path] = ["qemu-img", "create", "-q", *SECRET, "-f", "qcow2"]
    if options:
        command += ["-o", ",".join(options)]
    if recipe.backing:
        behind = directory / f"{recipe.name}.backing"
        run("qemu-img", "create", "-q", "-f", recipe.backing, behind, "3M")
        run("qemu-io", "-f", recipe.backing, "-c", "write -P 77 0 1M", behind)
        command += ["-b", behind, "-F", recipe.backing]
    for _ in range(4):
        made = run(*command, path, str(recipe.size), good=False)
        # It measures the machine's speed, and gives up where others need it as well.
        if "accurate CPU usage" not in made.stderr:
            break
    assert made.returncode == 0, made.stderr
    seed = Seed(name=recipe.name, path=path, encrypted=recipe.encrypted)
    if recipe.bitmaps:
        run("qemu-img", "bitmap", "--add", "-g", "64k", path, "followed")
        run("qemu-img", "bitmap", "--add", "--disable", "-g", "512", path, "kept")
    for number, writes in enumerate(recipe.writes):
        if number:
            run(
                *("qemu-img", "snapshot", *SECRET, "--image-opts"),
                *("-c", f"snapshot {number}", seed.options),
            )
        commands = [part for write in writes.split(";") if write for part in ("-c", write)]
        if recipe.abort:
            commands += ["-c", "abort"]
        if commands:
            run(
                *("qemu-io", *SECRET, "--image-opts", *commands, seed.options),
                good=not recipe.abort,
            )
    return seed


class Seeds:
    """Makes each image when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        """Those that are already in the directory are taken as they are."""
        self.directory = directory
        self._made: dict[str, Seed] = {}

    def __getitem__(self, name: str) -> Seed:
        if name not in self._made:
            recipe = next(recipe for recipe in RECIPES if recipe.name == name)
            path = self.directory / f"{name}.qcow2"
            if path.exists():
                self._made[name] = Seed(name=name, path=path, encrypted=recipe.encrypted)
            else:
                self._made[name] = make_seed(recipe, self.directory)
        return self._made[name]

    def copy(self, name: str, target: Path) -> Seed:
        """One to be changed; what it names stays shared."""
        seed = self[name]
        shutil.copyfile(seed.path, target)
        return attrs.evolve(seed, path=target)


# -- damage -------------------------------------------------------------------------------------


@attrs.frozen
class Field:
    """Bytes with a meaning."""

    name: str
    offset: int
    length: int


HEADER = (
    Field("magic", 0, 4),
    Field("version", 4, 4),
    Field("backing_file_offset", 8, 8),
    Field("backing_file_size", 16, 4),
    Field("cluster_bits", 20, 4),
    Field("size", 24, 8),
    Field("crypt_method", 32, 4),
    Field("l1_size", 36, 4),
    Field("l1_table_offset", 40, 8),
    Field("refcount_table_offset", 48, 8),
    Field("refcount_table_clusters", 56, 4),
    Field("nb_snapshots", 60, 4),
    Field("snapshots_offset", 64, 8),
    Field("incompatible_features", 72, 8),
    Field("compatible_features", 80, 8),
    Field("autoclear_features", 88, 8),
    Field("refcount_order", 96, 4),
    Field("header_length", 100, 4),
    Field("compression_type", 104, 1),
)


def words(name: str, offset: int, count: int, least: int = 0) -> list[Field]:
    return [Field(name, offset + 8 * place, 8) for place in range(least, count)]


def interesting(path: Path) -> list[Field]:
    """Where the metadata lie; kinds that have many entries are not much more frequent."""
    host = open_host(path, writable=False, lock=False)
    try:
        header, _ = load_header(host)
        cluster = header.cluster_size
        kinds: list[list[Field]] = [list(HEADER)]
        extensions = [Field("extension", at, 4) for at in range(header.header_length, 400, 4)]
        kinds.append(extensions)
        kinds.append(words("l1", header.l1_table_offset, header.l1_size))
        table = words("refcount table", header.refcount_table_offset, 4)
        kinds.append(table)
        block = int.from_bytes(host.read(header.refcount_table_offset, 8), "big") & ~0x1FF
        used = host.size() // cluster * header.refcount_bits // 8
        kinds.append([Field("refcounts", block + at, 2) for at in range(0, min(used, cluster), 2)])
        compressed = []
        for index in range(header.l1_size):
            place = header.l1_table_offset + index * 8
            l2 = int.from_bytes(host.read(place, 8), "big") & OFFSET_MASK
            if not l2:
                continue
            kinds.append(words("l2", l2, min(cluster // 8, 64)))
            data = host.read(l2, min(cluster, 512))
            for (entry,) in struct.iter_unpack(">Q", data):
                if entry & COMPRESSED:
                    offset, length = compressed_extent(entry, header.cluster_bits)
                    compressed.append(Field("compressed", offset, min(length, 16)))
        kinds.append(compressed)
        if header.nb_snapshots:
            kinds.append(
                [Field("snapshots", header.snapshots_offset + at, 4) for at in range(0, 160, 4)]
            )
            first = int.from_bytes(host.read(header.snapshots_offset, 8), "big")
            kinds.append(words("snapshot's l1", first, header.l1_size))
        if header.crypt_method:
            luks = next(e.data for e in header.extensions if e.type == 0x0537BE77)
            at = int.from_bytes(luks[:8], "big")
            kinds.append([Field("luks", at + place, 4) for place in range(0, 592, 4)])
        directory = directory_of(header)
        if directory:
            kinds.append(words("bitmap directory", directory.offset, directory.size // 8))
            for bitmap in load_bitmaps(host, header):
                kinds.append(words("bitmap table", bitmap.table_offset, bitmap.table_size))
    except CorruptImage:
        return list(HEADER)
    finally:
        host.close()
    even = []
    for kind in kinds:
        even += random.Random(len(kind)).sample(kind, min(len(kind), 40))
    return even


def bad_number(dice: random.Random, old: int, bits: int, cluster: int, size: int) -> int:
    """Something else than `old`, of a kind that breaks readers."""
    mask = (1 << bits) - 1
    ways = (
        lambda: 0,
        lambda: mask,
        lambda: 1 << bits - 1,
        lambda: (1 << bits - 1) - 1,
        lambda: old ^ 1 << dice.randrange(bits),
        lambda: old ^ 1 << dice.randrange(bits),
        lambda: old + cluster,
        lambda: old - cluster,
        lambda: old + dice.choice((1, -1, 8, 512, -512)),
        lambda: old ^ 1 << bits - 1,
        lambda: dice.randrange(max(1, size // cluster)) * cluster,
        lambda: dice.randrange(max(1, size // cluster)) * cluster | 1 << bits - 1,
        lambda: size + dice.randrange(4) * cluster,
        lambda: dice.getrandbits(bits),
        lambda: old * 2,
        lambda: dice.randrange(300),
    )
    return dice.choice(ways)() & mask


def damage(path: Path, dice: random.Random, fields: Sequence[Field], times: int) -> list[str]:
    """Change an image in place; returns what was done."""
    done = []
    size = path.stat().st_size
    with path.open("r+b") as file:
        cluster = 1 << min(21, max(9, struct.unpack(">I", file.read(24)[20:])[0]))
        for _ in range(times):
            if dice.random() < 0.1:
                at = dice.randrange(size)
                junk = dice.randbytes(dice.choice((1, 2, 8, 64)))
                file.seek(at)
                file.write(junk)
                done.append(f"{at:#x}: {junk.hex()}")
                continue
            if dice.random() < 0.03:
                size = max(600, size - dice.choice((1, 100, 512, cluster, 3 * cluster)))
                file.truncate(size)
                done.append(f"truncated to {size}")
                continue
            field = dice.choice(fields)
            if field.offset > 1 << 40:
                continue
            file.seek(field.offset)
            old = int.from_bytes(file.read(field.length).ljust(field.length, b"\0"), "big")
            new = bad_number(dice, old, field.length * 8, cluster, size)
            file.seek(field.offset)
            file.write(new.to_bytes(field.length, "big"))
            done.append(f"{field.name} at {field.offset:#x}: {old:#x} -> {new:#x}")
    return done


__all__ = [
    "KEY",
    "KIB",
    "RECIPES",
    "SECRET",
    "Field",
    "Recipe",
    "Seed",
    "Seeds",
    "damage",
    "image_options",
    "interesting",
    "make_seed",
    "run",
]
