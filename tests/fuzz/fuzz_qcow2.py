"""Hostile qcow2 images for as long as told: ``python tests/fuzz/fuzz_qcow2.py --seconds 60``.

QEMU makes images with every feature; each round damages one of them and takes it through all that
xbd does with images.  Finds are: an exception that is not meant for people, too much time, memory
or room on the host, and a clean image that does not stay clean or reads as something else.

Prints for each find what was damaged and done, the seed that repeats it (``--seed N --count 1``)
and where the image is kept, and one line with the number of rounds in the end.  Ends with status 1
if there were finds.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from qcow2_images import RECIPES, Field, Seeds, damage, interesting
from qcow2_ordeal import Ordeal, limited, no_power_cuts

from xbd.core.units import MIB

MOST_MEMORY = 768 * MIB
"""More address space than at the start; a snapshot table alone may have 64 MiB."""

MOST_SECONDS = 30
"""For one image."""


class Fuzzer:
    """Goes through rounds; each is made by its number alone."""

    def __init__(self, work: Path, keep: Path, names: list[str], seeds: Seeds) -> None:
        """`work` is empty, finds go to `keep`."""
        self._seeds = seeds
        self._work = work
        self._keep = keep
        self._names = names
        self._fields: dict[str, list[Field]] = {}
        self.finds = 0

    def make_seeds(self) -> None:
        for name in self._names:
            self._fields[name] = interesting(self._seeds[name].path)

    def round(self, seed: int) -> None:
        """One image."""
        dice = random.Random(seed)
        name = dice.choice(self._names)
        scratch = self._work / "scratch"
        scratch.mkdir()
        image = scratch / "image"
        kept = self._seeds.copy(name, image)
        done = damage(image, dice, self._fields[name], dice.choice((0, 1, 1, 1, 2, 2, 3, 5, 8)))
        ordeal = Ordeal(image, self._seeds[name], dice, scratch)
        try:
            with limited(MOST_SECONDS):
                ordeal.run()
        except Exception:
            self.finds += 1
            self._keep.mkdir(parents=True, exist_ok=True)
            target = self._keep / f"{name}-{seed}.qcow2"
            shutil.copyfile(kept.path, target)
            print(f"FOUND with --seed {seed} --count 1, kept as {target}:")
            print(f"  {name}: {'; '.join(done)}")
            print(f"  {'; '.join(ordeal.steps)}")
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        finally:
            shutil.rmtree(scratch)


def limit_memory() -> None:
    """So that what wants too much raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> int:
    parser = argparse.ArgumentParser(description="take damaged qcow2 images through everything")
    parser.add_argument(
        "--seconds", type=float, default=float(os.environ.get("XBD_FUZZ_SECONDS", "60"))
    )
    parser.add_argument("--count", type=int, default=None, help="rounds, instead of a time")
    parser.add_argument("--seed", type=int, default=None, help="where to begin (default: random)")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-finds"), help="where finds go")
    parser.add_argument(
        "--image", action="append", choices=[recipe.name for recipe in RECIPES], help="only these"
    )
    parser.add_argument(
        "--seeds", type=Path, default=None, help="where the whole images are, or are made and kept"
    )
    arguments = parser.parse_args()
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory(prefix="fuzz-qcow2-") as work, no_power_cuts():
        names = arguments.image or [recipe.name for recipe in RECIPES]
        directory = arguments.seeds or Path(work) / "seeds"
        directory.mkdir(exist_ok=True)
        fuzzer = Fuzzer(Path(work), arguments.keep, names, Seeds(directory))
        fuzzer.make_seeds()
        limit_memory()
        begin = time.monotonic()
        rounds = 0
        while (
            rounds < arguments.count
            if arguments.count is not None
            else not rounds or time.monotonic() < begin + arguments.seconds
        ):
            fuzzer.round(seed + rounds)
            rounds += 1
        seconds = time.monotonic() - begin
    print(f"{rounds} images from seed {seed}, {fuzzer.finds} finds, {seconds:.0f} s")
    return 1 if fuzzer.finds else 0


if __name__ == "__main__":
    sys.exit(main())
