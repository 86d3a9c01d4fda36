"""The picture of ``xbd image map``: a row of cells over the disk, for each what it is made of.

In colours, a cell's colour is what most of its stored bytes are, and its height how much of the
cell is stored.  Without colours, or where there are only ASCII's characters, it is a letter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xbd.cli.image.output import human
from xbd.core.driver.image import MapEntry

ROWS: Final = 16
_HEIGHTS: Final = "▁▂▃▄▅▆▇█"
_MARGIN: Final = 11
"""Columns for the offset that a row begins with."""


@attrs.frozen
class Kind:
    """What bytes of the disk can be."""

    name: str
    letter: str
    style: str
    meaning: str


DATA: Final = Kind("data", "D", "green", "stored in this image")
COMPRESSED: Final = Kind("compressed", "C", "magenta", "stored compressed")
BACKING: Final = Kind("backing", "B", "blue", "stored in an image behind it")
ZERO: Final = Kind("zero", "0", "yellow", "known to be zeroes")
NOTHING: Final = Kind("unallocated", ".", "bright_black", "stored nowhere, reads as zeroes")
KINDS: Final = (DATA, COMPRESSED, BACKING, ZERO, NOTHING)


def kind_of(entry: MapEntry) -> Kind:
    """What to show of an entry."""
    if not entry.present:
        return NOTHING
    if entry.zero:
        return ZERO
    if entry.depth:
        return BACKING
    return COMPRESSED if entry.compressed else DATA


@attrs.define
class Shares:
    """What cells, and the whole disk, are made of: bytes of each kind."""

    size: int
    cell: int
    cells: list[dict[Kind, int]] = attrs.field(init=False)
    totals: dict[Kind, int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.cells = [{} for _ in range(-(-self.size // self.cell))]
        self.totals = dict.fromkeys(KINDS, 0)

    def add(self, entry: MapEntry) -> None:
        """Count an entry of the map."""
        kind = kind_of(entry)
        self.totals[kind] += entry.length
        for number, length in _split(entry.start, entry.length, self.cell):
            share = self.cells[number]
            share[kind] = share.get(kind, 0) + length


def draw(console: Console, entries: Iterable[MapEntry], size: int) -> None:
    """Print the picture of a disk of `size` bytes, and its legend."""
    if not size:
        console.print("The disk has no bytes.")
        return
    colours = console.color_system is not None and "utf" in console.encoding
    width = max(8, console.width - _MARGIN - 1)
    shares = Shares(size, max(512, -(-size // (width * ROWS))))
    for entry in entries:
        shares.add(entry)
    for first in range(0, len(shares.cells), width):
        row = Text(f"{human(first * shares.cell):>{_MARGIN - 1}} ")
        for number, share in enumerate(shares.cells[first : first + width], first):
            length = min(shares.cell, size - number * shares.cell)
            row.append_text(cell_text(share, length, colours=colours))
        console.print(row, no_wrap=True, crop=False)
    console.print(_legend(shares, colours=colours))


def _split(start: int, length: int, cell: int) -> Iterator[tuple[int, int]]:
    end = start + length
    while start < end:
        stop = min(end, start - start % cell + cell)
        yield start // cell, stop - start
        start = stop


def cell_text(share: dict[Kind, int], length: int, *, colours: bool) -> Text:
    """One cell, of `length` bytes."""
    stored = {kind: share[kind] for kind in (DATA, COMPRESSED, BACKING) if kind in share}
    if not stored:
        kind = ZERO if share.get(ZERO, 0) > length // 2 else NOTHING
        return Text("·" if colours else kind.letter, style=kind.style)
    kind = max(stored, key=lambda one: stored[one])
    if not colours:
        return Text(kind.letter)
    height = -(-sum(stored.values()) * len(_HEIGHTS) // length)
    return Text(_HEIGHTS[max(1, height) - 1], style=kind.style)


def _legend(shares: Shares, *, colours: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    table.title = f"{human(shares.size)}, a cell is {human(shares.cell)}"
    table.title_justify = "left"
    for kind, length in shares.totals.items():
        if length:
            stored = kind not in (ZERO, NOTHING)
            mark = (_HEIGHTS[-1] if stored else "·") if colours else kind.letter
            table.add_row(
                Text(mark, style=kind.style),
                kind.name,
                Text(human(length), justify="right"),
                Text(f"{100 * length / shares.size:.1f}%", justify="right"),
                kind.meaning,
            )
    return table
