"""Crashes of qcow2 images for as long as told: ``python tests/fuzz/crash_qcow2.py --seconds 60``.

Random operations on random images are recorded and crashes of them replayed, with failing hosts,
snapshots, new sizes and many threads among them; then processes are killed.  Prints a line for each
find, with what repeats it (``--only NAME --seed N --seconds 0``), and one with the numbers in the
end.  Ends with status 1 if there were finds.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import attrs

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "drivers" / "qcow2")]

from qcow2_crashes import KINDS, Judge, below_of, record  # noqa: E402
from qcow2_kills import Killer  # noqa: E402
from qcow2_power import stay_on  # noqa: E402
from qcow2_recipes import NAMED, Recipe  # noqa: E402
from qcow2_tape import some_fail  # noqa: E402

SNAPSHOTS = "NNPX"
MANY_KILLS = 20


def replay(recipe: Recipe, seed: int, directory: Path, counts: Counter[str]) -> None:
    """One recording and a hundred or two of its crashes."""
    chance = random.Random(seed)
    kinds = KINDS
    threads = chance.choice((1, 1, 1, 4))
    if threads == 1 and chance.random() < 0.3:
        kinds += "S"
    shared = not recipe.external and recipe.name not in ("1-bit", "luks", "luks-4k-over")
    if threads == 1 and shared and chance.random() < 0.3:
        kinds += SNAPSHOTS
    faults = some_fail if chance.random() < 0.3 else None
    if chance.random() < 0.1:  # room for clusters that the data path links by itself
        recipe = attrs.evolve(recipe, size=2 * recipe.size)
    recording = record(
        recipe,
        directory,
        seed,
        steps=chance.choice((10, 40, 80)) // threads,
        kinds=kinds,
        threads=threads,
        faults=faults,
        compress=threads == 1 and not recipe.external and chance.random() < 0.2,
    )
    counts["failed requests"] += recording.failures
    judge = Judge(recording, chance)
    try:
        judge.judge(2, places=60, reopen=0.03)
    finally:
        counts["states"] += judge.states
        counts["reopened"] += judge.reopened
        counts["checked by qemu-img"] += judge.checked_by_qemu
    counts["recordings"] += 1


def kill(recipe: Recipe, seed: int, directory: Path, counts: Counter[str]) -> None:
    """Processes one after the other on one image."""
    made = recipe.make(directory, seed)
    with Killer.start(made, below_of(made), seed) as killer:
        try:
            for _ in range(MANY_KILLS):
                killer.kill_one()
            killer.qemu_finds_leaks_at_most()
        finally:
            counts["kills"] += killer.kills


def main() -> int:
    parser = argparse.ArgumentParser(description="crash the qcow2 driver")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="where to begin (default: random)")
    parser.add_argument("--only", choices=sorted(NAMED), help="one kind of image")
    parser.add_argument("--kills", action="store_true", help="kill processes and nothing else")
    arguments = parser.parse_args()
    stay_on()
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    names = [arguments.only] if arguments.only else sorted(set(NAMED) - {"2M"})
    begin = time.monotonic()
    counts: Counter[str] = Counter()
    finds = 0
    while not counts or time.monotonic() < begin + arguments.seconds:
        chance = random.Random(seed)
        killing = arguments.kills or chance.random() < 0.1
        recipe = NAMED[chance.choice(names)]
        can_be_killed = not (recipe.encrypted or recipe.external)
        with tempfile.TemporaryDirectory() as name:
            try:
                work = kill if killing and can_be_killed else replay
                work(recipe, seed, Path(name), counts)
            except Exception:
                finds += 1
                kills = " --kills" if arguments.kills else ""
                print(f"FOUND with --only {recipe} --seed {seed} --seconds 0{kills}:", flush=True)
                traceback.print_exc(file=sys.stdout)
        counts["rounds"] += 1
        seed += 1
    seconds = time.monotonic() - begin
    told = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
    print(f"{told}; {counts['states'] / seconds:.0f} states/s; {finds} finds, {seconds:.0f} s")
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())
