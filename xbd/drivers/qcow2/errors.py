"""What can be wrong with an image."""

from __future__ import annotations

import errno

from xbd.core.driver import MediaError


class CorruptImage(MediaError):
    """The image's metadata contradict its specification or themselves."""

    def __init__(self, message: str, *, errno: int = errno.EIO) -> None:
        super().__init__(message, errno=errno)
