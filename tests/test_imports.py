"""Imports point one way: from commands to the daemon to the rooms to units and errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "xbd"

BASE = {"xbd.core.units", "xbd.core.errors", "xbd.core.ratelimit"}
"""What anything may import."""

DRIVER_API = {"xbd.core.driver", "xbd.core.hostio"}
FRONTEND = {"xbd.core.blkif", "xbd.core.hypervisor", "xbd.core.xenstore", "xbd.core.hostio"}
BACKEND = FRONTEND | {"xbd.core.driver", "xbd.core.datapath", "xbd.core.control", "xbd.core.nbd"}

ROOMS: dict[str, set[str]] = {
    "xbd.core.units": set(),
    "xbd.core.errors": set(),
    "xbd.core.ratelimit": set(),
    "xbd.core.blkif": set(),
    "xbd.core.hostio": set(),
    "xbd.core.hypervisor": {"xbd.core.hostio"},
    "xbd.core.xenstore": {"xbd.core.hostio"},
    "xbd.core.driver": {"xbd.core.hostio"},
    "xbd.core.control": {"xbd.core.hostio"},
    "xbd.core.datapath": FRONTEND | {"xbd.core.driver"},
    "xbd.core.nbd": DRIVER_API,
    "xbd.core.frontend": FRONTEND,
    "xbd.core.backend": BACKEND,
    "xbd.drivers._hostdisk": DRIVER_API,
    "xbd.drivers.raw": DRIVER_API | {"xbd.drivers._hostdisk"},
    "xbd.drivers.imagefile": DRIVER_API | {"xbd.drivers._hostdisk"},
    "xbd.drivers.qcow2": DRIVER_API,
    "xbd.drivers": set(),
}
"""Rooms and the other rooms they may import; all others compose them, and may import any."""

PURE = {"asyncio", "cffi", "ctypes", "mmap", "os", "select", "socket", "subprocess", "trio"}
"""What the room of the protocol must not import: it neither waits nor asks the system."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every name that a module imports, wherever in its text."""
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are written out, not relative"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def room_of(module: str) -> str | None:
    rooms = [room for room in ROOMS if within(module, {room})]
    return max(rooms, key=len, default=None)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    room = room_of(module)
    allowed = {"xbd"} if room is None else ROOMS[room] | BASE | {room}
    for name in imports(MODULES[module]):
        if name.startswith("xbd.") and not name.startswith("xbd.__"):
            assert within(name, allowed), f"{module} imports {name}"


def test_drivers_are_found_by_their_entry_points_alone() -> None:
    for module, path in MODULES.items():
        if not within(module, {"xbd.drivers"}):
            for name in imports(path):
                assert not within(name, {"xbd.drivers"}), f"{module} imports {name}"


def test_the_rooms_below_know_nothing_of_the_command() -> None:
    for module, path in MODULES.items():
        if not within(module, {"xbd.cli", "xbd.__main__"}):
            for name in imports(path):
                assert not within(name, {"xbd.cli"}), f"{module} imports {name}"


def test_the_protocol_is_pure() -> None:
    for module, path in MODULES.items():
        if within(module, {"xbd.core.blkif"}):
            for name in imports(path):
                assert not within(name, PURE), f"{module} imports {name}"


def test_only_the_suite_for_authors_imports_test_tools() -> None:
    for module, path in MODULES.items():
        for name in imports(path):
            if within(name, {"hypothesis", "pytest"}):
                assert within(module, {"xbd.core.driver.testing"}), f"{module} imports {name}"


def test_third_parties_need_only_the_drivers_interface() -> None:
    for path in (ROOT / "tests" / "packages").rglob("*.py"):
        for name in imports(path):
            assert not within(name, {"xbd"}) or within(name, {"xbd.core.driver"}), path


def test_every_room_is_known() -> None:
    rooms = {module_name(path.parent / "__init__.py") for path in (PACKAGE / "core").glob("*/*.py")}
    assert rooms <= set(ROOMS)
