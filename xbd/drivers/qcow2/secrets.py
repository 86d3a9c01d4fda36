"""Passphrases of encrypted images: from files, never from options or XenStore."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from pathlib import Path
from typing import Final

from xbd.core.driver import OpenFailed
from xbd.core.hostio.failures import open_failure, shown
from xbd.core.hostio.files import kind_of, open_file, stat_path
from xbd.core.units import KIB

_LOG = logging.getLogger(__name__)

MAX_SECRET_BYTES: Final = 64 * KIB
_CREDENTIALS: Final = "CREDENTIALS_DIRECTORY"
_CREDENTIAL_PATTERN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,254}")


def read_secret(key_file: Path | None, key_credential: str | None) -> bytes | None:
    """The passphrase that one of the two options names; None: neither is given.

    All of the file's bytes count, a newline at its end too, as for QEMU's ``-object secret,file=``.
    Raises `OpenFailed`; no text of it has anything of the content.
    """
    if key_file is not None and key_credential is not None:
        raise OpenFailed("give key-file or key-credential, not both", errno=errno.EINVAL)
    if key_credential is not None:
        return _read(_credential(key_credential))
    return None if key_file is None else _read(key_file)


def _credential(name: str) -> Path:
    if not _CREDENTIAL_PATTERN.fullmatch(name):
        raise OpenFailed(
            f"key-credential: {name!r} can't be a credential's name", errno=errno.EINVAL
        )
    directory = os.environ.get(_CREDENTIALS)
    if not directory:
        raise OpenFailed(
            f"key-credential={name}: systemd passes no credentials to this process; add to its "
            f"unit LoadCredential={name}:/PATH or LoadCredentialEncrypted={name}:/PATH",
            errno=errno.ENOENT,
        )
    return Path(directory) / name


def _read(path: Path) -> bytes:
    _require_file(path, stat_path(path, "check key-file or key-credential"))
    try:
        fd = open_file(path, writable=False, flags=os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            _require_file(path, status)
            secret = os.read(fd, MAX_SECRET_BYTES + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise open_failure(f"cannot read {shown(path)}", error.errno or errno.EIO) from None
    if status.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        _LOG.warning("%s holds a passphrase and is open to every user: chmod o= it", shown(path))
    return _checked(path, secret)


def _require_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OpenFailed(
            f"{shown(path)} is a {kind_of(status)}, not a file with a passphrase",
            errno=errno.EINVAL,
        )


def _checked(path: Path, secret: bytes) -> bytes:
    """QEMU takes UTF-8 without NUL alone; what it could never open is a mistake."""
    problem = ""
    if not secret:
        problem = "is empty"
    elif len(secret) > MAX_SECRET_BYTES:
        problem = f"is longer than {MAX_SECRET_BYTES} bytes"
    elif b"\0" in secret or not _is_utf8(secret):
        problem = "is no text in UTF-8"
    if problem:
        raise OpenFailed(f"the passphrase in {shown(path)} {problem}", errno=errno.EINVAL)
    return secret


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
