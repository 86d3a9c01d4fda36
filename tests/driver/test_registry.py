"""Third parties' drivers: found, checked, listed; what is wrong with one is its own affair."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import attrs
import pytest
from sample_packages import CHUNKS, install, register, run_xbd, write_driver

from xbd.core.driver import API_VERSION
from xbd.core.driver.registry import check_descriptor
from xbd.core.driver.testing import MEMORY, check_driver
from xbd.core.errors import DriverApiMismatch, DriverLoadError

Xbd = Callable[..., CompletedProcess[str]]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A directory with one good third-party driver and many bad ones."""
    target = tmp_path / "packages"
    install(CHUNKS, target)
    register(target, "broken", "0.1", {"broken": "broken_driver:DRIVER"})
    (target / "broken_driver.py").write_text("import no_such_library\n")
    register(target, "missing-object", "0.1", {"objectless": "empty_module:DRIVER"})
    (target / "empty_module.py").write_text("")
    for package in ("first-claim", "second-claim"):
        register(target, package, "1", {"wanted": f"{package.replace('-', '_')}:DRIVER"})
    register(target, "from-the-future", "9", {"future": "future:DRIVER"})
    write_driver(target, "future", api_version="(1, 99)")
    register(target, "plain", "1.0", {"plain": "plain:DRIVER"})
    write_driver(target, "plain")
    return target


@pytest.fixture
def xbd(packages: Path, tmp_path: Path) -> Xbd:
    """Runs the command so that it sees these packages."""
    cache = tmp_path / "cache"
    cache.mkdir()
    return lambda *arguments: run_xbd(*arguments, packages=packages, cache=cache)


def test_the_list_shows_what_works_and_why_the_rest_does_not(xbd: Xbd) -> None:
    result = xbd("drivers", "list", "--json")
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, Any]] = {info["name"]: info for info in json.loads(result.stdout)}
    assert found["chunks"] == {
        "name": "chunks",
        "summary": "a disk as a directory of chunks",
        "package": "xbd-driver-chunks",
        "version": "1.2.3",
        "target": "xbd_driver_chunks:DRIVER",
        "capabilities": ["write", "flush", "discard"],
        "error": None,
    }
    assert found["plain"]["error"] is None
    for name in ("raw", "imagefile"):
        assert found[name]["error"] is None
        assert found[name]["package"] == "xbd"
    for name, why in {
        "broken": "broken_driver:DRIVER: ModuleNotFoundError: No module named 'no_such_library'",
        "objectless": "AttributeError: module 'empty_module' has no attribute 'DRIVER'",
        "wanted": "offered by first-claim (first_claim:DRIVER) and second-claim",
        "future": "was written for driver interface 1.99, this xbd has 1.1",
    }.items():
        assert why in found[name]["error"]
        assert "\n" not in found[name]["error"]


def test_the_list_for_people(xbd: Xbd) -> None:
    result = xbd("drivers", "list")
    assert result.returncode == 0
    assert "a disk as a directory of chunks" in result.stdout
    assert "not usable, from broken 0.1: driver 'broken' can't be loaded" in result.stdout


def test_a_drivers_options_are_shown(xbd: Xbd) -> None:
    shown = json.loads(xbd("drivers", "show", "chunks", "--json").stdout)
    assert shown["api_version"] == [1, 1]
    assert shown["concurrency"] == "serial"
    assert [option["name"] for option in shown["options"]] == ["path", "size"]
    assert shown["options"][1] == {
        "name": "size",
        "type": "size",
        "required": True,
        "default": None,
        "secret": False,
        "help": "bytes that the guest sees",
    }
    text = xbd("drivers", "show", "chunks").stdout
    assert "required" in text
    assert "chunks:PATH?OPTION=VALUE" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken", "No module named 'no_such_library'"),
        ("wanted", "uninstall one"),
        ("future", "install matching versions"),
        ("nosuch", "(installed: broken, chunks, "),
    ],
)
def test_asking_for_a_bad_driver_ends_in_one_line(xbd: Xbd, name: str, why: str) -> None:
    result = xbd("drivers", "show", name)
    assert result.returncode == 2
    assert result.stderr.startswith("xbd: ")
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_broken_neighbour_is_not_even_imported(packages: Path, xbd: Xbd) -> None:
    (packages / "broken_driver.py").write_text("raise SystemExit('imported')\n")
    result = xbd("drivers", "show", "plain")
    assert result.returncode == 0, result.stderr


def test_a_driver_that_exits_while_it_is_imported_takes_nothing_down(
    packages: Path, xbd: Xbd
) -> None:
    (packages / "broken_driver.py").write_text("raise SystemExit('imported')\n")
    result = xbd("drivers", "list", "--json")
    assert result.returncode == 0, result.stderr
    errors = {info["name"]: info["error"] for info in json.loads(result.stdout)}
    assert "SystemExit: imported" in errors["broken"]
    assert errors["chunks"] is None


async def test_the_sample_package_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(CHUNKS)
    from xbd_driver_chunks import DRIVER

    await check_driver(DRIVER, f"chunks:{tmp_path}?size=3M", examples=10)


def can_build() -> bool:
    setuptools = tuple(int(part) for part in version("setuptools").split(".")[:2])
    return setuptools >= (70, 1) or importlib.util.find_spec("wheel") is not None


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason="needs setuptools 70.1 or wheel to build offline")
def test_pip_installs_what_the_other_tests_install_by_hand(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", tmp_path / "packages", CHUNKS], check=True
    )
    shown = run_xbd("drivers", "show", "chunks", packages=tmp_path / "packages", cache=tmp_path)
    assert shown.returncode == 0, shown.stderr


@attrs.define
class NotFrozen:
    path: str = ""


@pytest.mark.parametrize(
    ("found", "error", "why"),
    [
        (MemoryError, DriverLoadError, "is not a DriverDescriptor"),
        (attrs.evolve(MEMORY, name="store"), DriverLoadError, "calls itself 'store'"),
        (attrs.evolve(MEMORY, api_version=(2, 0)), DriverApiMismatch, r"interface 2\.0"),
        (attrs.evolve(MEMORY, api_version=(1, 99)), DriverApiMismatch, r"interface 1\.99"),
        (attrs.evolve(MEMORY, api_version="1.0"), DriverApiMismatch, "interface '1.0'"),
        (attrs.evolve(MEMORY, options=NotFrozen), DriverLoadError, "not frozen"),
    ],
)
def test_descriptors_that_do_not_fit(found: object, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        check_descriptor("memory", found)


def test_a_fitting_descriptor() -> None:
    assert check_descriptor("memory", MEMORY) is MEMORY
    assert MEMORY.api_version == API_VERSION
