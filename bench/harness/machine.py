"""This machine: its CPUs, its page cache, and how to tell results of two machines apart."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_READ_AT_ONCE = 1 << 20
_WATCH_SECONDS = 0.3


@dataclass(frozen=True)
class Cpus:
    """Where the guest and the backends run."""

    guest: int
    backend: int

    @classmethod
    def choose(cls, cores: int, first: int | None) -> Cpus:
        """`cores` 1: both on the same CPU, the quietest unless told; 2: one for each.

        Raises ValueError if this process may not use them.
        """
        allowed = sorted(os.sched_getaffinity(0))
        cpu = first if first is not None else _quietest(allowed)
        if cpu not in allowed:
            raise ValueError(f"CPU {cpu} may not be used; these may: {allowed}")
        if cores == 1:
            return cls(cpu, cpu)
        others = [other for other in allowed if other != cpu]
        if not others:
            raise ValueError("two cores are needed, and there is one")
        return cls(others[0], cpu)


def _idle_ticks() -> dict[int, int]:
    ticks = {}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu") and name != "cpu":
            ticks[int(name[3:])] = int(numbers[3]) + int(numbers[4])  # idle, iowait
    return ticks


def _quietest(cpus: list[int]) -> int:
    before = _idle_ticks()
    time.sleep(_WATCH_SECONDS)
    after = _idle_ticks()
    return max(cpus, key=lambda cpu: (after[cpu] - before[cpu], cpu))


def pin_process(pid: int, cpu: int) -> None:
    """All threads there are now; later ones inherit it."""
    for task in list(Path(f"/proc/{pid}/task").iterdir()):
        # The kernel's own threads in the process (io_uring's) may refuse, or just have ended.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(task.name), {cpu})


def read_into_cache(path: Path) -> None:
    """Read the whole file, so that the page cache has all of it (it may have lost some)."""
    buffer = bytearray(_READ_AT_ONCE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop_from_cache(path: Path) -> None:
    """Write back the file and forget its pages: they would be in O_DIRECT's way."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def read_afresh(path: Path, *, through_cache: bool) -> None:
    """Have the whole file in the page cache, or nothing of it."""
    if through_cache:
        read_into_cache(path)
    else:
        drop_from_cache(path)


def supports_direct(directory: Path) -> bool:
    """Whether files here can be opened with O_DIRECT."""
    probe = directory / "direct-probe"
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


def _line_with(path: str, start: str) -> str:
    lines: Iterable[str] = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(start)), "?")


def describe(qemu: str | None, images: Path) -> dict[str, str]:
    """What one needs to know about the machine to read the figures."""
    source = Path(__file__).resolve().parent.parent.parent
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "cpu": f"{os.cpu_count()} x {_line_with('/proc/cpuinfo', 'model name')}",
        "kernel": platform.release().partition("-")[0],  # the rest is whoever built it
        "python": sys.version.split()[0],
        "file system": _first_line(["stat", "--file-system", "--format=%T", str(images)]),
        "xbd": _first_line(["git", "-C", str(source), "describe", "--always", "--dirty"]),
        "qemu-storage-daemon": _first_line([qemu, "--version"]) if qemu else "not there",
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
