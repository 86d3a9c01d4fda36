"""What docs/driver-authors.md shows is what runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from sample_packages import CHUNKS

import xbd.core.driver
from xbd.core.driver import OptionError, parse_options
from xbd.core.driver.options import check_options_class

MANUAL = (Path(__file__).parents[2] / "docs" / "driver-authors.md").read_text()
SNIPPETS: dict[str, str] = dict(
    re.findall(r"<!-- ([^ ]+) -->\n```\w+\n(.*?)```\n", MANUAL, re.DOTALL)
)


def run(name: str) -> dict[str, Any]:
    """A snippet's names after it has run."""
    names: dict[str, Any] = {"__name__": name}
    exec(compile(SNIPPETS[name], f"driver-authors.md: {name}", "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize("name", ["xbd_driver_chunks.py", "pyproject.toml", "test_chunks.py"])
def test_the_worked_driver_is_the_sample_package(name: str) -> None:
    assert SNIPPETS[name] == (CHUNKS / name).read_text()


def test_the_options_example_and_its_error() -> None:
    options = run("options")["ServerOptions"]
    check_options_class(options)
    assert parse_options(options, {"path": "a/b", "read-ahead": "64K"}).read_ahead == 65536
    with pytest.raises(OptionError) as caught:
        parse_options(options, {"path": "a/b", "mode": "slow", "password": "", "colour": "red"})
    assert str(caught.value) == SNIPPETS["options-error"].strip()
    with pytest.raises(OptionError, match="needs journal=yes"):
        parse_options(options, {"path": "a/b", "mode": "fast", "journal": "no"})


async def test_the_memory_example() -> None:
    await run("full")["test_memory"]()


def test_the_crash_example() -> None:
    run("crash")


def test_every_python_snippet_is_tested() -> None:
    assert MANUAL.count("```python") == sum(
        name not in ("pyproject.toml", "options-error") for name in SNIPPETS
    )


def test_the_manual_names_everything_an_author_gets() -> None:
    rest = {"Converter", "DeviceAccess", "DiskSpec", "OptionInfo", "ENTRY_POINT_GROUP"} | {
        "BlockingRunner",
        "OptionError",
        "ProbeScore",
        "open_disk",
        "open_with",
        "parse_options",
    }
    for name in set(xbd.core.driver.__all__) - rest:
        assert name in MANUAL, f"{name} is exported, but not explained"
