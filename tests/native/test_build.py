"""xbd as it is installed: with a C compiler, without one, and without wanting one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from xbd.core.datapath.config import DataPath
from xbd.core.datapath.native.threads import describe_threads

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECONDS = 100


@attrs.frozen
class Installed:
    """A wheel, and where it was unpacked to."""

    wheel: Path
    place: Path

    def environment(self) -> dict[str, str]:
        """With what xbd needs from the tests' own environment, but not its xbd."""
        kept = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
        return kept | {"PYTHONPATH": str(self.place)}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", *arguments],
            env=self.environment(),
            cwd=self.place,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def xbd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "xbd", *arguments)

    @contextmanager
    def serving(self, directory: Path):
        """A daemon on an embedded host; what it said until it served."""
        daemon = subprocess.Popen(
            [sys.executable, "-P", "-m", "xbd", "serve", "--embedded", str(directory)],
            env=self.environment(),
            cwd=self.place,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            said = ""
            while "serves vbd3" not in said:
                line = daemon.stderr.readline()
                assert line, said
                said += line
            yield said
        finally:
            daemon.terminate()
            daemon.communicate(timeout=SECONDS)
        assert daemon.returncode == 0


def build(directory: Path, **environment: str) -> Installed:
    """By pip, without a network, from a copy of the sources: nothing built is left among them."""
    source, wheels = directory / "source", directory / "wheels"
    source.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "xbd",
        source / "xbd",
        ignore=shutil.ignore_patterns("__pycache__", "*.so", "_core.c"),
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(wheels)]
    done = subprocess.run(
        [*command, str(source)],
        env=os.environ | environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = wheels.iterdir()
    place = directory / "place"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return Installed(wheel, place)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Installed:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler")
    return build(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory) -> Installed:
    return build(tmp_path_factory.mktemp("without-compiler"), CC="/bin/false")


@pytest.fixture(scope="module")
def without_c(tmp_path_factory) -> Installed:
    return build(tmp_path_factory.mktemp("without-c"), XBD_NATIVE="0")


def test_one_wheel_with_the_native_data_path_is_for_all_pythons(compiled):
    _, _, python, abi, platform = compiled.wheel.stem.split("-")
    assert (python, abi) == ("cp311", "abi3")
    assert platform.startswith("linux_")
    assert (compiled.place / "xbd/core/datapath/native/_core.abi3.so").exists()
    done = compiled.run(
        "-c",
        "from xbd.core.datapath import native\n"
        "from xbd.core.datapath.native.threads import NativeThreads\n"
        "threads = NativeThreads(1)\n"
        "print(native.__file__, native.why_not, threads.describe())\n"
        "threads.close()\n",
    )
    assert done.returncode == 0, done.stderr
    file, why_not, described = done.stdout.split(maxsplit=2)
    assert Path(file).is_relative_to(compiled.place)
    assert why_not == "None"
    assert described.startswith("native (")


@pytest.mark.parametrize("how", ["without_compiler", "without_c"])
def test_without_a_compiler_there_is_the_data_path_in_python(how, request, tmp_path):
    """Which says why it is that; and who insists on the other one is told so."""
    installed = request.getfixturevalue(how)
    assert not list(installed.place.rglob("*.so"))
    if how == "without_c":
        assert installed.wheel.stem.endswith("-py3-none-any")
    reason = "it was not built: when xbd was installed there was no C compiler, or XBD_NATIVE=0"
    with installed.serving(tmp_path / "auto") as said:
        assert f"python ({reason})" in said
        told = installed.xbd("status", "--embedded", str(tmp_path / "auto"))
    assert told.returncode == 0, told.stderr
    assert f"python ({reason})" in told.stdout
    config = tmp_path / "xbd.toml"
    config.write_text('[backend]\ndatapath = "native"\n')
    for options in (["--embedded", str(tmp_path / "native")], ["--check"]):
        refused = installed.xbd("serve", "--config", str(config), *options)
        assert refused.returncode == 2
        assert refused.stdout == ""
        [line] = refused.stderr.splitlines()
        assert line == (
            f'xbd: datapath = "native" is not possible: {reason}; install xbd again with a C '
            'compiler, or set datapath = "auto"'
        )


def test_who_wants_python_is_not_told_why():
    assert describe_threads(None, DataPath.PYTHON) == "python (as configured)"
