"""Committing an image into the one behind it, as QEMU does it, and through crashes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from qcow2_bytes import ImageBytes
from qcow2_recipes import NAMED, Made, Recipe, assert_same
from qcow2_recorded import crash_states, record
from qcow2_walk import prose, tool

from xbd.core.driver import ConfigError, DriverError
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import commit as commits
from xbd.drivers.qcow2.commit import commit
from xbd.drivers.qcow2.host import open_host
from xbd.drivers.qcow2.snapshots import create_snapshot

pytestmark = pytest.mark.usefixtures("no_power_cuts")


def raw_of(path: Path, kind: str = "qcow2") -> bytes:
    copy = path.with_name("flat")
    tool("qemu-img", "convert", "-f", kind, "-O", "raw", path, copy)
    data = copy.read_bytes()
    copy.unlink()
    return data


def below(made: Made, recipe: Recipe) -> tuple[Path, str]:
    kind = "raw" if recipe.backing == "raw" else "qcow2"
    return made.path.with_name(f"base.{kind}"), kind


RECIPES = (
    Recipe(name="raw", backing="raw", written=True),
    Recipe(name="shorter-than-raw", backing="raw", backing_size=700 * KIB, written=True),
    Recipe(name="odd-raw", backing="raw", backing_size=1000, written=True),
    Recipe(name="qcow2", backing="qcow2", options="cluster_size=4k", written=True),
    Recipe(name="chain", backing="chain", options="cluster_size=16k", written=True),
    Recipe(name="subclusters", backing="chain", options="extended_l2=on", written=True),
    Recipe(name="v2", backing="qcow2", options="compat=0.10", written=True),
    Recipe(name="external", backing="raw", options="data_file=DIR/image.data", written=True),
    Recipe(name="empty", backing="qcow2"),
    Recipe(name="1-bit", backing="raw", options="refcount_bits=1", written=True),
)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_it_does_what_qemu_does(tmp_path: Path, recipe: Recipe) -> None:
    made = recipe.make(tmp_path)
    base, kind = below(made, recipe)
    steps: list[tuple[int, int]] = []
    commit(made.path, progress=lambda done, total: steps.append((done, total)))
    assert steps[0] == (0, made.size)
    assert steps[-1] == (made.size, made.size)
    content = raw_of(base, kind)
    assert_same(content[: made.size], made.content)
    if kind == "qcow2":
        tool("qemu-img", "check", "-q", base)
    made.agree()
    assert not any(ImageBytes(made.path.read_bytes()).l1)
    assert not ImageBytes(made.path.read_bytes()).incompatible & 1
    # QEMU makes the same of the same images.
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    again = recipe.make(theirs)
    tool("qemu-img", "commit", "-q", again.path)
    assert_same(content, raw_of(*below(again, recipe)))
    # And both can be used further.
    made.qemu_io("write -q -P 9 64k 64k")
    made.content[64 * KIB : 128 * KIB] = b"\x09" * (64 * KIB)
    commit(made.path)
    made.agree()


def test_compressed_clusters_are_committed(tmp_path: Path) -> None:
    recipe = Recipe(name="zlib", backing="raw", compressed=True)
    made = recipe.make(tmp_path)
    commit(made.path)
    assert_same(raw_of(tmp_path / "base.raw", "raw"), made.content)
    made.agree()


def test_what_was_committed_is_given_back(tmp_path: Path) -> None:
    made = Recipe(name="large", backing="raw", size=8 * MIB, backing_size=8 * MIB).make(tmp_path)
    made.qemu_io("write -q -P 3 0 8M")
    commit(made.path)
    assert made.path.stat().st_blocks * 512 < MIB
    assert json.loads(tool("qemu-img", "map", "--output=json", made.path))[0]["depth"] == 1


def test_zeroes_stay_holes(tmp_path: Path) -> None:
    for backing in ("raw", "qcow2"):
        place = tmp_path / backing
        place.mkdir()
        recipe = Recipe(name="holes", backing=backing, size=4 * MIB, backing_size=4 * MIB)
        made = recipe.make(place)
        made.qemu_io("write -q -z -u 0 4M")
        base, _ = below(made, recipe)
        before = base.stat().st_blocks
        commit(made.path)
        assert base.stat().st_blocks < before // 2
        made.content[:] = bytes(4 * MIB)
        made.agree()


def test_large_writes_go_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "_AT_A_TIME", 256 * KIB)
    monkeypatch.setattr(commits, "_BATCH", 96 * KIB)
    monkeypatch.setattr(commits, "_LONGEST", 64 * KIB)
    recipe = Recipe(name="batches", backing="qcow2", options="cluster_size=32k", size=2 * MIB)
    made = recipe.make(tmp_path)
    data = prose(2 * MIB, 5)
    (tmp_path / "data").write_bytes(data)
    made.qemu_io(f"write -q -s {tmp_path / 'data'} 0 2M")
    commit(made.path)
    made.content[:] = data
    made.agree()
    assert_same(raw_of(tmp_path / "base.qcow2"), data)


# -- what can't be -----------------------------------------------------------------------------


def refused(path: Path, said: str) -> None:
    files = {each: each.read_bytes() for each in path.parent.iterdir()}
    with pytest.raises((ConfigError, DriverError), match=said) as caught:
        commit(path)
    assert "\n" not in str(caught.value)
    assert {each: each.read_bytes() for each in path.parent.iterdir()} == files


def test_there_must_be_something_behind(tmp_path: Path) -> None:
    refused(NAMED["default"].make(tmp_path).path, "nothing behind it")


def test_snapshots_would_change(tmp_path: Path) -> None:
    made = NAMED["over-shorter"].make(tmp_path)
    create_snapshot(made.path, "one")
    refused(made.path, "has snapshots")


def test_no_format_is_guessed(tmp_path: Path) -> None:
    made = NAMED["default"].make(tmp_path)
    (tmp_path / "base").write_bytes(bytes(MIB))
    tool("qemu-img", "rebase", "-u", "-b", "base", "-F", "vmdk", made.path)
    refused(made.path, "one of raw, qcow2")


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    made = NAMED["over-shorter"].make(tmp_path)
    (tmp_path / "base.raw").unlink()
    refused(made.path, "base.raw")


@pytest.mark.parametrize("name", ["over-shorter", "over-qcow2"])
def test_nobody_else_may_be_using_what_is_behind(tmp_path: Path, name: str) -> None:
    made = with_content(NAMED[name]).make(tmp_path)
    base, _ = below(made, NAMED[name])
    other = open_host(base, writable=False)
    try:
        refused(made.path, "locked by another")
    finally:
        other.close()
    commit(made.path)
    made.agree()


def with_content(recipe: Recipe) -> Recipe:
    return Recipe(name=recipe.name, backing=recipe.backing, written=True)


@pytest.mark.parametrize(("compat", "what"), [("0.10", "snapshots"), ("1.1", "bitmaps")])
def test_what_cannot_grow_does_not(tmp_path: Path, compat: str, what: str) -> None:
    base = tmp_path / "base"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", base, "64k")
    if what == "snapshots":
        tool("qemu-img", "snapshot", "-c", "one", base)
    else:
        tool("qemu-img", "bitmap", "--add", base, "b")
    path = tmp_path / "image"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path, "1M")
    with pytest.raises(DriverError, match=what):
        commit(path)
    tool("qemu-img", "check", "-q", path)


# -- crashes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backing", "options"),
    [
        ("raw", "cluster_size=512"),
        ("qcow2", "cluster_size=4k"),
        ("raw", "compat=0.10,cluster_size=4k"),
        ("chain", "extended_l2=on,cluster_size=16k"),
    ],
)
def test_the_disk_reads_the_same_after_a_crash_at_any_write(
    tmp_path: Path, backing: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        name="crash",
        backing=backing,
        options=options,
        size=192 * KIB,
        backing_size=100 * KIB,
        written=True,
    )
    made = recipe.make(tmp_path)
    base, _ = below(made, recipe)
    under = tmp_path / "base.raw"
    tape = record(monkeypatch)
    commit(made.path)
    monkeypatch.undo()
    assert set(tape.start) == {made.path.name, base.name}
    emptied = set()
    for files in crash_states(tape, random.Random(options)):
        lower = files[base.name]
        if backing != "raw":
            flat = under.read_bytes() if backing == "chain" else b""
            lower = bytes(ImageBytes(lower).disk(flat))
        upper = ImageBytes(files[made.path.name])
        assert_same(upper.disk(lower), made.content)
        emptied.add(not any(upper.l1))
        assert not upper.dirty
        upper.check()
    assert emptied == {False, True}


@pytest.mark.parametrize("what", ["writev", "flush", "zero"])
def test_what_can_not_be_written_stays_where_it_is(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Recipe(name="failing", backing="raw", written=True).make(tmp_path)
    made.qemu_io("write -q -P 1 0 64k", "write -q -z 64k 64k")
    made.content[: 128 * KIB] = b"\x01" * (64 * KIB) + bytes(64 * KIB)

    def fault(called: str) -> DriverError | None:
        return DriverError("refused") if called == what else None

    record(monkeypatch, {"base.raw": fault})
    with pytest.raises(DriverError):
        commit(made.path)
    monkeypatch.undo()
    made.agree()
    commit(made.path)
    made.agree()
