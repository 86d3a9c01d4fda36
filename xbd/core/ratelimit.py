"""Logging that a guest can't flood."""

from __future__ import annotations

import time
from collections.abc import Callable

import attrs


@attrs.define
class RateLimit:
    """Lets `burst` events pass per `seconds`, and counts those it held back."""

    burst: int = 5
    seconds: float = 1.0
    clock: Callable[[], float] = time.monotonic
    suppressed: int = 0
    """Held back since an event passed last."""
    _window: float = attrs.field(default=float("-inf"), init=False)
    _passed: int = attrs.field(default=0, init=False)

    def allows(self) -> int | None:
        """None: be silent.  Otherwise how many events were held back before this one."""
        now = self.clock()
        if now - self._window >= self.seconds:
            self._window = now
            self._passed = 0
        if self._passed >= self.burst:
            self.suppressed += 1
            return None
        self._passed += 1
        held, self.suppressed = self.suppressed, 0
        return held
