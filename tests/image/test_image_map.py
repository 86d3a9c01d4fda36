"""``xbd image map``, and its picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_world import Run
from rich.console import Console

from xbd.cli.image.picture import (
    BACKING,
    COMPRESSED,
    DATA,
    NOTHING,
    ZERO,
    Shares,
    cell_text,
    draw,
    kind_of,
)
from xbd.core.driver import MapEntry
from xbd.core.units import KIB, MIB


def test_a_flat_image_as_qemu_maps_it(image: Run, qemu: Run, place: Path) -> None:
    with (place / "a").open("wb") as file:
        file.truncate(5 * MIB)
        for at in (MIB, 4 * MIB):
            file.seek(at)
            file.write(b"x" * 65536)
    theirs = json.loads(qemu("qemu-img", "map", "-f", "raw", "--output=json", "a"))
    ours = json.loads(image("map", "--json", "imagefile:a"))
    for entry in ours:
        assert entry.pop("filename") == str(place / "a")
        entry.pop("compressed")
    assert ours == theirs
    lines = image("map", "imagefile:a").splitlines()
    assert [line.split() for line in lines] == [
        ["Offset", "Length", "Mapped", "to", "File"],
        ["0x100000", "0x10000", "0x100000", str(place / "a")],
        ["0x400000", "0x10000", "0x400000", str(place / "a")],
    ]


def test_a_chain_as_qemu_maps_it(image: Run, qemu: Run, place: Path) -> None:
    image("create", "imagefile:base", "3M")
    qemu("qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "base")
    image("create", "qcow2:top", "4M", "-b", "imagefile:base")
    qemu("qemu-io", "-c", "write -P 2 512k 64k", "-c", "write -z 2M 64k", "top")
    qemu("qemu-io", "-c", "write -P 3 1M 64k", "-c", "write -c -P 4 3M 64k", "top")
    theirs = json.loads(qemu("qemu-img", "map", "--output=json", "top"))
    ours = json.loads(image("map", "--json", "qcow2:top"))
    assert {one.pop("filename") for one in ours if "filename" in one} == (
        {str(place / "top"), str(place / "base")}
    )
    compressed = [one["start"] for one in ours if one.pop("compressed")]
    assert compressed == [3 * MIB]
    assert ours == theirs
    text = image("map", "qcow2:top")
    assert [line.split()[0] for line in text.splitlines()] == (
        ["Offset", "0x0", "0x80000", "0x90000", "0x100000", "0x300000"]
    )
    assert text.splitlines()[-1].split() == (
        ["0x300000", "0x10000", "compressed", str(place / "top")]
    )
    picture = image("map", "--picture", "qcow2:top")
    for word in ("backing", "data", "compressed", "zero", "unallocated"):
        assert word in picture


def test_an_empty_disk_has_an_empty_map(image: Run, place: Path) -> None:
    (place / "a").write_bytes(b"")
    assert json.loads(image("map", "--json", "imagefile:a")) == []
    assert image("map", "imagefile:a").count("\n") == 1
    assert "no bytes" in image("map", "--picture", "imagefile:a")


def test_the_picture_is_as_wide_as_the_terminal(image: Run, place: Path) -> None:
    with (place / "a").open("wb") as file:
        file.truncate(64 * MIB)
        file.write(b"x" * (32 * MIB))
    lines = image("map", "--picture", "imagefile:a").splitlines()
    rows = [line for line in lines if set(line[11:]) <= set("D0") and line[11:]]
    assert len(rows) == 16
    assert {len(row) for row in rows[:-1]} == {79}
    cells = "".join(row[11:] for row in rows)
    assert abs(cells.count("D") - cells.count("0")) <= 1
    assert rows[0].startswith("       0 B DDD")
    assert any(line.split()[:4] == ["D", "data", "32", "MiB"] for line in lines)
    assert "either --picture or --json" in image(
        "map", "--picture", "--json", "imagefile:a", code=2
    )


def entry(start: int, length: int, **changes: Any) -> MapEntry:
    fields = {"depth": 0, "present": True, "zero": False, "data": True} | changes
    return MapEntry(start=start, length=length, **fields)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, DATA),
        ({"compressed": True}, COMPRESSED),
        ({"depth": 2}, BACKING),
        ({"depth": 1, "compressed": True}, BACKING),
        ({"zero": True, "data": False}, ZERO),
        ({"zero": True, "data": False, "present": False}, NOTHING),
    ],
)
def test_kinds(changes: dict[str, Any], kind: object) -> None:
    assert kind_of(entry(0, 512, **changes)) is kind


def picture(entries: list[MapEntry], *, colours: bool, width: int = 60) -> str:
    text = io.StringIO()
    console = Console(
        file=text,
        width=width,
        force_terminal=colours,
        color_system="truecolor" if colours else None,
        legacy_windows=False,
    )
    draw(console, entries, sum(one.length for one in entries))
    return text.getvalue()


def test_heights_tell_how_much_is_stored() -> None:
    cell = 16 * KIB
    parts = [
        entry(0, cell),
        entry(cell, cell // 2),
        entry(cell + cell // 2, cell // 2, present=False, zero=True, data=False),
        entry(2 * cell, 1),
        entry(2 * cell + 1, cell - 1, zero=True, data=False),
        entry(3 * cell, cell, zero=True, data=False),
        entry(4 * cell, 2 * cell // 3, depth=1),
        entry(4 * cell + 2 * cell // 3, cell - 2 * cell // 3, compressed=True),
        entry(5 * cell, cell, present=False, zero=True, data=False),
    ]
    shares = Shares(6 * cell, cell)
    for part in parts:
        shares.add(part)
    told = [cell_text(share, cell, colours=True) for share in shares.cells]
    assert [text.plain for text in told] == list("█▄▁·█·")
    assert [str(text.style) for text in told] == (
        ["green", "green", "green", "yellow", "blue", "bright_black"]
    )
    plain = [cell_text(share, cell, colours=False).plain for share in shares.cells]
    assert plain == ["D", "D", "D", "0", "B", "."]


def test_colours_and_blocks_where_the_terminal_has_them() -> None:
    text = picture([entry(0, MIB), entry(MIB, MIB, zero=True, data=False)], colours=True)
    assert "\x1b[32m█" in text
    assert "\x1b[33m·" in text
    assert "50.0%" in text
    assert "D" not in text.split("MiB, a cell")[0]


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([True, False])), min_size=1),
    st.integers(20, 200),
)
def test_no_byte_is_lost(parts: list[tuple[int, bool]], width: int) -> None:
    entries, at = [], 0
    for sectors, data in parts:
        entries.append(entry(at, sectors * 512, zero=not data, data=data))
        at += sectors * 512
    text = picture(entries, colours=False, width=width)
    assert max(map(len, text.splitlines())) <= width
    shares = Shares(at, 4096)
    for one in entries:
        shares.add(one)
    assert sum(sum(share.values()) for share in shares.cells) == at
    assert all(sum(share.values()) == 4096 for share in shares.cells[:-1])
