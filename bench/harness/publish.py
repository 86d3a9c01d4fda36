"""Puts the newest results where the documentation shows them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import attrs


@attrs.frozen
class Kind:
    """A program's results, and the page that shows them."""

    prefix: str
    """Their files' names begin so; what follows is a time."""
    page: str


QEMU = Kind("", "results.md")
XEN = Kind("xen-", "xen.md")


def publish(results: Path, target: Path, sources: Path, kind: Kind = QEMU) -> list[Path]:
    """Copy the newest tables and plots of `results` to `target`; what was written there.

    Raises ValueError if there are none, or if they tell of files in `sources`, this checkout.
    """
    name = re.compile(rf"{kind.prefix}\d{{8}}-\d{{6}}\.json")
    stems = sorted(path.stem for path in results.glob("*.json") if name.fullmatch(path.name))
    if not stems:
        raise ValueError(f"there are no results in {results}: run the measurements first")
    stem = stems[-1]
    text = (results / f"{stem}.md").read_text()
    if json.loads((results / f"{stem}.json").read_text())["failures"]:
        raise ValueError(f"{stem} has failures: results with failures are not shown")
    if str(sources) in text:
        raise ValueError(f"{stem} names files of this machine")
    target.mkdir(parents=True, exist_ok=True)
    page = target / kind.page
    if kind is QEMU:  # the others have no plots
        for old in target.glob("*.svg"):
            old.unlink()
    pictures = sorted((results / stem).glob("*.svg"))
    copied = [Path(shutil.copy(picture, target)) for picture in pictures]
    shown = "".join(f"\n![{picture.stem}]({picture.name})\n" for picture in pictures)
    page.write_text(text + (f"\n## Plots\n{shown}" if pictures else ""))
    return [page, *copied]
