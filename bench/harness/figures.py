"""Medians, spreads and ratios of repeated runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.guest import Figures

Metric = Callable[[Figures], float | None]
"""Takes one figure of a run; None: a run of that kind does not have it."""


@dataclass(frozen=True)
class Spread:
    """The median of some runs, and how far they lie apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str) -> str:
        """``median (low-high)``."""
        low, high = form.format(self.low), form.format(self.high)
        return f"{form.format(self.median)} ({low}-{high})"

    def as_json(self) -> dict[str, float]:
        return {"median": self.median, "min": self.low, "max": self.high}


def _metric(key: str) -> Metric:
    return lambda figures: float(figures[key]) if key in figures else None


iops = _metric("iops")
mib_per_second = _metric("mib_s")
backend_cpu = _metric("backend_cpu_us")
"""Microseconds per operation, of the whole process: user and system, all its threads."""
p50 = _metric("p50_us")
p99 = _metric("p99_us")


wakeups = _metric("wakeups_per_second")
"""Of the backend's threads, all together."""
idle_cpu = _metric("idle_cpu_ms_per_second")
kib_per_disk = _metric("kib_per_disk")
start_seconds = _metric("start_seconds")
"""From the toolstack's first write to the last disk's being connected."""
store_seconds = _metric("store_seconds")
"""Of that, what the toolstack takes to write the disks' entries to a daemon that looks after none
of them."""


def own_start_seconds(figures: Figures) -> float | None:
    """The rest: what looking after them takes."""
    if "store_seconds" not in figures:
        return None
    return float(figures["start_seconds"]) - float(figures["store_seconds"])


def both_cpus(figures: Figures) -> float | None:
    """Microseconds per operation, of guest and backend together."""
    if "guest_cpu_us" not in figures:
        return None
    return float(figures["backend_cpu_us"]) + float(figures["guest_cpu_us"])


METRICS: dict[str, Metric] = {
    "wakeups_per_second": wakeups,
    "idle_cpu_ms_per_second": idle_cpu,
    "kib_per_disk": kib_per_disk,
    "start_seconds": start_seconds,
    "own_start_seconds": own_start_seconds,
    "store_seconds": store_seconds,
    "iops": iops,
    "mib_s": mib_per_second,
    "backend_cpu_us": backend_cpu,
    "guest_and_backend_cpu_us": both_cpus,
    "p50_us": p50,
    "p99_us": p99,
}
RATIOS: dict[str, Metric] = {
    "iops": iops,
    "backend_cpu": backend_cpu,
    "guest_and_backend_cpu": both_cpus,
}
"""Those of which the ratio to the peer is told."""


def spread(runs: Sequence[Figures | None], metric: Metric) -> Spread | None:
    """Of one backend's runs; None if none of them has that figure."""
    values = [metric(figures) for figures in runs if figures]
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None


def ratio(
    ours: Sequence[Figures | None], peers: Sequence[Figures | None], metric: Metric
) -> Spread | None:
    """Ours divided by the peer's, repetition by repetition: what disturbs one of a pair is
    likely to have disturbed the other.  None if no repetition has both."""
    quotients = []
    for one, other in zip(ours, peers, strict=True):
        if one and other:
            mine, yours = metric(one), metric(other)
            if mine is not None and yours:
                quotients.append(mine / yours)
    return Spread.of(quotients) if quotients else None
