"""What backends and toolstacks do often, in one transaction each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xbd.core.xenstore.base import Store, StoreReader


async def read_keys(reader: StoreReader, directory: str, keys: Iterable[str]) -> dict[str, str]:
    """The values of those `keys` in `directory` that exist."""
    found = {}
    for key in keys:
        value = await reader.read(f"{directory}/{key}")
        if value is not None:
            found[key] = value
    return found


async def read_together(store: Store, directory: str, keys: Iterable[str]) -> dict[str, str]:
    """`read_keys` at one point in time."""
    wanted = list(keys)

    async def body(reader: StoreReader) -> dict[str, str]:
        return await read_keys(reader, directory, wanted)

    return await store.transact(body)


async def write_together(store: Store, directory: str, values: Mapping[str, str]) -> None:
    """Write several keys in `directory`; others see all of them or none."""

    async def body(reader: StoreReader) -> None:
        for key, value in values.items():
            await reader.write(f"{directory}/{key}", value)

    await store.transact(body)


async def write_if_exists(store: Store, directory: str, values: Mapping[str, str]) -> bool:
    """The same, but only while `directory` exists; False if it does not.

    A backend must not bring a directory back to life that the toolstack has just removed.
    """

    async def body(reader: StoreReader) -> bool:
        if await reader.directory(directory) is None:
            return False
        for key, value in values.items():
            await reader.write(f"{directory}/{key}", value)
        return True

    return await store.transact(body)
