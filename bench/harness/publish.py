"""Puts the newest results where the documentation shows them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

_STEM = re.compile(r"\d{8}-\d{6}\.json")
PAGE = "results.md"


def publish(results: Path, target: Path, sources: Path) -> list[Path]:
    """Copy the newest tables and plots of `results` to `target`; what was written there.

    Raises ValueError if there are none, or if they tell of files in `sources`, this checkout.
    """
    stems = sorted(path.stem for path in results.glob("*.json") if _STEM.fullmatch(path.name))
    if not stems:
        raise ValueError(f"there are no results in {results}: run the measurements first")
    stem = stems[-1]
    text = (results / f"{stem}.md").read_text()
    if json.loads((results / f"{stem}.json").read_text())["failures"]:
        raise ValueError(f"{stem} has failures: results with failures are not shown")
    if str(sources) in text:
        raise ValueError(f"{stem} names files of this machine")
    target.mkdir(parents=True, exist_ok=True)
    for old in (*target.glob("*.svg"), target / PAGE):
        old.unlink(missing_ok=True)
    written = [target / PAGE]
    pictures = sorted((results / stem).glob("*.svg"))
    for picture in pictures:
        written.append(Path(shutil.copy(picture, target)))
    shown = "".join(f"\n![{picture.stem}]({picture.name})\n" for picture in pictures)
    written[0].write_text(text + (f"\n## Plots\n{shown}" if pictures else ""))
    return written
