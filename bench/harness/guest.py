"""The load generator: builds it, runs it, reads its figures."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.workloads import Workload

_BENCH = Path(__file__).resolve().parent.parent
BUILD = _BENCH / "build"
_BINARY = BUILD / "bench-guest"
REFERENCE = BUILD / "bench-reference"
_DOMAIN_SECONDS = 10.0
_CONNECT_SECONDS = 200.0
_SLACK_SECONDS = 60.0
"""For everything but the load itself; more means that something hangs."""

Figures = dict[str, Any]
"""What `bench-guest` printed."""


class RunFailed(Exception):
    """A run that gave no figures, or wrong data.  The text says why."""


def build() -> None:
    """Compile what has changed.  Raises `RunFailed`."""
    for program in ("guest", "reference"):
        command = ["make", "--silent", "-C", str(_BENCH / program), f"BUILD={BUILD}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise RunFailed("make is not installed (Debian: build-essential)") from None
        if done.returncode:
            raise RunFailed(f"building bench/{program} failed:\n{done.stderr.strip()}")


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

    def connected(self) -> None:
        """Of an idle one: wait until it has all its disks.  Raises `RunFailed`."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _CONNECT_SECONDS)
        if not ready or self._process.stdout.readline().strip() != "connected":
            raise RunFailed(self._complaint("the guest did not get its disks"))

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
def idling(transport: list[str], disks: int) -> Iterator[Guest]:
    """A guest that connects that many disks and then does nothing with them."""
    command = [str(_BINARY), *transport, "--disks", str(disks), "--depth", str(disks), "--idle"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Guest(process, 0)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def running(
    transport: list[str],
    workload: Workload,
    *,
    seconds: float,
    seed: int,
    cpu: int,
    watch: int,
    more: Sequence[str],
) -> Iterator[Guest]:
    """Start it; it has ended when the block has.

    `transport` are the first words of its command line; `watch` is the process whose CPU time
    counts as the backend's.
    """
    command = [str(_BINARY), *transport, *more]
    command += ["--depth", str(workload.depth), "--block", str(workload.block)]
    if workload.operations:
        command += ["--operations", str(workload.operations), "--warmup", "0"]
    else:
        command += ["--seconds", str(seconds)]
    command += ["--seed", str(seed), "--generation", str(seed)]
    command += ["--cpu", str(cpu), "--watch-pid", str(watch)]
    if workload.spin_us:
        command += ["--spin-us", str(workload.spin_us)]
    if workload.touch:
        command += ["--touch", str(workload.touch)]
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
