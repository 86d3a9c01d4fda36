"""What the reference data path has to reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.figures import Metric, Spread, backend_cpu, iops, ratio
from harness.guest import Figures
from harness.workloads import CACHED_DEPTH_32, DIRECT_DEPTH_32, Workload

Results = Mapping[Workload, Mapping[str, Sequence[Figures | None]]]
"""Of each workload and backend the repetitions in order; None: it failed."""


@dataclass(frozen=True)
class Target:
    """A ratio to the peer."""

    what: str
    workload: Workload
    metric: Metric
    limit: float
    at_least: bool
    """Otherwise: at most."""

    @property
    def relation(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"

    def met(self, measured: Spread) -> bool:
        """By the median."""
        if self.at_least:
            return measured.median >= self.limit
        return measured.median <= self.limit

    def measured(self, results: Results, name: str, peer: str) -> Spread | None:
        """None if it was not measured."""
        runs = results.get(self.workload, {})
        if name not in runs or peer not in runs:
            return None
        return ratio(runs[name], runs[peer], self.metric)


TARGETS = (
    Target("backend CPU per request", CACHED_DEPTH_32, backend_cpu, 0.75, at_least=False),
    Target("IOPS", CACHED_DEPTH_32, iops, 1.5, at_least=True),
    Target("backend CPU per request", DIRECT_DEPTH_32, backend_cpu, 1.1, at_least=False),
)
