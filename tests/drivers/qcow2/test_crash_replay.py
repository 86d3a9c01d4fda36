"""Power failures, killed processes and failing hosts at any moment: the image is whole, what was
flushed is there, and nothing is there that nobody wrote.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import attrs
import pytest
from qcow2_bytes import ImageBytes
from qcow2_crashes import KINDS, Judge, record
from qcow2_recipes import NAMED, Recipe, some
from qcow2_tape import RecordingHost, some_fail

from xbd.core.units import KIB
from xbd.drivers.qcow2 import placing

SMALL = 128 * KIB
"""Of most disks: many states rather than large ones."""

FAST = (
    "512 4k 64-bit-512 8-bit subclusters-16k over-two v2-over subclusters-over-two zlib-4k "
    "snapshots snapshots-v2 external-4k"
)
SNAPSHOTS = "WWWZUDFRNNPX"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_power_cuts")]


def small(name: str) -> Recipe:
    return shrunk(NAMED[name])


def shrunk(recipe: Recipe) -> Recipe:
    size = SMALL if recipe.cluster_size < 64 * KIB else 4 * SMALL
    return attrs.evolve(recipe, size=size, backing_size=recipe.backing_size * size // recipe.size)


@pytest.mark.parametrize("recipe", some(FAST), ids=str)
def test_crashes(tmp_path: Path, recipe: Recipe) -> None:
    recording = record(shrunk(recipe), tmp_path, 1, steps=50)
    judge = Judge(recording, random.Random(1))
    judge.judge(3, places=50, reopen=0.02)
    assert judge.states > 150


def test_bitmaps_end_before_the_disk_changes(tmp_path: Path) -> None:
    recording = record(small("bitmap"), tmp_path, 8, steps=5, kinds="WUD")
    assert ImageBytes(recording.tape.start["image"]).has_valid_bitmap()
    Judge(recording, random.Random(8)).judge(6, reopen=0.02)


@pytest.mark.parametrize("faulty", [False, True], ids=["sound", "faulty"])
@pytest.mark.parametrize("name", ["4k", "512", "snapshots"])
def test_crashes_while_clusters_are_linked_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, faulty: bool
) -> None:
    monkeypatch.setattr(placing, "STREAK", 0)
    faults = some_fail if faulty else None
    recording = record(small(name), tmp_path, 9, steps=50, faults=faults, kinds="WWWUDFZ")
    Judge(recording, random.Random(9)).judge(2, places=50, reopen=0.05)


@pytest.mark.parametrize("name", ["4k", "512"])
def test_crashes_while_clusters_are_compressed(tmp_path: Path, name: str) -> None:
    recording = record(small(name), tmp_path, 6, steps=30, kinds="WWWUDF", compress=True)
    Judge(recording, random.Random(6)).judge(2, places=50, reopen=0.02)


@pytest.mark.parametrize("name", ["512", "v2-over", "subclusters-16k", "snapshots"])
def test_crashes_while_the_size_changes(tmp_path: Path, name: str) -> None:
    recording = record(small(name), tmp_path, 2, steps=40, kinds="WWWZUDFSS")
    Judge(recording, random.Random(2)).judge(2, places=50, reopen=0.02)


@pytest.mark.parametrize("name", ["512", "over-two", "subclusters-over", "snapshots"])
def test_crashes_while_many_threads_write(tmp_path: Path, name: str) -> None:
    recording = record(NAMED[name], tmp_path, 3, steps=12, threads=4)
    Judge(recording, random.Random(3)).judge(2, places=50, reopen=0.02)


@pytest.mark.parametrize(
    "name", ["512", "4k", "over-two", "subclusters-16k", "v2-over", "2-bit-512"]
)
def test_crashes_while_snapshots_are_taken(tmp_path: Path, name: str) -> None:
    recording = record(small(name), tmp_path, 5, steps=40, kinds=SNAPSHOTS)
    assert recording.shots
    Judge(recording, random.Random(5)).judge(2, places=50, reopen=0.04)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["512", "snapshots-over", "zlib-4k"])
def test_snapshots_on_failing_hosts(tmp_path: Path, name: str, seed: int) -> None:
    recording = record(small(name), tmp_path, seed, faults=some_fail, kinds=SNAPSHOTS)
    Judge(recording, random.Random(seed)).judge(1, places=20, reopen=0.05)


def test_crashes_while_the_refcount_table_grows(tmp_path: Path) -> None:
    """Of 512-byte clusters with counts of 64 bits it counts 2 MiB before that."""
    recipe = attrs.evolve(NAMED["64-bit-512"], size=2048 * KIB)
    recording = record(recipe, tmp_path, 4, steps=1, kinds="A")
    before = ImageBytes(recording.tape.start["image"])
    assert ImageBytes(recording.made.path.read_bytes()).table_clusters > before.table_clusters
    Judge(recording, random.Random(4)).judge(3, places=15)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "name", ["512", "over-two", "subclusters-16k", "snapshots", "external-4k", "zlib-4k"]
)
def test_failing_hosts(tmp_path: Path, name: str, seed: int) -> None:
    """Requests fail, nothing else is harmed, and crashes may still come."""
    recording = record(small(name), tmp_path, seed, faults=some_fail, kinds=KINDS + "S")
    Judge(recording, random.Random(seed)).judge(1, places=20, reopen=0.05)


def test_many_threads_over_failing_hosts(tmp_path: Path) -> None:
    recording = record(NAMED["over-two"], tmp_path, 7, steps=25, threads=4, faults=some_fail)
    assert recording.failures
    Judge(recording, random.Random(7)).judge(1, places=40, reopen=0.05)


class TestTheJudge:
    """It finds what it is for."""

    def test_flushes_that_do_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def flush(self: RecordingHost) -> None:
            self.calls["flush"] += 1

        monkeypatch.setattr(RecordingHost, "flush", flush)
        self._finds(tmp_path, "4k")

    def test_counts_that_are_not_durable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(RecordingHost, "write_durably", RecordingHost.write)
        self._finds(tmp_path, "512")

    def test_lost_writes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = RecordingHost.writev
        calls = iter(range(1000))

        def writev(self: RecordingHost, transfers: Any) -> Any:
            return [None] * len(transfers) if next(calls) == 12 else real(self, transfers)

        monkeypatch.setattr(RecordingHost, "writev", writev)
        self._finds(tmp_path, "4k")

    def _finds(self, directory: Path, name: str) -> None:
        recording = record(small(name), directory, 1, steps=50, kinds="WWWUDF")
        judge = Judge(recording, random.Random(1))
        with pytest.raises(AssertionError):
            judge.judge(4)
