"""``xbd export`` as a process of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 60.0
"""Processes start slowly on a busy machine."""


class Exported:
    """A running ``xbd export``, ready for clients; its log is in a file beside the socket."""

    def __init__(self, disk: str, directory: Path, *options: str) -> None:
        self.socket = directory / "s"
        self.log = directory / "log"
        command = [sys.executable, "-m", "xbd", "export", disk, "--nbd", str(self.socket)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *options], stdout=subprocess.PIPE, stderr=log, text=True, env=_quiet()
            )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        self.line = self.process.stdout.readline() if ready else ""
        if not self.line:
            self.kill()
            raise AssertionError(self.log.read_text())

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Its exit status, when it has ended by itself."""
        try:
            return self.process.wait(SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def logs(self, text: str) -> None:
        """Wait until the log has it."""
        end = time.monotonic() + SECONDS
        while text not in self.log.read_text():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)


def _quiet() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
