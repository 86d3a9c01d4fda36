"""Pictures of the results: IOPS over depth, and how latencies are distributed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.figures import iops, spread
from harness.parts import Session
from harness.workloads import Workload

MISSING = "no plots: matplotlib is not installed (pip install -e '.[bench]')"
_FORMATS = ("svg", "png")
_STYLE: dict[Any, Any] = {
    "figure.figsize": (7.5, 4.5),
    "figure.dpi": 120,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.hashsalt": "xbd",
}
_LATENCIES_AT = (1, 32)
"""Depths of which the distribution is drawn."""


def available() -> bool:
    """Whether there is anything to draw with."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(sessions: Sequence[Session], directory: Path) -> list[Path]:
    """Write each picture as SVG and PNG; their paths.  Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    with pyplot.rc_context(_STYLE):
        for name, figure in _pictures(sessions):
            for form in _FORMATS:
                path = directory / f"{name}.{form}"
                metadata = {"Date": None} if form == "svg" else None
                figure.savefig(path, bbox_inches="tight", metadata=metadata)
                paths.append(path)
            pyplot.close(figure)
    return paths


def _pictures(sessions: Sequence[Session]) -> Iterator[tuple[str, Any]]:
    for session in sessions:
        stem = type(session.part).__name__.removesuffix("Part").lower()
        for kind, workloads in _by_kind(session).items():
            if len(workloads) > 1:
                yield f"{stem}-iops-{_slug(kind)}", _iops_over_depth(session, kind, workloads)
        for workload in session.results:
            if workload.depth in _LATENCIES_AT and _distributions(session, workload):
                yield f"{stem}-latency-{_slug(workload.name)}", _latencies(session, workload)


def _by_kind(session: Session) -> dict[str, list[Workload]]:
    """Those that differ in depth alone, under the rest of their name."""
    kinds: dict[str, list[Workload]] = {}
    for workload in session.results:
        kinds.setdefault(workload.name.rpartition(", depth ")[0], []).append(workload)
    return kinds


def _iops_over_depth(session: Session, kind: str, workloads: Sequence[Workload]) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for number, backend in enumerate(session.backends):
        points = []
        for workload in workloads:
            runs = session.results[workload].get(backend, [])
            measured = spread(runs, iops)
            if measured is not None:
                points.append((workload.depth, measured))
        if not points:
            continue
        depths = [depth for depth, _ in points]
        middle = [measured.median for _, measured in points]
        below = [measured.median - measured.low for _, measured in points]
        above = [measured.high - measured.median for _, measured in points]
        axes.errorbar(
            depths,
            middle,
            yerr=(below, above),
            marker="os^Dv"[number % 5],
            capsize=3,
            label=backend,
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({workload.depth for workload in workloads})
    axes.set_xticks(ticks, [str(depth) for depth in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("operations in flight")
    axes.set_ylabel("IOPS (median, lowest to highest)")
    axes.set_title(f"{session.part.title}: {kind}", fontsize=10)
    axes.legend()
    return figure


def _distributions(session: Session, workload: Workload) -> dict[str, list[tuple[float, float]]]:
    """Of each backend the run whose median is the median of all: fractions and microseconds."""
    found = {}
    for backend, runs in session.results[workload].items():
        known = sorted(
            (run for run in runs if run and "latency_us" in run), key=lambda run: run["p50_us"]
        )
        if known:
            found[backend] = known[len(known) // 2]["latency_us"]
    return found


def _latencies(session: Session, workload: Workload) -> Any:
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots()
    for backend, quantiles in _distributions(session, workload).items():
        axes.plot(
            [us for _, us in quantiles], [share * 100 for share, _ in quantiles], label=backend
        )
    axes.set_xscale("log")
    for use in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        use(ticker.StrMethodFormatter("{x:g}"))
    axes.set_ylim(0, 100.5)
    axes.set_xlabel("latency, µs")
    axes.set_ylabel("% of the operations at or below")
    axes.set_title(f"{session.part.title}: {workload.name}", fontsize=10)
    axes.legend()
    return figure


def _slug(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return "-".join(words)
