"""Putting another image behind an image: the disk reads as before."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import attrs
import pytest
from qcow2_bytes import ImageBytes
from qcow2_recipes import Made, Recipe, assert_same, patchwork, scribble
from qcow2_recorded import crash_states, record
from qcow2_walk import tool

from xbd.core.driver import Backing, ConfigError, DriverError
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import opening
from xbd.drivers.qcow2 import rebase as rebases
from xbd.drivers.qcow2.header import Extension, Header, feature_names, pack_header, parse_header
from xbd.drivers.qcow2.header_update import replace_header
from xbd.drivers.qcow2.host import open_host
from xbd.drivers.qcow2.layout import ExtensionType
from xbd.drivers.qcow2.rebase import rebase
from xbd.drivers.qcow2.snapshots import create_snapshot

pytestmark = pytest.mark.usefixtures("no_power_cuts")

SIZE = 512 * KIB


def info(path: Path) -> dict[str, Any]:
    return dict(json.loads(tool("qemu-img", "info", "--output=json", path)))


def assert_behind(path: Path, name: str | None, kind: str | None) -> None:
    told = info(path)
    assert told.get("backing-filename") == name
    assert told.get("backing-filename-format") == kind


def overlay(path: Path, below: Path | None, kind: str, options: str = "", size: int = SIZE) -> Made:
    """An image with some clusters of its own, and the other one behind it."""
    behind = () if below is None else ("-b", below, "-F", kind)
    told = ("-o", options) if options else ()
    tool("qemu-img", "create", "-q", "-f", "qcow2", *told, *behind, path, str(size))
    return Made(path, content_of(path))


def content_of(path: Path) -> bytearray:
    copy = path.with_name("flat")
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, copy)
    data = bytearray(copy.read_bytes())
    copy.unlink()
    return data


def raw(path: Path, size: int, seed: int) -> Path:
    path.write_bytes(patchwork(random.Random(seed), size))
    return path


def as_qcow2(path: Path, source: Path) -> Path:
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, path)
    return path


# -- the disk reads as before ------------------------------------------------------------------


KINDS = (None, "raw", "qcow2")
PAIRS = [(old, new, "") for old in KINDS for new in KINDS] + [
    (old, new, options)
    for options in ("compat=0.10", "extended_l2=on", "cluster_size=4k")
    for old, new in ((None, "raw"), ("raw", None), ("raw", "qcow2"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "options"), PAIRS)
def test_whatever_was_behind_and_is_now(
    tmp_path: Path, old: str | None, new: str | None, options: str
) -> None:
    chance = random.Random(f"{old} {new} {options}")
    behind: Path | None = None
    if old is not None:
        behind = raw(tmp_path / "old", chance.choice((SIZE, 300 * KIB, MIB)), 1)
        if old == "qcow2":
            behind = as_qcow2(tmp_path / "old.qcow2", behind)
    made = overlay(tmp_path / "image", behind, old or "", options)
    scribble(made, chance, times=3)
    other: Backing | None = None
    if new is not None:
        other = Backing(file="new", format=new)
        path = raw(tmp_path / "new", chance.choice((SIZE, 200 * KIB, MIB)), 2)
        content = bytearray(path.read_bytes())
        content[64 * KIB : 160 * KIB] = made.content[64 * KIB : 160 * KIB]
        path.write_bytes(content)
        if new == "qcow2":
            as_qcow2(tmp_path / "new.qcow2", path).replace(path)
    steps: list[tuple[int, int]] = []
    rebase(made.path, other, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (SIZE, SIZE)
    assert_behind(made.path, other and other.file, new)
    made.agree()
    scribble(made, chance, times=3)
    made.agree()


def test_only_what_differs_is_copied(tmp_path: Path) -> None:
    base = raw(tmp_path / "base", SIZE, 1)
    middle = overlay(tmp_path / "middle", base, "raw")
    middle.qemu_io("write -q -P 7 64k 64k", "write -q -z 256k 64k")
    made = Made(tmp_path / "top", content_of(middle.path))
    overlay(made.path, middle.path, "qcow2")
    made.qemu_io("write -q -P 8 128k 64k")
    made.content[128 * KIB : 192 * KIB] = b"\x08" * (64 * KIB)
    rebase(made.path, Backing(file="base", format="raw"))
    made.agree()
    own = [
        (one["start"], one["start"] + one["length"])
        for one in json.loads(tool("qemu-img", "map", "--output=json", made.path))
        if one["depth"] == 0
    ]
    covered = sorted({at // (64 * KIB) for start, stop in own for at in range(start, stop, 512)})
    assert covered == [1, 2, 4]


def test_what_lies_in_the_same_place_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = as_qcow2(tmp_path / "base", raw(tmp_path / "content", SIZE, 1))
    middle = overlay(tmp_path / "middle", base, "qcow2")
    made = overlay(tmp_path / "top", middle.path, "qcow2")

    def read(*_: object) -> memoryview:
        raise AssertionError("it is the same file")

    monkeypatch.setattr(rebases, "_read", read)
    rebase(made.path, Backing(file="base", format="qcow2"))
    assert_behind(made.path, "base", "qcow2")
    made.agree()


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_zeroes_hide_what_is_new(tmp_path: Path, compat: str) -> None:
    made = overlay(tmp_path / "image", None, "", f"compat={compat}")
    raw(tmp_path / "new", SIZE, 2)
    before = made.path.stat().st_blocks
    rebase(made.path, Backing(file="new", format="raw"))
    assert not any(made.content)
    made.agree()
    if compat == "1.1":
        assert made.path.stat().st_blocks <= before + 256


def test_a_large_disk_of_nothing_takes_no_time(tmp_path: Path) -> None:
    for name in ("old", "new"):
        tool("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / name, "4T")
    path = tmp_path / "image"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "old", "-F", "qcow2", path)
    rebase(path, Backing(file="new", format="qcow2"))
    assert_behind(path, "new", "qcow2")


def test_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebases, "_AT_A_TIME", 256 * KIB)
    monkeypatch.setattr(rebases, "_CHUNK", 64 * KIB)
    monkeypatch.setattr(rebases, "_BATCH", 48 * KIB)
    behind = raw(tmp_path / "old", SIZE, 1)
    made = overlay(tmp_path / "image", behind, "raw", "cluster_size=4k", SIZE - 512)
    scribble(made, random.Random(1))
    rebase(made.path, None)
    assert_behind(made.path, None, None)
    behind.unlink()
    made.agree()


# -- only the name -----------------------------------------------------------------------------


def test_unsafe_changes_nothing_but_the_name(tmp_path: Path) -> None:
    made = overlay(tmp_path / "image", raw(tmp_path / "old", SIZE, 1), "raw")
    made.qemu_io("write -q -P 7 64k 64k")
    (tmp_path / "old").rename(tmp_path / "new")
    before = made.path.read_bytes()
    rebase(made.path, Backing(file="new", format="raw"), unsafe=True)
    assert_behind(made.path, "new", "raw")
    assert made.path.read_bytes()[64 * KIB :] == before[64 * KIB :]
    made.content[64 * KIB : 128 * KIB] = b"\x07" * (64 * KIB)
    made.agree()
    rebase(made.path, None, unsafe=True)
    assert_behind(made.path, None, None)


def test_unsafe_needs_neither_image(tmp_path: Path) -> None:
    made = overlay(tmp_path / "image", raw(tmp_path / "old", SIZE, 1), "raw")
    (tmp_path / "old").unlink()
    rebase(made.path, Backing(file="later", format="raw"), unsafe=True)
    (tmp_path / "later").write_bytes(made.content)
    made.agree()


# -- what can't be -----------------------------------------------------------------------------


def refused(path: Path, backing: Backing | None, said: str, *, unsafe: bool = False) -> None:
    before = path.read_bytes()
    with pytest.raises((ConfigError, DriverError), match=said) as caught:
        rebase(path, backing, unsafe=unsafe)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_names_must_fit(tmp_path: Path) -> None:
    small = overlay(tmp_path / "small", None, "", "cluster_size=512")
    for name in ("", "x" * 1024, "a\0b"):
        for unsafe in (False, True):
            refused(small.path, Backing(file=name, format="raw"), "name", unsafe=unsafe)
    long = Backing(file="x" * 500, format="raw")
    refused(small.path, long, "does not fit into a cluster", unsafe=True)
    refused(small.path, Backing(file="x", format="y" * 16), "no format", unsafe=True)


def test_both_must_be_there(tmp_path: Path) -> None:
    made = overlay(tmp_path / "image", raw(tmp_path / "old", SIZE, 1), "raw")
    refused(made.path, Backing(file="new", format="raw"), "new")
    refused(made.path, Backing(file="new", format="vmdk"), "vmdk")
    refused(made.path, Backing(file="image", format="qcow2"), "locked by another|circle")
    (tmp_path / "new").write_bytes(made.content)
    (tmp_path / "old").unlink()
    refused(made.path, Backing(file="new", format="raw"), "old")


def test_snapshots_would_change(tmp_path: Path) -> None:
    made = overlay(tmp_path / "image", raw(tmp_path / "old", SIZE, 1), "raw")
    create_snapshot(made.path, "one")
    refused(made.path, None, "has snapshots")
    rebase(made.path, Backing(file="old", format="raw"), unsafe=True)
    made.agree()


def test_a_raw_data_file_has_all(tmp_path: Path) -> None:
    recipe = Recipe(name="raw", options="data_file=DIR/data,data_file_raw=on")
    made = recipe.make(tmp_path)
    raw(tmp_path / "new", SIZE, 1)
    refused(made.path, Backing(file="new", format="raw"), "raw data file", unsafe=True)


# -- crashes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["cluster_size=4k", "compat=0.10,cluster_size=512"])
def test_the_disk_reads_the_same_after_a_crash_at_any_write(
    tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 128 * KIB
    old, new = raw(tmp_path / "old", size, 1), raw(tmp_path / "new", size, 2)
    made = overlay(tmp_path / "image", old, "raw", options, size)
    scribble(made, random.Random(1), times=3)
    tape = record(monkeypatch)
    rebase(made.path, Backing(file="new", format="raw"))
    monkeypatch.undo()
    below = {str(old): old.read_bytes(), "new": new.read_bytes()}
    seen = set()
    for files in crash_states(tape, random.Random(1)):
        image = ImageBytes(files["image"])
        assert_same(image.disk(below[image.backing]), made.content)
        image.check()
        seen.add(image.backing)
    assert seen == set(below)


def header(cluster_bits: int, **fields: Any) -> Header:
    """As of an image with everything that a header has."""
    made = Header(
        cluster_bits=cluster_bits,
        refcount_table_offset=1 << cluster_bits,
        refcount_table_clusters=1,
        **fields,
    )
    return attrs.evolve(made, extensions=(feature_names(),)) if cluster_bits > 9 else made


LONG = "/srv/" + "long/" * 150 + "name"

NAMES: tuple[tuple[str | None, str | None], ...] = (
    (None, "new.qcow2"),
    ("old", None),
    ("old", "n"),
    (LONG, "short"),
    ("short", LONG),
    (LONG, LONG.upper()),
)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    ("bits", "old", "new"),
    [
        # In smaller clusters there is no room for a long name and another one.
        (bits, old, new)
        for bits in (9, 11, 12, 16)
        for old, new in NAMES
        if bits > 11 or LONG not in (old, new)
    ],
)
def test_a_header_is_never_torn(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    version: int,
    old: str | None,
    new: str | None,
) -> None:
    before = named(header(bits, version=version), old)
    after = named(before, new)
    path = tmp_path / "image"
    path.write_bytes(pack_header(before).ljust(1 << bits, b"\0"))
    tape = record(monkeypatch)
    host = opening.open_host(path, writable=True)
    replace_header(host, after)
    host.close()
    assert path.read_bytes() == pack_header(after).ljust(1 << bits, b"\0")
    wanted = [meaning(before), meaning(after)]
    seen = set()
    for files in crash_states(tape, random.Random(f"{old} {new} {bits}"), each=20):
        found = meaning(parse_header(files["image"]))
        assert found in wanted
        seen.add(wanted.index(found))
    assert seen == {0, 1}


def named(header: Header, name: str | None) -> Header:
    kind = None if name is None else (b"raw" if len(name) % 2 else b"qcow2")
    extended = header.with_extension(ExtensionType.BACKING_FORMAT, kind)
    return attrs.evolve(extended, backing_file=name)


def meaning(header: Header) -> Header:
    """Without what nobody needs."""
    if header.version == 2:
        header = attrs.evolve(header, header_length=0)
    return header.with_extension(ExtensionType.FEATURE_NAMES, None)


def test_extensions_that_are_not_known_stay(tmp_path: Path) -> None:
    path = tmp_path / "image"
    odd = Extension(0x12345678, b"something that is not known" * 30)
    before = attrs.evolve(header(16), extensions=(odd, feature_names()))
    path.write_bytes(pack_header(before).ljust(1 << 17, b"\0"))
    host = open_host(path, writable=True)
    replace_header(host, named(before, LONG))
    host.close()
    found = parse_header(path.read_bytes()[: 1 << 16])
    assert odd in found.extensions
    assert found == named(before, LONG)
    assert found.backing_file == LONG
