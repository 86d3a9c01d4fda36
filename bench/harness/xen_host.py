"""A Xen host for measurements: the lab, booted once, with dom0 carrying out orders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import attrs

from harness.guest import BUILD, RunFailed

BENCH = Path(__file__).resolve().parent.parent
LAB = BENCH.parent / "tests/xen"
sys.path.insert(0, str(LAB))

from host import booted, file_system, image_root, last_lines, payload  # noqa: E402

_POLL_S = 0.05
_ANSWER_S = 600.0
"""For everything but the work itself; the first order waits for dom0 and its guest to boot."""
_SCRATCH_MIB = 3072
_PROFILE_SHIFT = 4
"""A counter for each 16 bytes of the kernel's code."""


@attrs.define
class XenHost:
    """dom0's end of it is bench/xen/agent.py.  Use `running`."""

    _share: Path
    _console: Path
    _lab: subprocess.Popen[bytes]
    _orders: int = attrs.field(default=0, init=False)
    _lost: bool = attrs.field(default=False, init=False)

    def order(self, what: str, seconds: float = 0, /, **details: Any) -> Any:
        """Have dom0 do something that takes about so long; its answer.  Raises `RunFailed`."""
        if self._lost:
            raise RunFailed("the lab has ended before")
        self._orders += 1
        orders = self._share / "orders"
        unfinished, answer = orders / "unfinished", orders / f"{self._orders}.answer"
        unfinished.write_text(json.dumps({"do": what, **details}))
        unfinished.rename(orders / f"{self._orders}.order")
        deadline = time.monotonic() + seconds + _ANSWER_S
        while not answer.exists():
            if self._lab.poll() is not None:
                self._lose("the lab has ended")
            if time.monotonic() > deadline:
                self._lose(f"dom0 does not answer ({what})")
            time.sleep(_POLL_S)
        told = json.loads(answer.read_text())
        if isinstance(told, dict) and "error" in told:
            raise RunFailed(str(told["error"]))
        return told

    def _lose(self, why: str) -> NoReturn:
        self._lost = True
        ends = last_lines(self._console)
        raise RunFailed("\n  ".join([f"{why}; dom0's console ends with:", *ends]))


@contextmanager
def running(suite: str, image_mib: int, seconds: int, *, profile: bool) -> Iterator[XenHost]:
    """Boot it, with a guest in it.  `seconds`: for the whole boot."""
    missing = _command([str(LAB / "lab"), "needs"]).split()
    if missing:
        raise RunFailed(f"the lab needs, from Debian: {' '.join(missing)}")
    _command(["make", "--silent", "-C", str(BENCH / "xen"), f"BUILD={BUILD}"])
    root = image_root(suite)
    share = BUILD / "xen"
    shutil.rmtree(share, ignore_errors=True)
    (share / "orders").mkdir(parents=True)
    shutil.copytree(LAB / "dom0", share / "dom0")
    for name in ("main", "guest-job"):
        shutil.copy(BENCH / "xen" / name, share / name)
    shutil.copy(BUILD / "xen-micro", share / "micro")
    (share / "settings").write_text(
        f"BACKEND=xbd\nSUITE={suite}\nDATAPATH=native\nIMAGE_MIB={image_mib}\n"
    )
    disks = [share / "scratch.img", share / "payload.img"]
    file_system(disks[0], _SCRATCH_MIB)
    payload(suite, root, disks[1])
    console = share / "console.log"
    options = [f"profile={_PROFILE_SHIFT}"] if profile else []
    try:
        with booted(suite, share, disks, console, seconds, options) as lab:
            yield XenHost(share, console, lab)
    finally:
        for disk in disks:
            disk.unlink(missing_ok=True)


def emulator() -> str:
    """What the lab runs in.  Raises `RunFailed`."""
    return _command(["qemu-system-x86_64", "--version"]).splitlines()[0]


def _command(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"{' '.join(words)} failed:\n{done.stderr.strip()}")
    return done.stdout
