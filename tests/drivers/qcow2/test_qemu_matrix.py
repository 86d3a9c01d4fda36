"""Images of every kind, by turns in QEMU's hands and in ours."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from qcow2_history import SECTOR, History
from qcow2_player import Player
from qcow2_recipes import THOROUGH, Made, Recipe, assert_same, patchwork, scribble, some
from qcow2_walk import tool

from xbd.core.driver.image import Backing
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2.create import create
from xbd.drivers.qcow2.create_options import CreateOptions
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.opening import open_image
from xbd.drivers.qcow2.sizing import set_size
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_power_cuts")]

ODD = 7 * SECTOR
"""What disks are shorter than whole clusters."""


@contextmanager
def opened(made: Made, *, direct: bool = False) -> Iterator[Image]:
    image = open_image(made.path, made.wishes(direct=direct))
    try:
        yield image
    finally:
        image.close()


def read_all(image: Image) -> memoryview:
    buffer = image.buffer(image.size)
    image.readv(0, [buffer])
    return buffer


def our_turn(made: Made, seed: int, kinds: str, *, direct: bool = False, steps: int = 30) -> Made:
    """Compare the disk with what it must be, and change it; the image after it."""
    with opened(made, direct=direct) as image:
        assert_same(read_all(image), made.content)
        history = History(made.content)
        player = Player(image, history, random.Random(seed), lambda: 0, number=seed)
        for _ in range(steps):
            player.step(kinds)
        assert not player.failures
        content = bytearray(history.content(image.size // SECTOR))
        assert_same(read_all(image), content)
    return attrs.evolve(made, content=content)


def in_turns(made: Made, kinds: str) -> None:
    for turn in range(2):
        made = our_turn(made, turn + 1, kinds, direct=turn == 1, steps=20)
        made.agree()
        scribble(made, random.Random(turn), times=5)
    with opened(made) as image:
        assert_same(read_all(image), made.content)
    made.agree()


FAST = (
    "v2 512 2-bit-512 subclusters lazy full over-longer over-two subclusters-over-two zlib-4k zstd "
    "zlib-subclusters snapshots-over snapshots-v2 external-raw luks-4k-over"
)


@pytest.mark.parametrize("recipe", some(FAST), ids=str)
def test_images_of_qemu(tmp_path: Path, recipe: Recipe) -> None:
    recipe = attrs.evolve(recipe, size=recipe.size - ODD)
    sizes = "" if recipe.snapshot or recipe.encrypted else "S"
    made = recipe.make(tmp_path)
    in_turns(made, "WWWWZUDFR" + sizes)
    if "data_file_raw" in recipe.options:
        disk, data = made.qemu_reads(), (tmp_path / "image.data").read_bytes()
        assert_same(data[: len(disk)], disk)
        assert not any(data[len(disk) :])  # QEMU makes the file end where a cluster does


SIZES_AND_WIDTHS = [(bits, 16) for bits in range(9, 22)] + [
    (12, width) for width in (1, 2, 4, 8, 32, 64)
]


@pytest.mark.parametrize(("bits", "width"), SIZES_AND_WIDTHS)
def test_every_size_of_clusters_and_width_of_refcounts(
    tmp_path: Path, bits: int, width: int
) -> None:
    options = f"cluster_size={1 << bits},refcount_bits={width}"
    size = min(max(2 << bits, 128 * KIB), 2 * MIB) - ODD
    made = Recipe(name=options, options=options, size=size, snapshot=width > 1).make(tmp_path)
    made = our_turn(made, bits, "WWWZUDFR", direct=bits >= 12, steps=12)
    made.agree()
    scribble(made, random.Random(width), times=3)
    our_turn(made, width, "WWZUDFR", steps=6).agree()


OURS: dict[str, dict[str, Any]] = {
    "default": {},
    "v2": {"compat": "0.10", "cluster_size": 4 * KIB},
    "512": {"cluster_size": 512, "refcount_bits": 64},
    "subclusters": {"extended_l2": True, "cluster_size": 16 * KIB},
    "metadata": {"preallocation": "metadata", "cluster_size": 4 * KIB},
    "full": {"preallocation": "full"},
    "external": {"data_file": "image.data"},
    "2M": {"cluster_size": 2 * MIB, "refcount_bits": 1},
    "external-raw": {"data_file": "image.data", "data_file_raw": True},
}


ALL = [(name, size) for name in OURS for size in (0, 100 * KIB, MIB)]


@pytest.mark.parametrize(("name", "backing"), ALL if THOROUGH else ALL[::3] + ALL[1:12:3])
def test_our_images(tmp_path: Path, name: str, backing: int) -> None:
    told = dict(OURS[name])
    if "data_file" in told:  # QEMU finds relative names from where it runs
        told["data_file"] = str(tmp_path / told["data_file"])
    options = CreateOptions(**told)
    content = bytearray(600 * KIB - ODD)
    behind = None
    if backing:
        if options.data_file is not None or options.preallocation != "off":
            return
        below = patchwork(random.Random(name), backing)
        (tmp_path / "base.raw").write_bytes(below)
        behind = Backing(file="base.raw", format="raw")
        content[: len(below)] = below[: len(content)]
    create(tmp_path / "image.qcow2", len(content), options, backing=behind)
    in_turns(Made(tmp_path / "image.qcow2", content), "WWWWZUDFRS")


@pytest.mark.parametrize("size", [512, 3 * 512, 65536, 65536 + 512, 5 * MIB + 3 * 512])
def test_odd_sizes(tmp_path: Path, size: int) -> None:
    """The last cluster is cut short, at both ends of resizing."""
    path = tmp_path / "image.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
    made = Made(path, bytearray(size))
    made = our_turn(made, 1, "WWZUDFS" if size > 8 * SECTOR else "WZUDF")
    made.agree()
    tool("qemu-img", "resize", "-q", "-f", "qcow2", path, str(made.size + 70000 // 512 * 512))
    content = made.content + bytearray(70000 // 512 * 512)
    made = our_turn(attrs.evolve(made, content=content), 2, "WWZUDF")
    made.agree()


@pytest.mark.parametrize("options", ["cluster_size=64k", "extended_l2=on", "compat=0.10"])
def test_growing_what_qemu_has_cut(tmp_path: Path, options: str) -> None:
    """QEMU leaves what was there in the last cluster."""
    path = tmp_path / "image.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "1M")
    made = Made(path, bytearray(b"\x07" * MIB))
    made.qemu_io("write -q -P 7 0 1M")
    cut = 100 * KIB + 512
    tool("qemu-img", "resize", "-q", "--shrink", path, str(cut))
    with opened(made) as image:
        set_size(image, Zeroer(image, Writer(image)), 300 * KIB)
        assert_same(read_all(image), b"\x07" * cut + bytes(300 * KIB - cut))
    attrs.evolve(made, content=bytearray(b"\x07" * cut + bytes(300 * KIB - cut))).agree()
