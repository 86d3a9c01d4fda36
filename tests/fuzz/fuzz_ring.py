"""Random hostile guests for as long as told: ``python tests/fuzz/fuzz_ring.py --seconds 60``.

Hosts with even seeds are served in Python, those with odd ones by the native data path, if there is
one.  Prints one line for each find, with the seed that repeats it (``--seed N --seconds 0``), and
one with the number of rounds in the end.  Ends with status 1 if there were finds.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

import trio

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "hostile"), str(TESTS / "backend")]

from data_paths import NATIVE, PYTHON, threads_of  # noqa: E402
from hostile_world import ATTACKER_PAGES, battlefield  # noqa: E402
from ring_fuzz import attack  # noqa: E402
from scribbling import scribble  # noqa: E402

from xbd.core.datapath import native  # noqa: E402

ATTACKS_PER_HOST = 25
"""One host meets so many guests before the next: what one leaves behind may hurt another."""


async def one_host(seed: int, until: float) -> tuple[int, int]:
    """Attacks and requests of one round."""
    dice = random.Random(seed)
    attacks = requests = 0
    path = NATIVE if seed % 2 and native.why_not is None else PYTHON
    with (
        tempfile.TemporaryDirectory() as name,
        threads_of(path, domain_pages=ATTACKER_PAGES) as threads,
    ):
        async with battlefield(Path(name) / "host", threads) as field:
            while attacks < ATTACKS_PER_HOST and (not attacks or time.monotonic() < until):
                how = attack if dice.random() < 0.5 else scribble
                requests += (await how(field, random.Random(dice.random()), 6)).requests
                attacks += 1
    return attacks, requests


def main() -> int:
    parser = argparse.ArgumentParser(description="attack the data path with random guests")
    parser.add_argument(
        "--seconds", type=float, default=float(os.environ.get("XBD_FUZZ_SECONDS", "60"))
    )
    parser.add_argument("--seed", type=int, default=None, help="where to begin (default: random)")
    arguments = parser.parse_args()
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    begin = time.monotonic()
    until = begin + arguments.seconds
    rounds = attacks = requests = finds = 0
    while not rounds or time.monotonic() < until:
        try:
            # A find is repeated by its seed alone, however much time there is.
            end = until if arguments.seconds else float("inf")
            more_attacks, more_requests = trio.run(one_host, seed, end)
            attacks += more_attacks
            requests += more_requests
        except Exception:
            finds += 1
            print(f"FOUND with --seed {seed} --seconds 0:", flush=True)
            traceback.print_exc(file=sys.stdout)
        rounds += 1
        seed += 1
    seconds = time.monotonic() - begin
    print(f"{rounds} hosts, {attacks} guests, {requests} requests, {finds} finds, {seconds:.0f} s")
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())
