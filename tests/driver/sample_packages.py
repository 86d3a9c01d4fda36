"""Installing small driver packages for tests, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

PACKAGES = Path(__file__).parent.parent / "packages"
CHUNKS = PACKAGES / "xbd-driver-chunks"


def install(package: Path, target: Path) -> None:
    """What ``pip install --target`` leaves behind, from the package's own pyproject.toml.

    By hand, since building a wheel offline needs tools that are not everywhere.
    """
    project = tomllib.loads((package / "pyproject.toml").read_text())
    for module in project["tool"]["setuptools"]["py-modules"]:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / f"{module}.py", target)
    about = project["project"]
    register(target, about["name"], about["version"], about["entry-points"]["xbd.drivers"])


def register(target: Path, name: str, version: str, drivers: dict[str, str]) -> None:
    """Metadata of an installed distribution that offers these drivers."""
    info = target / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{driver} = {value}" for driver, value in drivers.items()]
    (info / "entry_points.txt").write_text("\n".join(["[xbd.drivers]", *lines, ""]))


def write_driver(target: Path, module: str, **changes: str) -> None:
    """A module with a DriverDescriptor that is right but for the changes."""
    fields = {
        "name": repr(module),
        "summary": "'a driver'",
        "api_version": "d.API_VERSION",
        "options": "Options",
        "concurrency": "d.Concurrency.SERIAL",
        "capabilities": "d.Capability.NONE",
        "open": "None",
    } | changes
    arguments = ", ".join(f"{key}={value}" for key, value in fields.items())
    (target / f"{module}.py").write_text(
        "import attrs\nimport xbd.core.driver as d\n\n"
        "@attrs.frozen\nclass Options:\n    path: str = d.option(d.text, help='x')\n\n"
        f"DRIVER = d.DriverDescriptor({arguments})\n"
    )


def run_xbd(*arguments: str, packages: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """The command ``xbd`` in a process of its own that sees `packages`."""
    code = "from xbd.cli import main; main(prog_name='xbd')"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ
        | {"PYTHONPATH": str(packages), "XDG_CACHE_HOME": str(cache), "COLUMNS": "200"},
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
