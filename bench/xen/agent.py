"""Runs in dom0: lets the guest work, and tells what it cost this domain.

    agent.py DOMID ORDERS

In the directory ORDERS, which the machine shares with this domain, orders appear as ``N.order`` and
are answered as ``N.answer``, both JSON; N counts from 1.  Only the standard library is needed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import profiling

HERE = Path(__file__).resolve().parent
_QEMU = "/usr/libexec/xen-qemu-system-i386"
_POLL_S = 0.1
_GUEST_START_S = 120.0
_SLACK_S = 90.0
"""What a guest may take longer for a run than the run's own seconds."""


class Refused(Exception):
    """An order that could not be carried out.  The text says why."""


class Accounts:
    """The hypervisor's own accounts of the domains' CPU time.

    It knows to the nanosecond how long a domain's virtual CPUs ran, hypercalls included, where
    this kernel's /proc/stat knows ticks, and takes what the hypervisor does to it for its own work.
    """

    def __init__(self) -> None:
        name = next(Path("/usr/lib/x86_64-linux-gnu").glob("libxenstat.so.4.*"), None)
        if name is None:
            raise Refused("dom0 has no libxenstat")
        library = ctypes.CDLL(str(name))
        pointer = ctypes.c_void_p
        for function, result, arguments in (
            ("xenstat_init", pointer, []),
            ("xenstat_get_node", pointer, [pointer, ctypes.c_uint]),
            ("xenstat_node_domain", pointer, [pointer, ctypes.c_uint]),
            ("xenstat_domain_cpu_ns", ctypes.c_ulonglong, [pointer]),
            ("xenstat_free_node", None, [pointer]),
        ):
            getattr(library, function).restype = result
            getattr(library, function).argtypes = arguments
        self._library = library
        self._handle = library.xenstat_init()
        if not self._handle:
            raise Refused("libxenstat does not open")

    def cpu_ns(self, *domids: int) -> list[int]:
        """What these domains have had so far."""
        node = self._library.xenstat_get_node(self._handle, 0)
        if not node:
            raise Refused("libxenstat tells nothing")
        try:
            domains = [self._library.xenstat_node_domain(node, domid) for domid in domids]
            if not all(domains):
                raise Refused("the guest is gone")
            return [self._library.xenstat_domain_cpu_ns(domain) for domain in domains]
        finally:
            self._library.xenstat_free_node(node)


class GuestConsole:
    """What the guest's job reads and writes, a line at a time."""

    def __init__(self, domid: int) -> None:
        path = f"/local/domain/{domid}/console/tty"
        terminal = subprocess.run(
            ["xenstore-read", path], check=True, capture_output=True, text=True
        )
        # Raw already: xenconsoled has opened it, too.
        self._fd = os.open(terminal.stdout.strip(), os.O_RDWR | os.O_NOCTTY)
        self._received = b""

    def say(self, line: str) -> None:
        os.write(self._fd, f"{line}\n".encode())

    def wait_for(self, words: tuple[str, ...], seconds: float) -> str:
        """The next line that begins with one of these; others (the kernel's) are dropped."""
        deadline = time.monotonic() + seconds
        while True:
            while b"\n" in self._received:
                line, _, self._received = self._received.partition(b"\n")
                text = line.decode(errors="replace").strip()
                if f"{text} ".startswith(tuple(f"{start} " for start in words)):
                    return text
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                raise Refused(f"the guest does not say {' or '.join(words)} in {seconds:.0f} s")
            self._received += os.read(self._fd, 4096)


@dataclass
class Account:
    """What dom0 and the guest used during something."""

    seconds: float
    dom0_ns: int
    guest_ns: int


