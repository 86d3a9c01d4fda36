"""The results as tables for people, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.figures import (
    METRICS,
    RATIOS,
    Metric,
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
from harness.parts import Session
from harness.workloads import MIB, Workload

_NAME_WIDTH, _CELL_WIDTH = 13, 15
_COLUMNS = ("IOPS", "MiB/s", "CPU µs", "both µs", "p50 µs", "p99 µs", "x IOPS", "x CPU", "x both")


_TARGET_COLUMNS = ("workload", "backend", "figure", "target", "measured", "plain C", "")


@dataclass(frozen=True)
class Section:
    """A table of something that has no workloads and backends."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Any
    """The same and more, for JSON."""


@dataclass
class Report:
    """Everything about one call of the program."""

    environment: dict[str, str]
    settings: dict[str, Any]
    sessions: Sequence[Session]
    title: str = "Benchmark"
    sections: Sequence[Section] = ()

    @property
    def failures(self) -> list[str]:
        return [failure for session in self.sessions for failure in session.failures]

    # -- for people -------------------------------------------------------------------------

    def show(self, console: Console) -> None:
        """The whole table, then the targets."""
        console.print("Median of the repetitions, and below it the lowest and the highest.")
        for session in self.sessions:
            console.rule(session.part.title, align="left")
            for workload in session.results:
                console.print(self._table(session, workload))
        whose = " or ".join(dict.fromkeys(session.part.cpu_of for session in self.sessions))
        console.print(
            f"CPU: {whose}, per operation; both: with the guest's; "
            "x: divided by the first one's, in pairs."
        )
        self._show_targets(console)
        for section in self.sections:
            table = Table(title=section.title)
            for column in section.columns:
                table.add_column(column)
            for row in section.rows:
                table.add_row(*row)
            console.print(table)
        for failure in self.failures:
            console.print(f"[bold red]FAILED[/] {failure}", highlight=False)

    def _table(self, session: Session, workload: Workload) -> Table:
        table = Table(
            title=workload.name,
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, 0),
        )
        table.add_column("", width=_NAME_WIDTH)
        for column in _columns(session):
            table.add_column(column, width=_CELL_WIDTH, justify="right")
        for name in session.results[workload]:
            cells = [cell.partition(" (") for cell in _cells(session, workload, name)]
            rows = [f"{median}\n[dim]{spread.rstrip(')')}[/]" for median, _, spread in cells]
            table.add_row(name, *rows)
        return table

    def _show_targets(self, console: Console) -> None:
        table = Table(title="Targets")
        columns, rows = self._target_table()
        for column in columns:
            table.add_column(column)
        for *cells, verdict in rows:
            colour = {"PASS": "green", "MISS": "yellow"}.get(verdict, "dim")
            table.add_row(*cells, f"[{colour}]{verdict}[/]")
        console.print(table)
        missing = len(self.verdicts()) - len(self._measured())
        if missing:
            console.print(f"{missing} targets were not measured.")

    def _measured(self) -> list[dict[str, str]]:
        return [row for row in self.verdicts() if row["measured"]]

    def _target_table(self) -> tuple[Sequence[str], list[list[str]]]:
        """Titles and rows, without columns in which nothing is."""
        rows = [list(row.values()) for row in self._measured()]
        shown = [
            index
            for index, title in enumerate(_TARGET_COLUMNS)
            if not title or any(row[index] for row in rows)
        ]
        titles = [_TARGET_COLUMNS[index] for index in shown]
        return titles, [[row[index] for index in shown] for row in rows]

    def verdicts(self) -> list[dict[str, str]]:
        """One row per target."""
        return [
            target.row(session.results)
            for session in self.sessions
            for target in session.part.targets
        ]

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
            "targets": self.verdicts(),
            "failures": self.failures,
            "sections": [asdict(section) for section in self.sections],
            "parts": [
                {
                    "title": session.part.title,
                    "peer": session.part.peer,
                    "workloads": [
                        {
                            "name": workload.name,
                            **asdict(workload),
                            "backends": {
                                name: _backend_json(session, workload, name) for name in runs
                            },
                        }
                        for workload, runs in session.results.items()
                    ],
                }
                for session in self.sessions
            ],
        }

    def _markdown(self) -> str:
        lines = [f"# {self.title}", ""]
        lines += [f"- {key}: {value}" for key, value in self.environment.items()]
        lines += [f"- {key}: {value}" for key, value in self.settings.items()]
        lines += _markdown_table("Targets", *self._target_table())
        for section in self.sections:
            lines += _markdown_table(section.title, section.columns, section.rows)
        for session in self.sessions:
            lines += ["", f"## {session.part.title}"]
            for workload, names in session.results.items():
                lines += ["", f"### {workload.name}", ""]
                columns = _columns(session)
                lines += [f"| backend | {' | '.join(columns)} |"]
                lines += ["|---|" + "---:|" * len(columns)]
                for name in names:
                    lines += [f"| {name} | {' | '.join(_cells(session, workload, name))} |"]
        if self.failures:
            lines += ["", "## Failures", ""]
            lines += [f"- {failure.replace(chr(10), ' / ')}" for failure in self.failures]
        return "\n".join(lines) + "\n"


def _markdown_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _columns(session: Session) -> Sequence[str]:
    own = session.part.columns
    return [column.title for column in own] if own else _COLUMNS


def _cells(session: Session, workload: Workload, name: str) -> list[str]:
    runs = session.results[workload][name]
    if not any(runs):
        return ["failed"] + [""] * (len(_columns(session)) - 1)
    if session.part.columns:
        own = [(spread(runs, column.metric), column.form) for column in session.part.columns]
        return ["" if value is None else value.text(form) for value, form in own]
    large = workload.block >= MIB
    shown: list[tuple[Metric, str]] = [
        (iops, "{:,.0f}"),
        (mib_per_second, "{:,.0f}"),
        (backend_cpu, "{:.0f}" if large else "{:.2f}"),
        (both_cpus, "{:.0f}" if large else "{:.2f}"),
        (p50, "{:,.0f}"),
        (p99, "{:,.0f}"),
    ]
    values = [(spread(runs, metric), form) for metric, form in shown]
    values += [(_ratio(session, workload, name, metric), "{:.2f}") for metric in RATIOS.values()]
    return ["" if value is None else value.text(form) for value, form in values]


def _ratio(session: Session, workload: Workload, name: str, metric: Metric) -> Spread | None:
    runs = session.results[workload]
    peer = session.part.peer
    return None if name == peer or peer not in runs else ratio(runs[name], runs[peer], metric)


def _backend_json(session: Session, workload: Workload, name: str) -> dict[str, Any]:
    runs = session.results[workload][name]
    summary = {key: spread(runs, metric) for key, metric in METRICS.items()}
    ratios = {key: _ratio(session, workload, name, metric) for key, metric in RATIOS.items()}
    return {
        "summary": {key: value.as_json() for key, value in summary.items() if value},
        "ratios": {key: value.as_json() for key, value in ratios.items() if value},
        "runs": list(runs),
    }
