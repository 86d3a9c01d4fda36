"""Maps of images, as qemu-img draws them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from qcow2_damage import victim
from qcow2_seeds import NAMES, Seed, Seeds, image, qemu_reads, run, seeds

from xbd.core.driver import MapEntry, OpenFailed
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.host import open_host
from xbd.drivers.qcow2.map import map_image

__all__ = ["image", "seeds"]

QEMU_KEYS = ("start", "length", "depth", "present", "zero", "data", "offset")


def as_qemu_has_it(entry: MapEntry) -> dict[str, Any]:
    told = {key: getattr(entry, key) for key in QEMU_KEYS}
    return {key: value for key, value in told.items() if value is not None}


def qemu_map(path: Path) -> list[dict[str, Any]]:
    entries = json.loads(run("qemu-img", "map", "--output=json", path).stdout)
    # Newer versions tell more.
    return [{key: entry[key] for key in QEMU_KEYS if key in entry} for entry in entries]


def create(path: Path, size: str, *writes: str, options: str = "", backing: str = "") -> Path:
    command: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        command += ["-o", options]
    if backing:
        command += ["-b", backing, "-F", "raw" if backing.endswith(".raw") else "qcow2"]
    run(*command, path, size)
    words = [word for write in writes for word in ("-c", write)]
    if words:
        run("qemu-io", "-t", "unsafe", *words, path)
    return path


HOST_HOLES = {"preallocated", "extended-zeroes"}
"""Where QEMU looks for holes in the image's own file."""


@pytest.mark.parametrize("name", [n for n in NAMES if n not in HOST_HOLES | {"luks"}])
def test_every_kind_of_image_is_mapped_as_by_qemu(image: Seed) -> None:
    found = [as_qemu_has_it(entry) for entry in map_image(image.path)]
    assert found == qemu_map(image.path)


@pytest.mark.parametrize("name", sorted(HOST_HOLES))
def test_preallocated_clusters_are_data_whether_the_host_has_holes_or_not(image: Seed) -> None:
    """QEMU says of those that read as zeroes because they are holes that they are zero, too."""
    found = [entry for entry in map_image(image.path) if entry.data]
    told = [entry for entry in qemu_map(image.path) if entry["data"]]
    assert sum(entry.length for entry in found) == sum(entry["length"] for entry in told)


@pytest.mark.parametrize("name", NAMES)
def test_the_map_covers_the_disk_and_is_true(image: Seed, tmp_path: Path) -> None:
    """What it says is zero reads as zeroes; what lies in a file is there."""
    disk = qemu_reads(image, tmp_path / "disk")
    at = 0
    for entry in map_image(image.path):
        assert entry.start == at
        assert entry.length > 0
        at += entry.length
        there = disk[entry.start : at]
        if entry.zero:
            assert not any(there)
        elif entry.offset is not None:
            assert entry.file is not None
            with entry.file.open("rb") as file:
                file.seek(entry.offset)
                assert file.read(entry.length).ljust(entry.length, b"\0") == there
        assert entry.compressed <= entry.data
    assert at == len(disk)


def test_a_chain_of_images_that_grow(tmp_path: Path) -> None:
    raw = tmp_path / "base.raw"
    raw.write_bytes(b"")
    os.truncate(raw, MIB)
    with raw.open("r+b") as file:
        file.seek(128 * KIB)
        file.write(b"x" * 64 * KIB)
    create(
        tmp_path / "middle.qcow2",
        "3M",
        *("write 256k 128k", "write -z 512k 64k", "write -c 640k 64k"),
        backing="base.raw",
    )
    top = create(
        tmp_path / "top.qcow2",
        "5M",
        *("write 0 64k", "write -z 2M 64k", "write 4M 64k"),
        backing="middle.qcow2",
    )
    found = list(map_image(top))
    assert [as_qemu_has_it(entry) for entry in found] == qemu_map(top)
    files = {entry.depth: entry.file for entry in found}
    assert files == {0: top, 1: tmp_path / "middle.qcow2", 2: raw}
    assert sum(entry.length for entry in found if entry.compressed) == 64 * KIB


def test_an_overlay_that_is_smaller_than_what_lies_behind(tmp_path: Path) -> None:
    create(tmp_path / "large.qcow2", "4M", "write 0 3M")
    top = create(tmp_path / "small.qcow2", "1M", "write 64k 64k", backing="large.qcow2")
    assert [as_qemu_has_it(entry) for entry in map_image(top)] == qemu_map(top)


def test_an_encrypted_image_needs_no_key(seeds: Seeds) -> None:
    found = list(map_image(seeds["luks"].path))
    assert {entry.offset for entry in found} == {None}
    assert sum(entry.length for entry in found if entry.data) == 128 * KIB


def test_an_empty_disk(tmp_path: Path) -> None:
    assert list(map_image(create(tmp_path / "none.qcow2", "0"))) == []
    (entry,) = map_image(create(tmp_path / "empty.qcow2", "1000M"))
    assert (entry.length, entry.present, entry.zero, entry.data) == (1000 * MIB, False, True, False)


def test_what_lies_behind_is_confined(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.raw").write_bytes(b"secret" * 1000)
    top = create(tmp_path / "inside" / "top.qcow2", "1M", backing="../secret.raw")
    assert list(map_image(top))
    with pytest.raises(OpenFailed):
        list(map_image(top, image_dirs=[tmp_path / "inside"]))


def test_a_locked_image_is_mapped_only_if_it_is_shared(seeds: Seeds, tmp_path: Path) -> None:
    seed = seeds.copy("plain", tmp_path / "image")
    host = open_host(seed.path, writable=True)
    with pytest.raises(OpenFailed, match="locked"):
        list(map_image(seed.path))
    assert list(map_image(seed.path, share=True))
    host.close()


def test_nothing_stays_open_when_nobody_wants_the_rest(seeds: Seeds) -> None:
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = descriptors()
    entries = map_image(seeds["overlay"].path)
    next(entries)
    assert descriptors() > before
    entries.close()  # type: ignore[attr-defined]
    assert descriptors() == before


@pytest.mark.parametrize("name", ["plain"])
def test_a_table_that_makes_no_sense(image: Seed) -> None:
    target = victim(image.path)
    _, entry, place = target.data()
    target.set_word(place, entry + 512)
    with pytest.raises(CorruptImage, match="inside another"):
        list(map_image(image.path))


def test_zeroes_that_a_raw_image_stores_are_data(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    top = create(tmp_path / "top.qcow2", "1M", backing="base.raw")
    (entry,) = map_image(top)
    assert (entry.depth, entry.data, entry.zero, entry.offset) == (1, True, False, 0)
