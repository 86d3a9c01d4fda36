"""The conformance suite: what every driver must do, as one call in the driver's own tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from xbd.core.driver.api import Concurrency, DriverDescriptor
from xbd.core.driver.open import DeviceMaker
from xbd.core.driver.options import parse_options
from xbd.core.driver.registry import check_descriptor
from xbd.core.driver.spec import DiskSpec
from xbd.core.driver.testing import checks_basic, checks_hostile, checks_random
from xbd.core.driver.testing.bench import Bench

CHECKS: Final[tuple[Callable[[Bench], Awaitable[None]], ...]] = (
    checks_basic.check_promises,
    checks_basic.check_reading,
    checks_basic.check_writing,
    checks_basic.check_zeroes,
    checks_basic.check_discard,
    checks_basic.check_block_status,
    checks_basic.check_resize,
    checks_basic.check_snapshots,
    checks_basic.check_reopening,
    checks_basic.check_read_only,
    checks_basic.check_closing,
    checks_hostile.check_kept_buffers,
    checks_hostile.check_cancelled_reads,
    checks_hostile.check_cancelled_changes,
    checks_hostile.check_cancelled_flush,
    checks_hostile.check_parallel,
    checks_hostile.check_no_space,
    checks_random.check_random,
)

SECONDS_PER_CHECK: Final = 120.0
"""After this a check has failed: the driver hangs."""


async def check_block_device(
    make: DeviceMaker,
    *,
    concurrency: Concurrency = Concurrency.PARALLEL,
    make_full: DeviceMaker | None = None,
    volatile: bool = False,
    examples: int = 50,
) -> None:
    """Raise `AssertionError` if a device breaks the contract of `BlockDevice`.

    `make(context)` opens the disk under test, always the same one, of 64 KiB or more (1 MiB is
    good); its content is lost.  `make_full(context)`, if given, opens a disk whose storage has
    less space than its size.  `volatile`: the content does not outlive the closing.  `examples`:
    how many random scripts are played.
    """
    bench = Bench(make, concurrency, make_full, volatile, examples)
    for check in CHECKS:
        try:
            with trio.fail_after(SECONDS_PER_CHECK):
                await check(bench)
        except Exception as error:
            name = getattr(check, "__name__", "check").removeprefix("check_")
            error.add_note(f"conformance check {name!r}: {check.__doc__}")
            raise


async def check_driver(descriptor: DriverDescriptor[Any], disk: str, **options: Any) -> None:
    """`check_descriptor`, then `check_block_device` on a disk written as ``DRIVER:PATH?...``.

    `options` are those of `check_block_device`.
    """
    check_descriptor(descriptor.name, descriptor)
    parsed = parse_options(descriptor.options, DiskSpec.parse(disk).texts())
    await check_block_device(
        lambda context: descriptor.open(context, parsed),
        concurrency=descriptor.concurrency,
        **options,
    )
