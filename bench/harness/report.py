"""The results as tables for people, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.figures import (
    METRICS,
    RATIOS,
    Spread,
    backend_cpu,
    both_cpus,
    iops,
    mib_per_second,
    p50,
    p99,
    ratio,
    spread,
)
from harness.guest import Figures
from harness.targets import TARGETS, Results
from harness.workloads import MIB, Workload

REFERENCE = "xbd-python"
"""The data path that the targets are for."""
_NAME_WIDTH, _CELL_WIDTH = 11, 15
_COLUMNS = ("IOPS", "MiB/s", "CPU µs", "both µs", "p50 µs", "p99 µs", "x IOPS", "x CPU", "x both")


@dataclass
class Report:
    """Everything about one session."""

    environment: dict[str, str]
    settings: dict[str, Any]
    peer: str | None
    """Whom the ratios compare with, if it runs."""
    results: Results
    failures: list[str] = field(default_factory=list)

    # -- for people -------------------------------------------------------------------------

    def show(self, console: Console) -> None:
        """The whole table, then the targets."""
        console.print("Median of the repetitions, and below it the lowest and the highest.")
        for workload, runs in self.results.items():
            console.print(self._table(workload, runs))
        legend = "CPU: the backend's process per operation; both: with the guest's"
        if self.peer:
            legend += f"; x: divided by {self.peer}'s, in pairs"
        console.print(f"{legend}.")
        self._show_targets(console)
        for failure in self.failures:
            console.print(f"[bold red]FAILED[/] {failure}", highlight=False)

    def _table(self, workload: Workload, names: Iterable[str]) -> Table:
        table = Table(
            title=workload.name,
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, 0),
        )
        table.add_column("", width=_NAME_WIDTH)
        for column in _COLUMNS:
            table.add_column(column, width=_CELL_WIDTH, justify="right")
        for name in names:
            cells = [cell.partition(" (") for cell in self._cells(workload, name)]
            rows = [f"{median}\n[dim]{spread.rstrip(')')}[/]" for median, _, spread in cells]
            table.add_row(name, *rows)
        return table

    def _show_targets(self, console: Console) -> None:
        table = Table(title=f"Targets for {REFERENCE}, as ratios to {self.peer or 'the peer'}")
        for column in ("workload", "figure", "target", "measured", ""):
            table.add_column(column)
        for row in self.verdicts():
            colour = {"PASS": "green", "MISS": "yellow"}.get(row["verdict"], "dim")
            cells = (row["workload"], row["figure"], row["target"], row["measured"])
            table.add_row(*cells, f"[{colour}]{row['verdict']}[/]")
        console.print(table)

    def _cells(self, workload: Workload, name: str) -> list[str]:
        runs = self.results[workload]
        good = [figures for figures in runs[name] if figures]
        if not good:
            return ["failed"] + [""] * (len(_COLUMNS) - 1)
        large = workload.block >= MIB
        cells = [
            _text(spread(good, iops), "{:,.0f}"),
            _text(spread(good, mib_per_second), "{:,.0f}"),
            _text(spread(good, backend_cpu), "{:.0f}" if large else "{:.2f}"),
            _text(spread(good, both_cpus), "{:.0f}" if large else "{:.2f}"),
            _text(spread(good, p50), "{:,.0f}"),
            _text(spread(good, p99), "{:,.0f}"),
        ]
        for metric in RATIOS.values():
            quotient = self._ratio(runs, name, metric)
            cells.append("" if quotient is None else _text(quotient, "{:.2f}"))
        return cells

    def _ratio(
        self, runs: Mapping[str, Sequence[Figures | None]], name: str, metric: Any
    ) -> Spread | None:
        if self.peer is None or name == self.peer or self.peer not in runs:
            return None
        return ratio(runs[name], runs[self.peer], metric)

    def verdicts(self) -> list[dict[str, str]]:
        """Each target, what was measured, and PASS, MISS, or why neither."""
        rows = []
        for target in TARGETS:
            measured = target.measured(self.results, REFERENCE, self.peer or "")
            if measured is None:
                text, verdict = "", "not measured"
            else:
                text = _text(measured, "{:.2f}")
                verdict = "PASS" if target.met(measured) else "MISS"
            rows.append(
                {
                    "workload": target.workload.name,
                    "figure": target.what,
                    "target": target.relation,
                    "measured": text,
                    "verdict": verdict,
                }
            )
        return rows

    # -- for files --------------------------------------------------------------------------

    def save(self, directory: Path, stem: str) -> list[Path]:
        """Write both files; their paths."""
        directory.mkdir(parents=True, exist_ok=True)
        as_json, as_text = directory / f"{stem}.json", directory / f"{stem}.md"
        as_json.write_text(json.dumps(self._json(), indent=1) + "\n")
        as_text.write_text(self._markdown())
        return [as_text, as_json]

    def _json(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "settings": self.settings,
            "peer": self.peer,
            "targets": self.verdicts(),
            "failures": self.failures,
            "workloads": [
                {
                    "name": workload.name,
                    **asdict(workload),
                    "image": workload.image.value,
                    "backends": {name: self._backend_json(workload, name) for name in runs},
                }
                for workload, runs in self.results.items()
            ],
        }

    def _backend_json(self, workload: Workload, name: str) -> dict[str, Any]:
        runs = self.results[workload]
        good = [figures for figures in runs[name] if figures]
        ratios = {key: self._ratio(runs, name, metric) for key, metric in RATIOS.items()}
        return {
            "summary": {key: spread(good, metric).as_json() for key, metric in METRICS.items()}
            if good
            else None,
            "ratios": {key: value.as_json() for key, value in ratios.items() if value},
            "runs": list(runs[name]),
        }

    def _markdown(self) -> str:
        lines = ["# Benchmark", ""]
        lines += [f"- {key}: {value}" for key, value in self.environment.items()]
        lines += [f"- {key}: {value}" for key, value in self.settings.items()]
        lines += [
            "",
            "## Targets",
            "",
            "| workload | figure | target | measured | |",
            "|" + "---|" * 5,
        ]
        lines += [f"| {' | '.join(row.values())} |" for row in self.verdicts()]
        for workload, runs in self.results.items():
            lines += ["", f"## {workload.name}", ""]
            lines += [f"| backend | {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * len(_COLUMNS)]
            lines += [f"| {name} | {' | '.join(self._cells(workload, name))} |" for name in runs]
        if self.failures:
            lines += ["", "## Failures", ""]
            lines += [f"- {failure.replace(chr(10), ' / ')}" for failure in self.failures]
        return "\n".join(lines) + "\n"


def _text(values: Spread, form: str) -> str:
    low, high = form.format(values.low), form.format(values.high)
    return f"{form.format(values.median)} ({low}-{high})"
