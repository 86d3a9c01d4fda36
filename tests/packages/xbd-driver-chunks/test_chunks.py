"""The driver keeps the contract."""

from pathlib import Path

from xbd_driver_chunks import DRIVER

from xbd.core.driver.testing import check_driver


async def test_conformance(tmp_path: Path) -> None:
    await check_driver(DRIVER, f"chunks:{tmp_path}?size=3M")
