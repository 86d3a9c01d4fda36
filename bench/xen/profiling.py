"""Where a Linux dom0's time goes, told by what its kernel counts anyway.

Samples of the kernel's own code need its option ``profile=SHIFT``.  They are taken at timer ticks:
where a hypercall ran, the hypercall's instruction is what is seen.
"""

from __future__ import annotations

import array
import os
from bisect import bisect_right
from collections import Counter
from pathlib import Path

_PROFILE = Path("/proc/profile")
_TOP = 25
_MODULES = "(modules)"
"""All code behind the kernel's own."""

ThreadTimes = dict[tuple[int, int], tuple[str, int, int, int]]
"""By process and thread: name, nanoseconds, ticks in user mode, ticks in the kernel."""


def thread_times() -> ThreadTimes:
    """Of all threads there are, kernel threads too."""
    times: ThreadTimes = {}
    for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        try:
            nanoseconds = int((task / "schedstat").read_text().split()[0])
            front, _, back = (task / "stat").read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        fields = back.split()
        name = front.partition("(")[2]
        key = (int(task.parent.parent.name), int(task.name))
        times[key] = (name, nanoseconds, int(fields[11]), int(fields[12]))
    return times


def since(before: ThreadTimes) -> list[dict[str, object]]:
    """What threads have used since then, most first."""
    per_tick_ms = 1000 / os.sysconf("SC_CLK_TCK")
    used = []
    for key, (name, nanoseconds, user, system) in thread_times().items():
        _, nanoseconds_then, user_then, system_then = before.get(key, ("", 0, 0, 0))
        if nanoseconds > nanoseconds_then and key[0] != os.getpid():
            process, _ = key
            used.append(
                {
                    "process": process,
                    "thread": name,
                    "cpu_ms": (nanoseconds - nanoseconds_then) / 1e6,
                    "user_ms": (user - user_then) * per_tick_ms,
                    "kernel_ms": (system - system_then) * per_tick_ms,
                }
            )
    return sorted(used, key=lambda row: -float(str(row["cpu_ms"])))[:_TOP]


def reset_kernel() -> None:
    """Count from nothing."""
    if _PROFILE.exists():
        with _PROFILE.open("wb", buffering=0) as file:
            file.write(b"0")


def kernel_samples() -> list[tuple[str, float]]:
    """Of all samples in the kernel, the share of each function, most first; nothing without
    the kernel's option."""
    if not _PROFILE.exists():
        return []
    counts = array.array("I", _PROFILE.read_bytes())
    step, counts = counts[0], counts[1:]
    symbols = sorted(
        (int(address, 16), name)
        for address, kind, name, *module in map(str.split, _kallsyms())
        if kind in "tT" and not module
    )
    start = next(address for address, name in symbols if name == "_stext")
    addresses = [address for address, _ in symbols]
    by_name: Counter[str] = Counter()
    for index, count in enumerate(counts):
        if not count:
            continue
        last = index == len(counts) - 1
        position = bisect_right(addresses, start + index * step) - 1
        by_name[_MODULES if last else symbols[position][1]] += count
    total = by_name.total()
    return [(name, count / total) for name, count in by_name.most_common(_TOP)]


def _kallsyms() -> list[str]:
    return Path("/proc/kallsyms").read_text().splitlines()


def strace_counts(summary: str) -> dict[str, int]:
    """Calls by name, of what ``strace -c`` has written."""
    counts = {}
    for line in summary.splitlines():
        words = line.split()
        if len(words) >= 5 and words[0].replace(".", "").isdigit() and words[-1] != "total":
            counts[words[-1]] = int(words[3])
    return counts
