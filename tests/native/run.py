"""The C tests: ``make test-native``, or ``python tests/native/run.py --help``.

Compiles them with AddressSanitizer and UndefinedBehaviorSanitizer, with ThreadSanitizer, and with
neither; runs each; then looks for lost wake-ups, and whether the faults in `mutants.py` are found.
Needs no more than Python itself, make, and clang or gcc.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from mutants import MUTANTS, Mutant

HERE: Final = Path(__file__).resolve().parent / "c"
SOURCES: Final = HERE.parents[2] / "xbd" / "core" / "datapath" / "native" / "src"
SANITIZERS: Final = ("address,undefined", "thread")
PARTS: Final = ("checks", "stress", "mutants")
STUCK_SECONDS: Final = 2
"""How long somebody must have slept to be found in a mutant; the stress test proper is patient."""
MUTANT_SECONDS: Final = 120
CONTROL_SECONDS: Final = 4
NO_LEAKS: Final = "LeakSanitizer has encountered a fatal error"


class Failure(Exception):
    """Something was found, or can't be compiled."""


def build_of(sanitizer: str) -> Path:
    return HERE / "build" / (sanitizer.replace(",", "-") or "plain")


# -- compilers ----------------------------------------------------------------------------------


def compiles(compiler: str, *flags: str) -> bool:
    if shutil.which(compiler) is None:
        return False
    with tempfile.TemporaryDirectory() as name:
        command = [compiler, *flags, "-x", "c", "-", "-o", f"{name}/program"]
        source = "#include <stdlib.h>\nint main(void) { return 0; }\n"
        return not subprocess.run(command, input=source.encode(), capture_output=True).returncode


def choose_compiler() -> str:
    """One with both sanitizers' libraries, clang before gcc."""
    wanted = os.environ.get("CC")
    for compiler in (wanted,) if wanted else ("clang", "gcc"):
        if all(compiles(compiler, f"-fsanitize={sanitizer}") for sanitizer in SANITIZERS):
            return compiler
    sys.exit(
        "make: the C tests need a compiler with its sanitizers; from Debian: apt-get install "
        "gcc libc6-dev, or clang libc6-dev and the libclang-rt-*-dev of clang's version"
    )


def make(compiler: str, sanitizer: str, *arguments: str) -> None:
    command = ["make", "-s", "-C", str(HERE), "-j", str(os.cpu_count() or 1), f"CC={compiler}"]
    made = subprocess.run([*command, f"SANITIZER={sanitizer}", *arguments], capture_output=True)
    if made.returncode:
        raise Failure(made.stderr.decode())


# -- running ------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "ASAN_OPTIONS": "detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
        **more,
    }


def run(build: Path, *command: str, seconds: int = 600) -> tuple[int, str, str]:
    """Status and output of one of the programs.  If it takes too long, it is ended."""
    arguments = [str(build / command[0]), *command[1:]]
    for leaks in ("1", "0"):
        process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(LSAN_OPTIONS=f"detect_leaks={leaks}"),
        )
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # its children die with it
            out, err = process.communicate()
            raise Failure(
                f"{' '.join(command)} took more than {seconds} seconds\n{out}{err}"
            ) from None
        if NO_LEAKS not in err:
            break
        print("    (leaks can't be looked for in this environment)", flush=True)
    return process.returncode, out, err


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def say(began: float, what: str, result: str) -> None:
    print(f"  {what:<58} {time.monotonic() - began:6.1f} s  {result}", flush=True)


def check(sanitizer: str, *command: str) -> None:
    began = time.monotonic()
    status, out, err = run(build_of(sanitizer), *command)
    if status:
        raise Failure(f"{sanitizer or 'plain'}: {' '.join(command)}\n{out}{err}")
    say(began, f"{sanitizer or 'plain'}: {' '.join(command)}", last_line(out))


# -- the parts ----------------------------------------------------------------------------------


def run_checks() -> None:
    """What is not for two processors alone runs two at a time."""
    every = ("", *SANITIZERS)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(check, sanitizer, "connection_test") for sanitizer in reversed(every)]
        for each in runs:
            each.result()
    for sanitizer, hits in zip(every, ("100000", "50000", "20000"), strict=True):
        check(sanitizer, "extents_threads", hits)
    for sanitizer, claims in zip(every, ("30000", "20000", "10000"), strict=True):
        check(sanitizer, "claims_threads", claims)
        check(sanitizer, "copy_test", claims)
    for sanitizer in SANITIZERS:
        check(sanitizer, "stress_test", "--sleeps", "150000")


def run_stress(sleeps: int) -> None:
    print(f"lost wake-ups, {sleeps} sleeps:", flush=True)
    status = subprocess.run([build_of("") / "stress_test", "--sleeps", str(sleeps)]).returncode
    if status:
        raise Failure("the stress test has found something")


def make_mutant(compiler: str, mutant: Mutant, directory: Path, program: str) -> Path:
    text = (SOURCES / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise Failure(f"{mutant.file} has changed: this mutant is of another text: {mutant.name}")
    sources, build = directory / "src", directory / "build"
    sources.mkdir()
    (sources / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    shutil.copytree(build_of(mutant.sanitizer), build)
    (build / mutant.file).with_suffix(".o").unlink()
    make(compiler, mutant.sanitizer, f"MUTATED={sources}", f"BUILD={build}", f"{build}/{program}")
    return build


def stress_command(scenario: int, seconds: int) -> tuple[str, ...]:
    return (
        *("stress_test", "--scenario", str(scenario), "--seconds", str(seconds)),
        *("--sleeps", "1000000000", "--stuck", str(STUCK_SECONDS)),
    )


def hunt(compiler: str, mutant: Mutant) -> bool:
    """Whether it is found."""
    command = mutant.command or stress_command(mutant.scenario, MUTANT_SECONDS)
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        build = make_mutant(compiler, mutant, Path(name), command[0])
        began = time.monotonic()
        status, out, err = run(build, *command)
    clues = [line for line in err.splitlines() if "FOUND" in line or "ERROR" in line]
    clues += [line for line in err.splitlines() if "WARNING: Thread" in line]
    say(
        began,
        mutant.name,
        (clues or [last_line(err)])[0] if status else f"NOT FOUND: {last_line(out)}",
    )
    return bool(status)


def run_mutants(compiler: str) -> None:
    """And nothing is found, as fast, where there is nothing to find."""
    print("mutants, and first where nothing is wrong:", flush=True)
    for scenario in sorted({mutant.scenario for mutant in MUTANTS if not mutant.command}):
        check("", *stress_command(scenario, CONTROL_SECONDS))
    missed = [mutant for mutant in MUTANTS if not hunt(compiler, mutant)]
    # Some depend on what two processors do at the same time, which others' work can hide.
    missed = [mutant for mutant in missed if not hunt(compiler, mutant)]
    if missed:
        raise Failure("not found: " + "; ".join(mutant.name for mutant in missed))
    print(f"{len(MUTANTS)} mutants, all found", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="test the native data path's C")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument(
        "--sleeps", type=int, default=2_000_000, help="of the stress test (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    parts = options.parts or PARTS
    compiler = choose_compiler()
    began = time.monotonic()
    try:
        print(f"compiling with {compiler}", flush=True)
        for sanitizer in ("", *SANITIZERS):
            make(compiler, sanitizer)
        if "checks" in parts:
            run_checks()
        if "stress" in parts:
            run_stress(options.sleeps)
        if "mutants" in parts:
            run_mutants(compiler)
    except Failure as failure:
        print(f"FAILED: {failure}", flush=True)
        return 1
    print(f"the C tests have passed, in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
