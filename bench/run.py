"""Measures xbd beside QEMU: the same guest, the same files, the same minutes.

Both are driven by one closed loop in C, taking turns in each repetition, since machines are
shared and noisy: the ratios of neighbouring runs count.  Results go to bench/results/.

It ends with 0 unless something could not be run or data was wrong; a missed target is a result.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from harness import guest, machine
from harness.guest import Figures, RunFailed
from harness.machine import Cpus
from harness.report import Report
from harness.servers import DATA_PATHS, QEMU, QemuServer, Server, XbdServer
from harness.workloads import FULL, MIB, QUICK, Image, Workload
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

RESULTS = Path(__file__).resolve().parent / "results"
_PLAIN_WIDTH = 150
"""Columns when the output is not a terminal."""
_LAST_SEED = 65535


def main() -> int:
    """Run everything; the exit status."""
    arguments = _arguments()
    console = Console(width=None if Console().is_terminal else _PLAIN_WIDTH)
    try:
        cpus = Cpus.choose(arguments.cores, arguments.cpu)
        guest.build()
        with tempfile.TemporaryDirectory(
            prefix="images-", dir=_image_directory(arguments)
        ) as images:
            report = _session(arguments, cpus, Path(images), console)
    except (RunFailed, ValueError, OSError) as error:
        console.print(f"[bold red]bench:[/] {error}", highlight=False)
        return 1
    report.show(console)
    paths = report.save(RESULTS, time.strftime("%Y%m%d-%H%M%S"))
    console.print(f"Written to {' and '.join(str(path) for path in paths)}")
    return 1 if report.failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only what there are targets for")
    parser.add_argument(
        "--backend",
        action="append",
        choices=(QEMU, *DATA_PATHS),
        help=f"measure only this one; may be repeated ({QEMU} is the peer)",
    )
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="per run (%(default)s)")
    parser.add_argument("--only", default="", help="only workloads whose name contains this")
    parser.add_argument(
        "--cores",
        type=int,
        choices=(1, 2),
        default=1,
        help="1: guest and backend share a CPU (steadier); 2: one for each (%(default)s)",
    )
    parser.add_argument("--cpu", type=int, help="the backend's CPU (the quietest)")
    parser.add_argument("--size", type=int, default=256, help="MiB of each file (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where the files are made (bench/build)")
    parser.add_argument(
        "--qemu-poll-ns",
        type=int,
        default=0,
        help="poll-max-ns of QEMU's I/O thread; its own default is 32768, which costs CPU time "
        "(%(default)s)",
    )
    parser.add_argument(
        "--no-persistent", action="store_true", help="guests of xbd grant pages anew each time"
    )
    arguments = parser.parse_args()
    if arguments.repeat < 1 or arguments.seconds <= 0 or arguments.size < 1:
        parser.error("--repeat, --seconds and --size must be positive")
    return arguments


def _image_directory(arguments: argparse.Namespace) -> Path:
    directory: Path = arguments.dir or guest.BUILD
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    if not machine.supports_direct(directory):
        raise ValueError(f"{directory} is on a file system without O_DIRECT: choose another --dir")
    return directory.resolve()


def _session(
    arguments: argparse.Namespace, cpus: Cpus, directory: Path, console: Console
) -> Report:
    names = arguments.backend or [QEMU, *DATA_PATHS]
    if QEMU in names and QemuServer.binary() is None:
        raise RunFailed(
            "qemu-storage-daemon is not installed (Debian: qemu-system-common); "
            f"--backend {next(iter(DATA_PATHS))} measures without it"
        )
    workloads = [
        workload
        for workload in (QUICK if arguments.quick else FULL)
        if arguments.only in workload.name
    ]
    if not workloads:
        raise ValueError(f"no workload has {arguments.only!r} in its name")
    environment = machine.describe(QemuServer.binary(), directory)
    images = {image: directory / f"{image.value}.img" for image in Image}
    for path in images.values():
        guest.fill(path, arguments.size * MIB)
    with ExitStack() as stack:
        # Sockets and the daemon's journal: in memory, and with short paths.
        shared_memory = Path("/dev/shm")
        runtime = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(
                    prefix="xbd-bench-", dir=shared_memory if shared_memory.is_dir() else None
                )
            )
        )
        servers: list[Server] = [
            QemuServer(runtime, images, arguments.qemu_poll_ns)
            if name == QEMU
            else XbdServer(name, runtime, images)
            for name in dict.fromkeys(names)
        ]
        for server in servers:
            stack.enter_context(server.running())
        session = _Measurement(arguments, cpus, images, servers)
        session.run(workloads, console)
    return Report(
        environment=environment,
        settings={
            "repetitions": arguments.repeat,
            "seconds per run": arguments.seconds,
            "MiB per file": arguments.size,
            "guest on CPU": cpus.guest,
            "backend on CPU": cpus.backend,
            "QEMU's poll-max-ns": arguments.qemu_poll_ns,
            "persistent grants": not arguments.no_persistent,
        },
        peer=QEMU if QEMU in names else None,
        results=session.results,
        failures=session.failures,
    )


class _Measurement:
    """Takes the servers through the workloads, in turns."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        cpus: Cpus,
        images: dict[Image, Path],
        servers: Sequence[Server],
    ) -> None:
        self.results: dict[Workload, dict[str, list[Figures | None]]] = {}
        self.failures: list[str] = []
        self._arguments = arguments
        self._cpus = cpus
        self._images = images
        self._servers = servers
        self._dead: set[Server] = set()
        self._runs = 0

    def run(self, workloads: Sequence[Workload], console: Console) -> None:
        """Fill `results` and `failures`."""
        total = len(workloads) * self._arguments.repeat * len(self._servers)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=total)
            for workload in workloads:
                by_name: dict[str, list[Figures | None]] = {s.name: [] for s in self._servers}
                self.results[workload] = by_name
                for repetition in range(self._arguments.repeat):
                    for server in self._in_turn(repetition):
                        progress.update(task, description=f"{workload.name}: {server.name}")
                        by_name[server.name].append(self._measure(server, workload))
                        progress.advance(task)

    def _in_turn(self, repetition: int) -> Sequence[Server]:
        """Each begins as often as the others do."""
        first = repetition % len(self._servers)
        return [*self._servers[first:], *self._servers[:first]]

    def _measure(self, server: Server, workload: Workload) -> Figures | None:
        if server in self._dead:
            return None
        self._runs += 1
        path = self._images[workload.image]
        if workload.image.through_cache:
            machine.read_into_cache(path)
        else:
            machine.drop_from_cache(path)
        try:
            return server.run(
                workload,
                seconds=self._arguments.seconds,
                seed=(self._runs - 1) % _LAST_SEED + 1,
                cpus=self._cpus,
                more=["--no-persistent"] if self._arguments.no_persistent else [],
            )
        except RunFailed as error:
            self.failures.append(f"{workload.name}, {server.name}: {error}")
            if server.ended:
                self._dead.add(server)
            return None


if __name__ == "__main__":
    raise SystemExit(main())
