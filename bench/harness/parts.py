"""A part of the measurements: some backends, each taken through the same workloads."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress, TaskID

from harness.figures import Metric
from harness.guest import Figures, RunFailed
from harness.machine import Cpus
from harness.targets import Results, Target
from harness.workloads import Workload

_LAST_SEED = 65535


@dataclass(frozen=True)
class Settings:
    """What holds for all parts."""

    cpus: Cpus
    seconds: float
    repeat: int
    size: int
    """Bytes of an ordinary file."""
    images: Path
    """Where files are made."""
    runtime: Path
    """Where sockets and journals are, with a short path."""
    qemu_poll_ns: int
    guest_options: Sequence[str]
    """For guests of xbd."""
    quick: bool
    """Only what there are targets for."""


@dataclass(frozen=True)
class Column:
    """Of a table that tells other things than rates and latencies."""

    title: str
    metric: Metric
    form: str


class Part(ABC):
    """Use within `running`."""

    title: str
    backends: Sequence[str]
    peer: str
    """The backend that the others are compared with."""
    targets: Sequence[Target]
    columns: Sequence[Column] = ()
    """None: the usual ones."""
    cpu_of = "the backend's process"
    """Whose time the columns and targets about CPU tell."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def repeat(self) -> int:
        """How often everything is measured."""
        return self.settings.repeat

    @abstractmethod
    def workloads(self) -> Sequence[Workload]:
        """In the order in which they are run."""

    def has(self, backend: str, workload: Workload) -> bool:
        """Whether that backend has that workload."""
        return True

    @abstractmethod
    def running(self, backends: Sequence[str]) -> AbstractContextManager[None]:
        """Make the files and start what stays.  Raises `RunFailed`."""

    @abstractmethod
    def measure(self, backend: str, workload: Workload, seed: int) -> Figures:
        """One run.  Raises `RunFailed`."""


@dataclass
class Session:
    """One part, measured: every backend in turn, in each repetition."""

    part: Part
    workloads: Sequence[Workload]
    backends: Sequence[str]
    results: Results = field(default_factory=dict)
    """None: that run failed."""
    failures: list[str] = field(default_factory=list)

    @property
    def runs(self) -> int:
        pairs = [(b, w) for b in self.backends for w in self.workloads if self.part.has(b, w)]
        return len(pairs) * self.part.repeat

    def run(self, progress: Progress, task: TaskID) -> None:
        """Fill `results` and `failures`."""
        seed = 0
        with self.part.running(self.backends):
            os.sync()  # nothing is written behind the first runs
            for workload in self.workloads:
                names = [name for name in self.backends if self.part.has(name, workload)]
                by_name: dict[str, list[Figures | None]] = {name: [] for name in names}
                self.results[workload] = by_name
                for repetition in range(self.part.repeat):
                    first = repetition % max(len(names), 1)
                    for name in [*names[first:], *names[:first]]:  # each begins as often
                        progress.update(task, description=f"{workload.name}: {name}")
                        seed = seed % _LAST_SEED + 1
                        by_name[name].append(self._measure(name, workload, seed))
                        progress.advance(task)

    def _measure(self, name: str, workload: Workload, seed: int) -> Figures | None:
        try:
            return self.part.measure(name, workload, seed)
        except RunFailed as error:
            self.failures.append(f"{workload.name}, {name}: {error}")
            return None
