"""Disks in one extent, in few and in many: what it costs that an image's bytes are scattered."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from drivers import xbd_bench_scattered as scattered

from harness import guest
from harness.disks import Disk
from harness.figures import backend_cpu
from harness.guest import Figures
from harness.machine import drop_from_cache, read_afresh
from harness.parts import Part
from harness.servers import Server, XbdServer
from harness.targets import AT_MOST, Target
from harness.workloads import GIB, KIB, MIB, Workload

SIZE = 1 * GIB
ONE, FEW, MANY = "one", "20", "16384"
EXTENTS = {ONE: SIZE, FEW: 52 * MIB, MANY: 64 * KIB}
"""Bytes of each."""
_TOUCH = 64 * KIB
"""What is measured is what it costs when all extents are known."""


def _workload(
    depth: int,
    block: int = 4 * KIB,
    *,
    cached: bool,
    write: bool = False,
    sequential: bool = False,
) -> Workload:
    disk = f"{'write' if write else 'read'}-{'cached' if cached else 'direct'}"
    return Workload(
        disk,
        depth,
        block,
        write=write,
        sequential=sequential,
        through_cache=cached,
        touch=0 if sequential else _TOUCH,
    )


_QUICK = tuple(
    _workload(32, cached=cached, write=write)
    for cached, write in ((True, False), (False, False), (False, True))
)
_ALL = (
    *(
        _workload(depth, cached=cached, write=write)
        for cached in (True, False)
        for write in (False, True)
        for depth in (1, 32)
    ),
    _workload(8, 128 * KIB, cached=True, sequential=True),
    _workload(8, 1 * MIB, cached=False, sequential=True),
)


class ExtentsPart(Part):
    """The same bytes in the same file, in another order."""

    title = "Extents (ratios to one extent)"
    backends = (ONE, FEW, MANY)
    peer = ONE
    targets = tuple(
        Target("backend CPU", workload, backend_cpu, AT_MOST, limit, backend, ONE)
        for workload in _QUICK
        for backend, limit in ((FEW, 1.05), (MANY, 1.10))
    )

    def workloads(self) -> Sequence[Workload]:
        return _QUICK if self.settings.quick else _ALL

    @contextmanager
    def running(self, backends: Sequence[str]) -> Iterator[None]:
        drivers = self.settings.runtime / "drivers"
        install_driver(drivers)
        self._servers: dict[str, Server] = {}
        with ExitStack() as stack:
            for name in backends:
                self._make_files(name)
                server = XbdServer(
                    f"extents-{name}", self.settings.runtime, self._disks(name), drivers=drivers
                )
                self._servers[name] = server
                stack.enter_context(server.running())
            yield

    def _path(self, layout: str, disk: str) -> Path:
        kind, _, _ = disk.partition("-")
        return self.settings.images / f"extents-{layout}-{kind}.img"

    def _make_files(self, layout: str) -> None:
        plain = self.settings.images / "plain.img"
        guest.fill(plain, SIZE)
        for kind in ("read", "write"):
            path = self._path(layout, kind)
            _scatter(plain, path, EXTENTS[layout])
            drop_from_cache(path)  # read again, it is in pieces as large as the others'
        plain.unlink()

    def _disks(self, layout: str) -> dict[str, Disk]:
        return {
            workload.disk: Disk(
                self._path(layout, workload.disk),
                workload.through_cache,
                driver=scattered.DRIVER.name,
                options=f"&extent={EXTENTS[layout]}",
            )
            for workload in self.workloads()
        }

    def measure(self, backend: str, workload: Workload, seed: int) -> Figures:
        settings = self.settings
        cached = workload.through_cache
        read_afresh(self._path(backend, workload.disk), through_cache=cached)
        return self._servers[backend].run(
            workload,
            seconds=settings.seconds,
            seed=seed,
            cpus=settings.cpus,
            more=settings.guest_options,
        )


def install_driver(directory: Path) -> None:
    """The driver as an installed package of its own: the daemon finds it as it finds any."""
    module = Path(scattered.__file__)
    info = directory / f"{module.stem}-0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(module, directory)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.stem}\nVersion: 0\n")
    entry = f"{scattered.DRIVER.name} = {module.stem}:DRIVER"
    (info / "entry_points.txt").write_text(f"[xbd.drivers]\n{entry}\n")


def _scatter(plain: Path, path: Path, extent: int) -> None:
    """A disk's content as the driver will look for it."""
    places = scattered.scatter(SIZE // extent)
    with plain.open("rb") as source, path.open("wb") as target:
        for place in places:
            target.seek(place * extent)
            target.write(source.read(extent))
        target.seek(source.tell())
        target.write(source.read())
