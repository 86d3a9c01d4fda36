"""What has to be reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.figures import Metric, Spread, ratio, spread
from harness.guest import Figures
from harness.workloads import Workload

Results = dict[Workload, dict[str, list[Figures | None]]]
"""Of each workload and backend the repetitions in order; None: it failed."""

AT_MOST, AT_LEAST, MORE_THAN = "≤", "≥", ">"


PLAIN = "plain C"
"""bench/reference: the least that can serve a ring."""


@dataclass(frozen=True)
class Target:
    """A ratio of two backends."""

    what: str
    workload: Workload
    metric: Metric
    relation: str
    limit: float
    backend: str
    peer: str
    judged: bool = True
    """Otherwise it is measured for the record only."""

    @property
    def text(self) -> str:
        return f"{self.relation} {self.limit:g} x {self.peer}"

    def met(self, measured: Spread) -> bool:
        """By the median."""
        if self.relation == AT_LEAST:
            return measured.median >= self.limit
        if self.relation == MORE_THAN:
            return measured.median > self.limit
        return measured.median <= self.limit

    def measured(self, results: Results) -> Spread | None:
        """The ratios of neighbouring runs; None if it was not measured."""
        runs = results.get(self.workload, {})
        if self.backend not in runs or self.peer not in runs:
            return None
        return ratio(runs[self.backend], runs[self.peer], self.metric)

    def floor(self, results: Results) -> Spread | None:
        """What plain C reaches in the same run: less is not to be had."""
        if PLAIN in (self.backend, self.peer):
            return None
        return replace(self, backend=PLAIN).measured(results)

    def row(self, results: Results) -> dict[str, str]:
        """What was measured, and PASS, MISS, or why neither."""
        floor = self.floor(results)
        measured = self.measured(results)
        text, verdict = "", "not measured"
        if measured is not None:
            text = measured.text("{:.2f}")
            verdict = "PASS" if self.met(measured) else "MISS"
            verdict = verdict if self.judged else "for the record"
        return {
            "workload": self.workload.name,
            "backend": self.backend,
            "figure": self.what,
            "target": self.text,
            "measured": text,
            "plain C": floor.text("{:.2f}") if floor is not None else "",
            "verdict": verdict,
        }


@dataclass(frozen=True)
class Bound(Target):
    """A figure by itself: there is no peer."""

    @property
    def text(self) -> str:
        return f"{self.relation} {self.limit:g}"

    def measured(self, results: Results) -> Spread | None:
        runs = results.get(self.workload, {})
        return spread(runs[self.backend], self.metric) if self.backend in runs else None


def for_the_record(targets: Sequence[Target], backend: str) -> tuple[Target, ...]:
    """The same of another backend, without a verdict."""
    return tuple(replace(target, backend=backend, judged=False) for target in targets)


def workloads_of(targets: Sequence[Target]) -> list[Workload]:
    """Those that there are targets for, each once."""
    return list(dict.fromkeys(target.workload for target in targets))
