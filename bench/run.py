"""Measures xbd beside QEMU: the same guest, the same files, the same minutes.

Both are driven by one closed loop in C (and over NBD by fio), taking turns in each repetition,
since machines are shared and noisy: the ratios of neighbouring runs count.  Results go to
bench/results/.

It ends with 0 unless something could not be run or data was wrong; a missed target is a result.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import guest, images, machine, plots
from harness.busy import BusyPart
from harness.depth1 import Depth1Part
from harness.extents import ExtentsPart
from harness.guest import RunFailed
from harness.idle import IdlePart
from harness.machine import Cpus
from harness.many import ManyPart
from harness.nbd import NbdPart
from harness.parts import Part, Session, Settings
from harness.publish import publish
from harness.qcow2 import Qcow2Part
from harness.raw import RawPart
from harness.report import Report
from harness.servers import QemuServer
from harness.workloads import MIB
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SOURCES = Path(__file__).resolve().parent.parent
RESULTS = SOURCES / "bench/results"
PUBLISHED = SOURCES / "docs/performance"
PARTS: dict[str, tuple[type[Part], ...]] = {
    "raw": (RawPart,),
    "depth1": (Depth1Part,),
    "busy": (BusyPart,),
    "many": (ManyPart,),
    "idle": (IdlePart,),
    "extents": (ExtentsPart,),
    "qcow2": (Qcow2Part, NbdPart),
}
_PLAIN_WIDTH = 150
"""Columns when the output is not a terminal."""
_REPEAT, _QUICK_REPEAT = 5, 3


def main() -> int:
    """Run everything; the exit status."""
    arguments = _arguments()
    if arguments.qemu is not None:
        os.environ["PATH"] = f"{arguments.qemu.resolve()}:{os.environ['PATH']}"
    console = Console(width=None if Console().is_terminal else _PLAIN_WIDTH)
    try:
        if arguments.publish:
            for path in publish(RESULTS, PUBLISHED, SOURCES):
                console.print(f"Written to {path}", highlight=False)
            return 0
        with _settings(arguments) as settings:
            report = _measure(arguments, settings, console)
    except (RunFailed, ValueError, OSError) as error:
        console.print(f"[bold red]bench:[/] {error}", highlight=False)
        return 1
    report.show(console)
    stem = time.strftime("%Y%m%d-%H%M%S")
    paths = report.save(RESULTS, stem)
    console.print(f"Written to {' and '.join(str(path) for path in paths)}")
    if plots.available():
        pictures = plots.draw(report.sessions, RESULTS / stem)
        console.print(f"{len(pictures)} plots in {RESULTS / stem}" if pictures else "no plots")
    else:
        console.print(plots.MISSING, markup=False)
    return 1 if report.failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--raw", action="store_true", help="plain files against QEMU")
    parser.add_argument(
        "--depth1", action="store_true", help="one request at a time on two cores, spinning"
    )
    parser.add_argument("--busy", action="store_true", help="beside a thread that computes")
    parser.add_argument("--many", action="store_true", help="100 disks, one request each")
    parser.add_argument("--idle", action="store_true", help="1000 disks that nobody uses")
    parser.add_argument("--extents", action="store_true", help="disks in many extents")
    parser.add_argument("--qcow2", action="store_true", help="qcow2 images against QEMU")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only what there are targets for, of plain files unless a part is named",
    )
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="measure only this one, by its name in the tables; may be repeated",
    )
    parser.add_argument(
        "--repeat",
        type=int,
        help=f"repetitions ({_REPEAT}; parts named and --quick: {_QUICK_REPEAT})",
    )
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
    parser.add_argument("--size", type=int, default=256, help="MiB of most files (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where the files are made (bench/build)")
    parser.add_argument(
        "--qemu",
        type=Path,
        metavar="DIR",
        help="the directory with QEMU's commands, as bench/newest-qemu prints it (those installed)",
    )
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
    parser.add_argument(
        "--publish",
        action="store_true",
        help="measure nothing: copy the newest tables and plots to docs/performance/",
    )
    arguments = parser.parse_args()
    named = [name for name in PARTS if getattr(arguments, name)]
    if arguments.repeat is None:
        arguments.repeat = _QUICK_REPEAT if named and arguments.quick else _REPEAT
    arguments.parts = named or (["raw"] if arguments.quick else list(PARTS))
    if arguments.repeat < 1 or arguments.seconds <= 0 or arguments.size < 1:
        parser.error("--repeat, --seconds and --size must be positive")
    return arguments


@contextmanager
def _settings(arguments: argparse.Namespace) -> Iterator[Settings]:
    cpus = Cpus.choose(arguments.cores, arguments.cpu)
    guest.build()
    shared_memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(prefix="images-", dir=_directory(arguments)) as files,
        # Sockets and the daemon's journal: in memory, and with short paths.
        tempfile.TemporaryDirectory(
            prefix="xbd-bench-", dir=shared_memory if shared_memory.is_dir() else None
        ) as runtime,
    ):
        yield Settings(
            cpus=cpus,
            seconds=arguments.seconds,
            repeat=arguments.repeat,
            size=arguments.size * MIB,
            images=Path(files),
            runtime=Path(runtime),
            qemu_poll_ns=arguments.qemu_poll_ns,
            guest_options=("--no-persistent",) if arguments.no_persistent else (),
            quick=arguments.quick,
        )


def _directory(arguments: argparse.Namespace) -> Path:
    directory: Path = arguments.dir or guest.BUILD
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    if not machine.supports_direct(directory):
        raise ValueError(f"{directory} is on a file system without O_DIRECT: choose another --dir")
    return directory.resolve()


def _measure(arguments: argparse.Namespace, settings: Settings, console: Console) -> Report:
    environment = machine.describe(QemuServer.binary(), settings.images)
    sessions = [
        session
        for name in arguments.parts
        for part in PARTS[name]
        if (session := _session(arguments, part(settings))).runs
    ]
    if not sessions:
        raise ValueError("no workload and backend are of that name")
    _look_for_qemu(sessions)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(session.runs for session in sessions))
        for session in sessions:
            session.run(progress, task)
    return Report(
        environment=environment,
        settings={
            "parts": " ".join(arguments.parts),
            "repetitions": settings.repeat,
            "seconds per run": settings.seconds,
            "MiB per file": arguments.size,
            "guest on CPU": settings.cpus.guest,
            "backend on CPU": settings.cpus.backend,
            "QEMU's poll-max-ns": settings.qemu_poll_ns,
            "persistent grants": not arguments.no_persistent,
        },
        sessions=sessions,
    )


def _session(arguments: argparse.Namespace, part: Part) -> Session:
    workloads = [workload for workload in part.workloads() if arguments.only in workload.name]
    wanted = arguments.backend or part.backends
    return Session(part, workloads, [name for name in part.backends if name in wanted])


def _look_for_qemu(sessions: list[Session]) -> None:
    qemu = any("qemu" in name for session in sessions for name in session.backends)
    if qemu and QemuServer.binary() is None:
        raise RunFailed(
            "qemu-storage-daemon is not installed (Debian: qemu-system-common); "
            "--backend xbd measures without it"
        )
    missing = images.missing_tools()
    if missing and any(isinstance(session.part, Qcow2Part | NbdPart) for session in sessions):
        raise RunFailed(f"not installed: {', '.join(missing)} (Debian: qemu-utils)")


if __name__ == "__main__":
    raise SystemExit(main())
