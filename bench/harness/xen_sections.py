"""Tables about dom0 itself: what the hypervisor's services cost, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from harness.figures import Spread
from harness.report import Section
from harness.servers import XBD
from harness.workloads import Workload
from harness.xen import BLKBACK, QDISK, WORKLOADS, fio, has
from harness.xen_host import XenHost

_ROUNDS = 2000
_UNIT = "hit"
_SERVICES = {
    "map-1": "map 1 page",
    "unmap-1": "unmap 1 page",
    "map-32": "map 32 pages at once",
    "unmap-32": "unmap 32 pages at once",
    "copy-1": "grant copy, 1 page",
    "copy-32": "grant copy, 32 pages at once",
    "hit": "persistent hit: copy a page to memory that is mapped",
    "notify": "event channel: notify",
    "read-port": "event channel: read the pending port",
    "unmask": "event channel: unmask",
}
_TRACED_SECONDS = 4


def services(host: XenHost, repeat: int) -> Section:
    """Grants and event channels by themselves.  Raises `RunFailed`."""
    runs = [host.order("micro", rounds=_ROUNDS) for _ in range(repeat)]
    rows = []
    for name, what in _SERVICES.items():
        absolute = Spread.of([run[name] / 1000 for run in runs])
        relative = Spread.of([run[name] / run[_UNIT] for run in runs])
        rows.append([what, absolute.text("{:,.1f}"), relative.text("{:.2f}")])
    columns = ["service, in dom0", "µs per call, emulated", "x persistent hit"]
    return Section("The hypervisor's services", columns, rows, runs)


def profiles(host: XenHost, seconds: int, only: str) -> Iterator[Section]:
    """Where dom0's time goes in workloads whose name contains `only`, "" for some, and what xbd's
    threads call.  xbd must be serving.  Raises `RunFailed`."""
    profiled = [
        workload
        for workload in WORKLOADS
        if (only in workload.name if only else workload.depth == 32)
    ]
    for workload in profiled:
        told = {
            backend: host.order("profile", seconds, run=fio(backend, workload, seconds))
            for backend in (QDISK, XBD, BLKBACK)
            if has(backend, workload)
        }
        yield _threads(workload, told)
        yield _kernel(workload, told)
    for workload in profiled:
        run = fio(XBD, workload, _TRACED_SECONDS)
        yield _calls(workload, host.order("system_calls", _TRACED_SECONDS, run=run))


def _threads(workload: Workload, told: dict[str, Any]) -> Section:
    rows = []
    for backend, profile in told.items():
        requests = profile["run"]["requests"]
        rest = whole = profile["run"]["dom0_cpu_us"] / requests
        rows.append([backend, f"dom0 ({profile['run']['iops']:,.0f} IOPS)", f"{rest:.0f}", "", ""])
        for thread in profile["threads"]:
            cpu = thread["cpu_ms"] * 1000 / requests
            rest -= cpu
            if cpu >= whole / 50:
                ticks = max(thread["user_ms"] + thread["kernel_ms"], 1)
                shares = [f"{thread[mode] / ticks:.0%}" for mode in ("user_ms", "kernel_ms")]
                rows.append([backend, thread["thread"], f"{cpu:.0f}", *shares])
        rows.append([backend, "no thread's: interrupts, Xen's scheduler", f"{rest:.0f}", "", ""])
    columns = ["backend", "thread", "CPU µs per request", "in user mode", "in the kernel"]
    return Section(f"Threads of dom0: {workload.name}", columns, rows, told)


def _kernel(workload: Workload, told: dict[str, Any]) -> Section:
    rows = [
        [backend, function, f"{share:.1%}"]
        for backend, profile in told.items()
        for function, share in profile["kernel"]
        if share >= 0.015
    ]
    columns = ["backend", "function", "of the kernel's samples"]
    return Section(f"Functions of dom0's kernel: {workload.name}", columns, rows, None)


def _calls(workload: Workload, told: dict[str, Any]) -> Section:
    requests = told["run"]["requests"]
    calls: Sequence[tuple[str, int]] = sorted(told["calls"].items(), key=lambda pair: -pair[1])
    rows = [[name, f"{count / requests:.3f}"] for name, count in calls if count >= requests / 1000]
    title = f"System calls of xbd, traced (which slows it down): {workload.name}"
    return Section(title, ["call", "per request"], rows, told)
