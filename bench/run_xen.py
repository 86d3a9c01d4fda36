"""Measures xbd beside Xen's other backends: the same Linux guest, the same files, one boot.

Xen, its dom0 and the guest are emulated (see tests/xen/), so only ratios mean something.  The
backends take turns in each repetition, and the ratios of neighbouring runs count.  Results go to
bench/results/.

It ends with 0 unless something could not be run; a missed target is a result.
"""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path

from harness import machine, xen_host
from harness.guest import RunFailed
from harness.parts import Session
from harness.publish import XEN, publish
from harness.report import Report, Section
from harness.xen import NATIVE, PYTHON
from harness.xen_host import XenHost
from harness.xen_sections import profiles, services
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SOURCES = Path(__file__).resolve().parent.parent
RESULTS = SOURCES / "bench/results"
PUBLISHED = SOURCES / "docs/performance"
SUITE = "trixie"
_PLAIN_WIDTH = 150
"""Columns when the output is not a terminal."""


def main() -> int:
    """Run everything; the exit status."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the lab must not be left running
    console = Console(width=None if Console().is_terminal else _PLAIN_WIDTH)
    try:
        if arguments.publish:
            for path in publish(RESULTS, PUBLISHED, SOURCES, XEN):
                console.print(f"Written to {path}", highlight=False)
            return 0
        report = _measure(arguments, console)
    except (RunFailed, ValueError, OSError) as error:
        console.print(f"[bold red]bench:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    report.show(console)
    paths = report.save(RESULTS, time.strftime(f"{XEN.prefix}%Y%m%d-%H%M%S"))
    console.print(f"Written to {' and '.join(str(path) for path in paths)}")
    return 1 if report.failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="repetitions (%(default)s)")
    parser.add_argument(
        "--python-repeat",
        type=int,
        default=1,
        help="of the data path in Python, for the record; 0: leave it out (%(default)s)",
    )
    parser.add_argument("--seconds", type=int, default=4, help="per run (%(default)s)")
    parser.add_argument("--only", default="", help="only workloads whose name contains this")
    parser.add_argument("--size", type=int, default=128, help="MiB of a file (%(default)s)")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="tell where dom0's time goes: at depth 32, or in what --only names",
    )
    parser.add_argument(
        "--profile-seconds", type=int, default=10, help="per run of that (%(default)s)"
    )
    parser.add_argument(
        "--limit", type=int, default=7200, help="seconds until the lab is ended (%(default)s)"
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="measure nothing: copy the newest tables to docs/performance/",
    )
    arguments = parser.parse_args()
    if min(arguments.repeat, arguments.seconds, arguments.size, arguments.profile_seconds) < 1:
        parser.error("--repeat, --seconds, --size and --profile-seconds must be positive")
    return arguments


def _measure(arguments: argparse.Namespace, console: Console) -> Report:
    environment = machine.describe(None, SOURCES) | {"emulator": xen_host.emulator()}
    for other in ("qemu-storage-daemon", "file system"):
        del environment[other]
    console.print("Booting Xen, emulated; an image that is not in the cache takes minutes more.")
    with xen_host.running(
        SUITE, arguments.size, arguments.limit, profile=arguments.profile
    ) as host:
        environment |= host.order("describe")
        sessions, sections = _sessions(arguments, host, console)
    return Report(
        environment=environment,
        settings={
            "repetitions": arguments.repeat,
            "of xbd python": arguments.python_repeat,
            "seconds per run": arguments.seconds,
            "MiB per file": arguments.size,
        },
        sessions=sessions,
        title="Benchmark on Xen, emulated: only ratios mean something",
        sections=sections,
    )


def _sessions(
    arguments: argparse.Namespace, host: XenHost, console: Console
) -> tuple[list[Session], list[Section]]:
    plan = [(kind, arguments.repeat) for kind in NATIVE]
    if arguments.python_repeat:
        plan += [(kind, arguments.python_repeat) for kind in PYTHON]
    sessions = []
    for kind, repeat in plan:
        part = kind(host, repeat, arguments.seconds)
        workloads = [workload for workload in part.workloads() if arguments.only in workload.name]
        if workloads:
            sessions.append(Session(part, workloads, part.backends))
    if not sessions:
        raise ValueError("no workload is of that name")
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    sections: list[Section] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(session.runs for session in sessions))
        for session in sessions:
            try:
                session.run(progress, task)
                if session is sessions[0]:  # while the threads in C serve
                    progress.update(task, description="dom0 itself")
                    sections.append(services(host, arguments.repeat))
                    if arguments.profile:
                        sections.extend(profiles(host, arguments.profile_seconds, arguments.only))
            except RunFailed as error:  # what has been measured is told
                session.failures.append(f"{session.part.title}: {error}")
    return sessions, sections


if __name__ == "__main__":
    raise SystemExit(main())
