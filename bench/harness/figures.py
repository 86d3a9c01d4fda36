"""Medians, spreads and ratios of repeated runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.guest import Figures

Metric = Callable[[Figures], float]


@dataclass(frozen=True)
class Spread:
    """The median of some runs, and how far they lie apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def as_json(self) -> dict[str, float]:
        return {"median": self.median, "min": self.low, "max": self.high}


def iops(figures: Figures) -> float:
    return float(figures["iops"])


def mib_per_second(figures: Figures) -> float:
    return float(figures["mib_s"])


def backend_cpu(figures: Figures) -> float:
    """Microseconds per operation, of the whole process: user and system, all its threads."""
    return float(figures["backend_cpu_us"])


def both_cpus(figures: Figures) -> float:
    """Microseconds per operation, of guest and backend together."""
    return float(figures["backend_cpu_us"]) + float(figures["guest_cpu_us"])


def p50(figures: Figures) -> float:
    return float(figures["p50_us"])


def p99(figures: Figures) -> float:
    return float(figures["p99_us"])


METRICS: dict[str, Metric] = {
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


def spread(runs: Sequence[Figures], metric: Metric) -> Spread:
    """Of one backend's runs."""
    return Spread.of([metric(figures) for figures in runs])


def ratio(
    ours: Sequence[Figures | None], peers: Sequence[Figures | None], metric: Metric
) -> Spread | None:
    """Ours divided by the peer's, repetition by repetition: what disturbs one of a pair is
    likely to have disturbed the other.  None if no repetition has both."""
    pairs = [(one, other) for one, other in zip(ours, peers, strict=True) if one and other]
    quotients = [metric(one) / metric(other) for one, other in pairs if metric(other)]
    return Spread.of(quotients) if quotients else None
