"""Credentials of the shared file (~/.aws/credentials), read again when somebody has rewritten it.

What comes from a program, a role or an instance botocore refreshes by itself; what it once read from that
file it keeps. A run goes on for days, and keys that expire are replaced there by whatever made them.
"""

from collections.abc import Callable
from contextlib import suppress
from os.path import expanduser
from pathlib import Path
from threading import Lock
from typing import Any

from botocore.credentials import Credentials, SharedCredentialProvider
from botocore.exceptions import BotoCoreError

FILE = SharedCredentialProvider.METHOD


def follow(session: Any) -> None:
    """Have a session of botocore's follow the file, if it is there that it finds its credentials."""
    path = Path(expanduser(session.get_config_variable("credentials_file")))  # noqa: PTH111 - no home: no error
    chain = session.get_component("credential_provider")
    session.register_component("credential_provider", _Chain(chain, path))


class _Chain:
    """In the place of botocore's own."""

    def __init__(self, chain: Any, path: Path) -> None:
        self._chain, self._path = chain, path

    def load_credentials(self) -> Any:
        stamp, found = _stamp(self._path), self._chain.load_credentials()
        if getattr(found, "method", None) != FILE:
            return found
        return _Followed(found, stamp, self._chain.get_provider(FILE).load, self._path)


class _Followed(Credentials):  # type: ignore[misc]
    """Safe to use from many threads."""

    def __init__(self, found: Any, stamp: tuple[int, ...], load: Callable[[], Any], path: Path) -> None:
        super().__init__(found.access_key, found.secret_key, found.token, found.method)
        self._found, self._stamp, self._load, self._path, self._lock = found, stamp, load, path, Lock()

    def get_frozen_credentials(self) -> Any:
        with self._lock:
            now = _stamp(self._path)
            if now != self._stamp:
                with suppress(BotoCoreError):  # half of it is written: the next request looks again
                    if found := self._load():
                        self._found, self._stamp = found, now
            return self._found.get_frozen_credentials()


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        info = path.stat()
    except OSError:
        return ()
    return info.st_ino, info.st_size, info.st_mtime_ns