class Agent:
    """Carries out orders; each method is one."""

    def __init__(self, domid: int) -> None:
        self._domid = domid
        self._datapath = ""
        self._runs = 0
        self._accounts = Accounts()
        self._console = GuestConsole(domid)
        self._console.wait_for(("READY",), _GUEST_START_S)

    def describe(self) -> dict[str, str]:
        """What is measured, by its versions."""
        hypervisor = Path("/sys/hypervisor/version")
        numbers = [(hypervisor / part).read_text().strip() for part in ("major", "minor")]
        extra = (hypervisor / "extra").read_text().strip()
        qdisk = subprocess.run([_QEMU, "--version"], check=True, capture_output=True, text=True)
        return {
            "Xen": f"{'.'.join(numbers)}{extra}",
            "dom0's and the guest's kernel": os.uname().release,
            "dom0's Python": sys.version.split()[0],
            "qdisk": qdisk.stdout.splitlines()[0],
        }

    def serve(self, datapath: str) -> dict[str, Any]:
        """Give the guest xbd's disks, with this data path."""
        if datapath == self._datapath:
            return {}
        done = subprocess.run(
            ["sh", HERE / "serve", datapath], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            lines = done.stdout.decode(errors="replace").strip().splitlines()
            raise Refused(" / ".join(lines[-3:]) or "serving failed")
        self._datapath = datapath
        return {}

    def idle(self, seconds: float) -> dict[str, Any]:
        """What dom0 and the guest take while nothing is done."""
        account = self._account(lambda: time.sleep(seconds))
        return {
            "dom0_cpu_us_per_s": account.dom0_ns / 1000 / account.seconds,
            "guest_cpu_us_per_s": account.guest_ns / 1000 / account.seconds,
        }

    def run(self, disk: str, rw: str, block: int, depth: int, seconds: int) -> dict[str, Any]:
        """One run of fio in the guest."""
        self._runs += 1
        os.sync()  # what is written behind another run is no part of this one
        self._console.say(f"{self._runs} {disk} {rw} {block} {depth} {seconds}")
        self._await("BEGIN", _SLACK_S)
        account = self._account(lambda: self._await("END", seconds + _SLACK_S))
        rest = self._await("DONE", _SLACK_S)
        kib, milliseconds, p50, p99 = map(float, rest.split())
        if not kib or not milliseconds:
            raise Refused("fio did nothing")
        requests = kib * 1024 / block
        return {
            "requests": requests,
            "iops": requests * 1000 / milliseconds,
            "mib_s": kib / 1024 * 1000 / milliseconds,
            "p50_us": p50,
            "p99_us": p99,
            "elapsed_s": account.seconds,
            "dom0_cpu_us": account.dom0_ns / 1000,
            "guest_cpu_us": account.guest_ns / 1000,
        }

    def _await(self, word: str, seconds: float) -> str:
        """Wait until the guest's job says this of the present run; what follows."""
        words = (f"{word} {self._runs}", f"FAILED {self._runs}")
        said, _, rest = self._console.wait_for(words, seconds).partition(" ")
        rest = rest.partition(" ")[2]
        if said == "FAILED":
            raise Refused(rest)
        return rest

    def micro(self, rounds: int) -> dict[str, Any]:
        """What the hypervisor's services cost: nanoseconds by name."""
        done = subprocess.run(["/host/micro", str(rounds)], capture_output=True, text=True)
        if done.returncode:
            raise Refused(done.stderr.strip())
        pairs = (line.split() for line in done.stdout.splitlines())
        return {name: float(nanoseconds) for name, nanoseconds in pairs}

    def profile(self, run: dict[str, Any]) -> dict[str, Any]:
        """A run, and where dom0's time went in it."""
        threads = profiling.thread_times()
        profiling.reset_kernel()
        figures = self.run(**run)
        kernel = profiling.kernel_samples()
        return {
            "run": figures,
            "threads": profiling.since(threads),
            "kernel": kernel,
        }

    def system_calls(self, run: dict[str, Any]) -> dict[str, Any]:
        """A run under strace: what xbd calls, and how often.  The times say nothing."""
        out = Path("/tmp/strace")
        tracer = subprocess.Popen(
            ["strace", "-f", "-c", "-o", out, "-p", Path("/run/xbd.pid").read_text().strip()],
            stderr=subprocess.DEVNULL,
        )
        time.sleep(3)  # it has to attach to all threads
        try:
            figures = self.run(**run)
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait()
        return {"run": figures, "calls": profiling.strace_counts(out.read_text())}

    def _account(self, work: Callable[[], object]) -> Account:
        before, began = self._accounts.cpu_ns(0, self._domid), time.monotonic()
        work()
        after, ended = self._accounts.cpu_ns(0, self._domid), time.monotonic()
        return Account(ended - began, after[0] - before[0], after[1] - before[1])


def main() -> int:
    """Do what is ordered, until the machine turns dom0 off."""
    domid, orders = int(sys.argv[1]), Path(sys.argv[2])
    try:
        agent = Agent(domid)
    except (Refused, OSError) as error:
        _write(orders / "1.answer", {"error": str(error)})
        return 1
    number = 1
    while True:
        path = orders / f"{number}.order"
        while not path.exists():
            time.sleep(_POLL_S)
        order = json.loads(path.read_text())
        kind = order.pop("do")
        try:
            answer = getattr(agent, kind)(**order)
        except (Refused, OSError, subprocess.CalledProcessError) as error:
            answer = {"error": str(error)}
        _write(orders / f"{number}.answer", answer)
        number += 1


def _write(path: Path, answer: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(answer))
    unfinished.rename(path)


if __name__ == "__main__":
    sys.exit(main())
