"""What every XenStore must do for us: run against the embedded one and, in the lab, against Xen's.

Needs pytest and pytest-trio only.  Touches nothing outside ``/tool/xbd-test`` and cleans up.
A test class inherits `StoreContract` and has a fixture `store_path`.
"""

from __future__ import annotations

import errno
from contextlib import asynccontextmanager

import pytest
import trio

from xbd.core.errors import StoreError
from xbd.core.xenstore.client import StoreClient

SCRATCH = "/tool/xbd-test"
WITHIN_S = 20


@asynccontextmanager
async def scratch_store(path):
    async with StoreClient.connect(path) as store:
        await store.remove(SCRATCH)
        await store.mkdir(SCRATCH)
        try:
            yield store
        finally:
            with trio.move_on_after(5, shield=True):
                await store.remove(SCRATCH)


async def until_reported(watch, path):
    """Collect reports until `path` is among them (an XenStore may report more than asked)."""
    seen = []
    while path not in seen:
        seen += await watch.changed()
    return seen


class Calls:
    """Whether a listener was called."""

    def __init__(self):
        self.forget()

    def forget(self):
        self.some = trio.Event()

    def add(self):
        self.some.set()


@pytest.mark.trio
class StoreContract:
    async def test_values(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                assert await store.read(f"{SCRATCH}/a") is None
                await store.write(f"{SCRATCH}/a", "one")
                assert await store.read(f"{SCRATCH}/a") == "one"
                await store.write(f"{SCRATCH}/a", "")
                assert await store.read(f"{SCRATCH}/a") == ""

    @pytest.mark.parametrize("value", ["grüße", "\udcff\udc80", "a\nb\tc", "x" * 2000])
    async def test_any_value(self, store_path, value):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                await store.write(f"{SCRATCH}/v", value)
                assert await store.read(f"{SCRATCH}/v") == value

    async def test_parents_are_made(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                await store.write(f"{SCRATCH}/x/y/z", "1")
                assert await store.read(f"{SCRATCH}/x/y") == ""
                assert await store.directory(f"{SCRATCH}/x") == ["y"]

    async def test_directory_is_sorted(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                for name in ("b", "c", "a"):
                    await store.mkdir(f"{SCRATCH}/{name}")
                assert await store.directory(SCRATCH) == ["a", "b", "c"]
                assert await store.directory(f"{SCRATCH}/a") == []
                assert await store.directory(f"{SCRATCH}/missing") is None

    async def test_long_directory(self, store_path):
        names = sorted(f"a-rather-long-name-{number}" for number in range(400))
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                for name in names:
                    await store.mkdir(f"{SCRATCH}/{name}")
                assert await store.directory(SCRATCH) == names

    async def test_mkdir_keeps_the_value(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                await store.write(f"{SCRATCH}/a", "kept")
                await store.mkdir(f"{SCRATCH}/a")
                assert await store.read(f"{SCRATCH}/a") == "kept"

    async def test_remove_takes_all_below(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                await store.write(f"{SCRATCH}/a/b/c", "1")
                await store.remove(f"{SCRATCH}/a")
                assert await store.read(f"{SCRATCH}/a/b/c") is None
                assert await store.directory(SCRATCH) == []
                await store.remove(f"{SCRATCH}/a")
                await store.remove(f"{SCRATCH}/no/such/parent")

    async def test_permissions(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                assert await store.get_permissions(f"{SCRATCH}/a") is None
                await store.write(f"{SCRATCH}/a", "1")
                await store.set_permissions(f"{SCRATCH}/a", ["n0", "r0"])
                assert await store.get_permissions(f"{SCRATCH}/a") == ["n0", "r0"]
                await store.write(f"{SCRATCH}/a/b", "inherits")
                assert await store.get_permissions(f"{SCRATCH}/a/b") == ["n0", "r0"]

    @pytest.mark.parametrize(
        "path", ["", "/a//b", "/a/", "/sp ace", "/d.t", "/nul\0", "/" + "x" * 4000]
    )
    async def test_bad_paths(self, store_path, path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S), pytest.raises(StoreError) as caught:
                await store.read(path)
            assert caught.value.errno == errno.EINVAL

    async def test_too_long_a_value(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                with pytest.raises(StoreError) as caught:
                    await store.write(f"{SCRATCH}/a", "x" * 4096)
                assert caught.value.errno == errno.E2BIG
                assert await store.read(f"{SCRATCH}/a") is None

    async def test_domain_path(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                assert await store.domain_path(7) == "/local/domain/7"

    async def test_many_callers_at_once(self, store_path):
        async with scratch_store(store_path) as store:

            async def work(number):
                path = f"{SCRATCH}/{number}"
                for turn in range(5):
                    await store.write(path, f"{number}-{turn}")
                    assert await store.read(path) == f"{number}-{turn}"

            with trio.fail_after(WITHIN_S):
                async with trio.open_nursery() as nursery:
                    for number in range(100):
                        nursery.start_soon(work, number)

    async def test_cancelled_callers_do_no_harm(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                for number in range(100):
                    with trio.CancelScope() as scope:
                        scope.deadline = trio.current_time() + number / 100_000
                        await store.write(f"{SCRATCH}/a", str(number))
                        await store.transact(lambda reader: reader.read(f"{SCRATCH}/a"))
                assert store.generation == 1
                await store.write(f"{SCRATCH}/a", "end")
                assert await store.read(f"{SCRATCH}/a") == "end"

    async def test_many_nodes_at_once(self, store_path):
        # More than go over the wire in one piece.
        values = {f"{SCRATCH}/{number}": "x" * number for number in range(300)}
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                await store.write_all({})
                await store.write_all(values)
                assert await store.read_all([]) == []
                assert await store.read_all([SCRATCH, f"{SCRATCH}/no", *values]) == [
                    "",
                    None,
                    *values.values(),
                ]

    async def test_many_nodes_of_which_some_are_refused(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                values = {f"{SCRATCH}/a": "1", "/no blanks": "2", f"{SCRATCH}/c": "3"}
                with pytest.raises(StoreError) as caught:
                    await store.write_all(values)
                assert caught.value.errno == errno.EINVAL
                with pytest.raises(StoreError) as caught:
                    await store.read_all([SCRATCH, "/no blanks", SCRATCH])
                assert caught.value.errno == errno.EINVAL
                await store.write(f"{SCRATCH}/a", "all goes on")
                assert await store.read(f"{SCRATCH}/a") == "all goes on"

    async def test_transaction_commits(self, store_path):
        keys = [f"{SCRATCH}/{name}" for name in "abc"]

        async def write(reader):
            await reader.write_all({keys[0]: "1", keys[1]: "2"})
            return await reader.read_all(keys)

        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                assert await store.transact(write) == ["1", "2", None]
                assert await store.read_all(keys) == ["1", "2", None]

    async def test_transaction_is_invisible_until_committed(self, store_path):
        async with scratch_store(store_path) as store:

            async def body(reader):
                await reader.write(f"{SCRATCH}/a", "inside")
                assert await reader.read(f"{SCRATCH}/a") == "inside"
                assert await store.read(f"{SCRATCH}/a") is None
                return "result"

            with trio.fail_after(WITHIN_S):
                assert await store.transact(body) == "result"
                assert await store.read(f"{SCRATCH}/a") == "inside"

    async def test_transaction_aborts(self, store_path):
        async with scratch_store(store_path) as store:

            async def body(reader):
                await reader.write(f"{SCRATCH}/a", "inside")
                raise LookupError

            with trio.fail_after(WITHIN_S):
                with pytest.raises(LookupError):
                    await store.transact(body)
                assert await store.read(f"{SCRATCH}/a") is None

    async def test_transaction_conflict_runs_again(self, store_path):
        attempts = []
        async with scratch_store(store_path) as store:
            await store.write(f"{SCRATCH}/counter", "0")

            async def body(reader):
                value = await reader.read(f"{SCRATCH}/counter")
                attempts.append(value)
                if len(attempts) < 4:
                    await store.write(f"{SCRATCH}/counter", str(10 * len(attempts)))
                await reader.write(f"{SCRATCH}/counter", str(int(value) + 1))

            with trio.fail_after(WITHIN_S):
                await store.transact(body)
                assert attempts == ["0", "10", "20", "30"]
                assert await store.read(f"{SCRATCH}/counter") == "31"

    async def test_counting_together(self, store_path):
        async with scratch_store(store_path) as store:
            await store.write(f"{SCRATCH}/counter", "0")

            async def increment(reader):
                value = int(await reader.read(f"{SCRATCH}/counter"))
                await reader.write(f"{SCRATCH}/counter", str(value + 1))

            async def work():
                for _ in range(5):
                    await store.transact(increment)

            with trio.fail_after(WITHIN_S):
                async with trio.open_nursery() as nursery:
                    for _ in range(6):
                        nursery.start_soon(work)
                assert await store.read(f"{SCRATCH}/counter") == "30"

    async def test_watch_reports_itself_first(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                async with store.watch(f"{SCRATCH}/not-yet") as watch:
                    assert await watch.changed() == [f"{SCRATCH}/not-yet"]

    async def test_watch_hears_of_changes_below(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                async with store.watch(SCRATCH) as watch:
                    await watch.changed()
                    await store.write(f"{SCRATCH}/a/b", "1")
                    await until_reported(watch, f"{SCRATCH}/a/b")
                    await store.set_permissions(f"{SCRATCH}/a", ["n0", "r0"])
                    await until_reported(watch, f"{SCRATCH}/a")
                    await store.remove(f"{SCRATCH}/a")
                    await until_reported(watch, f"{SCRATCH}/a")

    async def test_watch_hears_of_a_removed_parent(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                await store.write(f"{SCRATCH}/a/b/c", "1")
                async with store.watch(f"{SCRATCH}/a/b/c") as watch:
                    await watch.changed()
                    await store.remove(f"{SCRATCH}/a")
                    await until_reported(watch, f"{SCRATCH}/a/b/c")

    async def test_watch_hears_a_transaction_once_committed(self, store_path):
        async def write(reader):
            await reader.write(f"{SCRATCH}/a", "1")
            await reader.write(f"{SCRATCH}/b", "2")

        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                async with store.watch(SCRATCH) as watch:
                    await watch.changed()
                    await store.transact(write)
                    seen = await until_reported(watch, f"{SCRATCH}/a")
                    if f"{SCRATCH}/b" not in seen:
                        await until_reported(watch, f"{SCRATCH}/b")

    async def test_watches_are_apart(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                async with store.watch(f"{SCRATCH}/a") as one, store.watch(f"{SCRATCH}/b") as two:
                    await one.changed()
                    await two.changed()
                    await store.write(f"{SCRATCH}/a", "1")
                    await store.write(f"{SCRATCH}/ab", "1")
                    assert await one.changed() == [f"{SCRATCH}/a"]
                    await store.write(f"{SCRATCH}/b", "1")
                    assert await two.changed() == [f"{SCRATCH}/b"]

    async def test_same_path_watched_twice(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                async with store.watch(f"{SCRATCH}/a") as one:
                    async with store.watch(f"{SCRATCH}/a") as two:
                        await one.changed()
                        await two.changed()
                        await store.write(f"{SCRATCH}/a", "1")
                        assert await one.changed() == await two.changed() == [f"{SCRATCH}/a"]
                    await store.write(f"{SCRATCH}/a", "2")
                    assert await one.changed() == [f"{SCRATCH}/a"]

    async def test_flood_is_coalesced(self, store_path):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                async with store.watch(SCRATCH) as watch:
                    await watch.changed()
                    for number in range(500):
                        await store.write(f"{SCRATCH}/n{number}", "")
                    await store.read(SCRATCH)
                    seen = await watch.changed()
                    assert len(seen) <= 64

    async def test_a_listener_is_called_for_each_change(self, store_path):
        calls = Calls()
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                async with store.listen(f"{SCRATCH}/a", calls.add):
                    for path in ("a", "a/b", "a"):
                        calls.forget()
                        await store.write(f"{SCRATCH}/{path}", "1")
                        await calls.some.wait()

    async def test_a_listener_is_called_for_nothing_else(self, store_path):
        calls = Calls()
        async with scratch_store(store_path) as store, store.watch(SCRATCH) as watch:
            with trio.fail_after(WITHIN_S):

                async def write(path):
                    await store.write(f"{SCRATCH}/{path}", "1")
                    # Events of another write come after all of this one's.
                    await store.write(f"{SCRATCH}/later", "1")
                    await until_reported(watch, f"{SCRATCH}/later")

                async with store.listen(f"{SCRATCH}/a", calls.add):
                    await write("a")
                    calls.forget()
                    await write("ab")
                await write("a")
                assert not calls.some.is_set()

    @pytest.mark.parametrize("name", ["@introduceDomain", "@releaseDomain"])
    async def test_special_watches(self, store_path, name):
        async with scratch_store(store_path) as store:
            with trio.fail_after(WITHIN_S):
                async with store.watch(name) as watch:
                    assert await watch.changed() == [name]
