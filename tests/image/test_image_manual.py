"""What docs/image.md shows is what runs, word for word."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from image_world import Run

MANUAL = (Path(__file__).parents[2] / "docs" / "image.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", MANUAL, re.DOTALL | re.MULTILINE)


def test_every_example_runs(image: Run, place: Path) -> None:
    lines = [line for block in BLOCKS for line in block.splitlines()]
    assert len(lines) > 20
    for line in lines:
        words = shlex.split(line)
        if words[:2] == ["xbd", "image"]:  # without a process each, to save time
            image(*words[2:])
        else:
            subprocess.run(["sh", "-eu", "-c", line], cwd=place, check=True)
    assert not list(place.glob(".*"))


def test_every_command_has_an_example() -> None:
    from xbd.cli.image import image as group

    for name in group.commands:
        assert f"\nxbd image {name} " in "".join(f"\n{block}" for block in BLOCKS), name


def test_every_option_is_explained(image: Run) -> None:
    for driver in ("qcow2", "imagefile"):
        told = image("create", f"{driver}:x", "-o", "help")
        names = re.findall(r"^  ([a-z0-9-]+)=", told, re.MULTILINE)
        assert names
        for name in names:
            assert f"`{name}`" in MANUAL or f"`{name}=" in MANUAL, name
