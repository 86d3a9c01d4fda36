"""The native data path's C under libFuzzer: ``python tests/fuzz/fuzz_native.py --seconds 60``.

Compiles the fuzzers in `native/` with clang and its sanitizers, and gives each its share of the
time, with two processes that learn from each other.  Without clang it says so, and that is all.

Prints for each find what was said, and where the input is kept that repeats it; one line for each
fuzzer, and one with the number of runs in the end.  Ends with status 1 if there were finds.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent / "native"
TARGETS: Final = ("fuzz_ring", "fuzz_extents", "fuzz_connection")
PROCESSES: Final = 2
MOST_SECONDS: Final = 20
"""For one input."""
PATIENCE: Final = 120
"""How much longer than told a fuzzer may take."""
LAST_LINES: Final = 45
NO_LEAKS: Final = "LeakSanitizer has encountered a fatal error"


class Process:
    """Of a fuzzer; what it says goes to a file, since nobody may be reading."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        self.output = ""

    def end(self, seconds: float) -> bool:
        """Whether all went well."""
        late = ""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            late = f"did not end in {seconds} seconds"
        self.output = self._log.read_text(errors="replace") + late
        return not self._process.returncode

    @property
    def runs(self) -> int:
        found = re.findall(r"number_of_executed_units: (\d+)", self.output)
        return int(found[-1]) if found else 0


class Fuzzer:
    """One of the programs, and what it has learnt."""

    def __init__(self, target: str, work: Path, keep: Path) -> None:
        """`work` is empty, finds go to `keep`."""
        self.target = target
        self._keep = keep
        self._artifacts = work / "artifacts"
        self._corpus = work / "corpus"
        self._artifacts.mkdir()
        self._corpus.mkdir()
        self._logs = 0
        self._leaks = True
        first = self._begin("-runs=1")
        first.end(PATIENCE)
        self._leaks = NO_LEAKS not in first.output

    def run(self, seconds: float, seed: int) -> tuple[int, int]:
        """Runs and finds."""
        share = max(1, round(seconds))
        processes = [
            self._begin(f"-max_total_time={share}", f"-seed={(seed + i) % (1 << 32) or 1}")
            for i in range(PROCESSES)
        ]
        finds = [process for process in processes if not process.end(share + PATIENCE)]
        for process in finds:
            self._tell(process.output)
        return sum(process.runs for process in processes), len(finds)

    def _begin(self, *options: str) -> Process:
        seeds = HERE / "seeds" / self.target
        command = [str(HERE / "build" / self.target), *options, f"-timeout={MOST_SECONDS}"]
        command += ["-print_final_stats=1", f"-artifact_prefix={self._artifacts}/"]
        environment = dict(os.environ)
        if not self._leaks:
            command.append("-detect_leaks=0")
            environment["ASAN_OPTIONS"] = "detect_leaks=0"
        directories = [self._corpus, *([seeds] if seeds.is_dir() else ())]
        self._logs += 1
        log = self._artifacts.parent / f"log-{self._logs}"
        return Process([*command, *map(str, directories)], environment, log)

    def _tell(self, output: str) -> None:
        said = [line for line in output.splitlines() if not re.match(r"#\d+\s", line)]
        print(f"FOUND by {self.target}:", *said[-LAST_LINES:], sep="\n  ")
        for name in re.findall(r"Test unit written to (\S+)", output):
            self._keep.mkdir(parents=True, exist_ok=True)
            kept = self._keep / f"{self.target}-{Path(name).name}"
            shutil.copyfile(name, kept)
            print(f"  repeat it: {HERE / 'build' / self.target} {kept}")
        sys.stdout.flush()


def is_there() -> bool:
    """Whether there is a clang with libFuzzer and the sanitizers."""
    if shutil.which("clang") is None or shutil.which("make") is None:
        return False
    with tempfile.TemporaryDirectory() as name:
        command = ["clang", "-fsanitize=fuzzer,address,undefined", "-x", "c", "-"]
        source = "int LLVMFuzzerTestOneInput(const char *data, __SIZE_TYPE__ size);\n"
        source += "int LLVMFuzzerTestOneInput(const char *data, __SIZE_TYPE__ size)\n"
        source += "{ return size && !data; }\n"
        made = subprocess.run(
            [*command, "-o", f"{name}/program"], input=source, text=True, capture_output=True
        )
        return not made.returncode


def fuzz(seconds: float, seed: int, keep: Path, targets: Sequence[str]) -> int:
    """Finds."""
    began = time.monotonic()
    runs = finds = 0
    subprocess.run(["make", "-s", "-C", str(HERE), f"-j{PROCESSES}", *targets], check=True)
    until = time.monotonic() + seconds
    for i, target in enumerate(targets):
        share = max(0, until - time.monotonic()) / (len(targets) - i)
        with tempfile.TemporaryDirectory(prefix=f"{target}-") as work:
            more_runs, more_finds = Fuzzer(target, Path(work), keep).run(share, seed)
        print(f"  {target}: {more_runs} runs, {more_finds} finds", flush=True)
        runs += more_runs
        finds += more_finds
    taken = time.monotonic() - began
    print(f"{len(targets)} fuzzers from seed {seed}, {runs} runs, {finds} finds, {taken:.0f} s")
    return finds


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzz the native data path's C")
    parser.add_argument(
        "--seconds", type=float, default=float(os.environ.get("XBD_FUZZ_SECONDS", "60"))
    )
    parser.add_argument("--seed", type=int, default=None, help="where to begin (default: random)")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-finds"), help="where finds go")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only these")
    arguments = parser.parse_args()
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    if not is_there():
        print(
            "fuzz_native: the C is not fuzzed, for want of clang with libFuzzer; from Debian: "
            "apt-get install clang libclang-rt-dev make"
        )
        return 0
    targets = arguments.target or TARGETS
    return 1 if fuzz(arguments.seconds, seed, arguments.keep, targets) else 0


if __name__ == "__main__":
    sys.exit(main())
