"""Recording everything that commands do to the files they open by themselves."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from qcow2_tape import Crashes, Fault, RecordingHost, Tape

from xbd.drivers.qcow2 import confined, offline, opening
from xbd.drivers.qcow2.host import Host, open_host


def record(monkeypatch: pytest.MonkeyPatch, faults: Mapping[str, Fault] | None = None) -> Tape:
    """From now on, what is done to files that are opened for writing goes on a tape, by name.

    `faults`: for the files of these names.
    """
    tape = Tape()

    def open_recorded(path: Path, *, writable: bool, **options: Any) -> Host:
        host = open_host(path, writable=writable, **options)
        if not writable:
            return host
        recorded = RecordingHost.over(host, tape, path.name)
        recorded.fault = (faults or {}).get(path.name, recorded.fault)
        return recorded

    for module in (confined, offline, opening):
        monkeypatch.setattr(module, "open_host", open_recorded)
    return tape


def crash_states(tape: Tape, chance: random.Random, each: int = 2) -> Iterator[dict[str, bytes]]:
    """What the files on a tape may be after a crash, each state once."""
    crashes = Crashes(tape)
    seen = set()
    for when in range(len(tape.events) + 1):
        crashes.go_to(when)
        states = [crashes.process_died(), *(crashes.power_failed(chance) for _ in range(each))]
        for state in states:
            files = {name: bytes(content) for name, content in state.items()}
            key = tuple(map(hash, files.values()))
            if key not in seen:
                seen.add(key)
                yield files
