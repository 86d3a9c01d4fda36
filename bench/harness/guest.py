"""The load generator: builds it, runs it, reads its figures."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.workloads import Workload

_BENCH = Path(__file__).resolve().parent.parent
BUILD = _BENCH / "build"
_BINARY = BUILD / "bench-guest"
_DOMAIN_SECONDS = 10.0
_SLACK_SECONDS = 60.0
"""For everything but the load itself; more means that something hangs."""

Figures = dict[str, Any]
"""What `bench-guest` printed."""


class RunFailed(Exception):
    """A run that gave no figures, or wrong data.  The text says why."""


def build() -> None:
    """Compile what has changed.  Raises `RunFailed`."""
    command = ["make", "--silent", "-C", str(_BENCH / "guest"), f"BUILD={BUILD}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RunFailed("make is not installed (Debian: build-essential)") from None
    if done.returncode:
        raise RunFailed(f"building the load generator failed:\n{done.stderr.strip()}")


def fill(path: Path, size: int) -> None:
    """Make a file with the content that reads are checked against.  Raises `RunFailed`."""
    done = subprocess.run(
        [str(_BINARY), "fill", str(path), str(size)], capture_output=True, text=True
    )
    if done.returncode:
        raise RunFailed(done.stderr.strip())


class Guest:
    """One run of the load generator.  Use `running`."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self._process = process
        self._seconds = seconds

    def domid(self) -> int:
        """blkif only: wait until it is a domain, and tell which.  Raises `RunFailed`."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _DOMAIN_SECONDS)
        words = self._process.stdout.readline().split() if ready else []
        if len(words) != 2 or words[0] != "domain":
            raise RunFailed(self._complaint("the guest did not become a domain"))
        return int(words[1])

    def figures(self) -> Figures:
        """Wait for the end.  Raises `RunFailed`, also when the data was wrong."""
        try:
            output, complaint = self._process.communicate(timeout=self._seconds + _SLACK_SECONDS)
        except subprocess.TimeoutExpired:
            raise RunFailed("the guest hangs") from None
        try:
            figures: Figures = json.loads(output)
        except ValueError:
            raise RunFailed(complaint.strip() or "the guest died") from None
        if figures["errors"]:
            raise RunFailed(f"{figures['errors']} operations failed")
        if figures["mismatches"]:
            raise RunFailed(f"{figures['mismatches']} reads returned wrong data")
        return figures

    def _complaint(self, otherwise: str) -> str:
        self._process.kill()
        _, complaint = self._process.communicate()
        return complaint.strip() or otherwise


@contextmanager
def running(
    transport: list[str],
    workload: Workload,
    *,
    seconds: float,
    seed: int,
    cpu: int,
    watch: int,
    more: list[str],
) -> Iterator[Guest]:
    """Start it; it has ended when the block has.

    `transport` are the first words of its command line; `watch` is the process whose CPU time
    counts as the backend's.
    """
    command = [str(_BINARY), *transport, *more]
    command += ["--depth", str(workload.depth), "--block", str(workload.block)]
    command += ["--seconds", str(seconds), "--seed", str(seed), "--generation", str(seed)]
    command += ["--cpu", str(cpu), "--watch-pid", str(watch)]
    if workload.sequential:
        command.append("--sequential")
    if workload.write:
        command += ["--write", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield Guest(process, seconds)
    finally:
        process.kill()
        with contextlib.suppress(ValueError):  # its pipes have been read to their end
            process.communicate()
