"""What the machine does for the lab: makes what dom0 gets, and boots it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
CACHE = Path(os.environ.get("XBD_LAB_CACHE", Path.home() / ".cache/xbd-lab"))
PYTHONS = {"trixie": "3.13", "bookworm": "3.11"}
"""The suites, and the Python of each one's dom0."""
NATIVE = Path("xbd/core/datapath/native/_core.abi3.so")


def command(*words: str | Path, **options: object) -> str:
    """Run a command to its end and return what it wrote to standard output."""
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    return str(done.stdout).strip()


def pip(*words: str | Path) -> None:
    command(
        sys.executable,
        "-m",
        "pip",
        "-qq",
        *words,
        env=os.environ | {"PIP_ROOT_USER_ACTION": "ignore"},
    )


def compile_all(tree: Path, root: Path) -> None:
    """Compile to bytecode with dom0's own Python, here, where it is not emulated."""
    inside = Path(tempfile.mkdtemp(dir=root / "tmp"))
    try:
        work = inside / "python"
        shutil.copytree(tree, work)
        name = "/" + str(work.relative_to(root))
        command("chroot", root, "python3", "-m", "compileall", "-q", "-s", name,
                "-p", "/payload/python", "--invalidation-mode", "unchecked-hash", name)  # fmt: skip
        shutil.rmtree(tree)
        shutil.copytree(work, tree)
    finally:
        shutil.rmtree(inside)


def dependencies(suite: str, root: Path) -> Path:
    """What xbd and its contract tests depend on, for dom0's Python; cached by their list."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = sorted(project["dependencies"] + project["optional-dependencies"]["test"])
    key = hashlib.sha256(repr((wanted, PYTHONS[suite])).encode()).hexdigest()[:16]
    place = CACHE / f"python-{key}"
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            wheels, tree = Path(scratch, "wheels"), Path(scratch, "tree")
            # First wheels of what is published as source only, then a tree for the other Python.
            pip("wheel", "--wheel-dir", wheels, *wanted)
            pip("install", "--target", tree, "--no-compile", "--python-version", PYTHONS[suite],
                "--only-binary=:all:", "--find-links", wheels, *wanted)  # fmt: skip
            compile_all(tree, root)
            tree.rename(place)
    return place


def project_files(target: Path) -> None:
    """Copy what git knows or would add."""
    listed = command(
        "git", "-C", PROJECT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"
    )
    for name in filter(None, listed.split("\0")):
        if (PROJECT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, target / name)


def payload(suite: str, root: Path, out: Path) -> None:
    """A file system with xbd, what it depends on, and its tests: dom0 mounts it at /payload.

    Exits if the native data path was not built.
    """
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        work = Path(scratch)
        project_files(work / "tree")
        shutil.copytree(work / "tree", work / "source")
        pip("wheel", "--no-deps", "--wheel-dir", work / "wheels", work / "source")
        pip("install", "--target", work / "python", "--no-compile", "--python-version",
            PYTHONS[suite], "--no-deps", *(work / "wheels").iterdir())  # fmt: skip
        if not (work / "python" / NATIVE).exists():
            sys.exit("the native data path was not built: is a C compiler installed?")
        compile_all(work / "python", root)
        shutil.copytree(dependencies(suite, root), work / "tree/python")
        shutil.copytree(work / "python", work / "tree/python", dirs_exist_ok=True)
        file_system(out, 256, work / "tree")


def file_system(path: Path, mib: int, tree: Path | None = None) -> None:
    """A file with an ext4 file system, with what is in `tree`."""
    with path.open("wb") as image:
        image.truncate(mib * 2**20)
    command("mkfs.ext4", "-q", "-F", "-O", "^has_journal", *(["-d", tree] if tree else []), path)


def image_root(suite: str) -> Path:
    """dom0's files, as they are in the image; makes the image unless there is one."""
    return Path(command(HERE / "lab", "build", suite)) / "root"


@contextmanager
def booted(
    suite: str,
    share: Path,
    disks: Sequence[Path],
    console: Path,
    seconds: int,
    linux_options: Sequence[str] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """The lab, running: `share` is dom0's /host, with `main` in it, `disks` are its /dev/vdb and
    so on, `linux_options` are more of its kernel's.  It is down when this ends."""
    with console.open("wb") as output:
        lab = subprocess.Popen(
            [HERE / "lab", "boot", suite, share, str(seconds)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"DISKS": " ".join(map(str, disks)), "LAB_LINUX_OPTIONS": " ".join(linux_options)},
        )
    try:
        yield lab
    finally:
        lab.terminate()
        lab.wait()


def last_lines(console: Path) -> list[str]:
    """How dom0's console ends."""
    return console.read_text(errors="replace").splitlines()[-15:]
