"""A store in a plain folder, for a shared file system or a second disk."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import StoreAway, StoreError
from launcher.storage.base import (
    MAX_DOCUMENT,
    Entry,
    NotFound,
    PreconditionFailed,
    Store,
    checked,
    opened,
    read_exactly,
    write_all,
    written_aside,
)

LOCK = ".lock"  # taken for conditional puts; never listed
CHUNK = 4 << 20


class FolderStore(Store):
    """Keys are paths below `root`; an etag is the SHA-256 of the content."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = f"file://{root}"

    def check(self) -> None:
        # Asking leaves nothing behind: the folder is made by the first put.
        try:
            there = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise StoreError(
                f"the store {self.url} cannot be written to: {error.strerror}", "choose another storage.url"
            ) from error

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        target = self.root / checked(key)
        with opened(path) as (source, size), self._speaking():
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._condition(target, if_absent, None), written_aside(target) as fd:
                for offset in range(0, size, CHUNK):
                    write_all(fd, read_exactly(source, min(CHUNK, size - offset), offset))

    def put_bytes(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        target = self.root / checked(key)
        with self._speaking():
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._condition(target, if_absent, if_match), written_aside(target) as fd:
                write_all(fd, data)
        return hashlib.sha256(data).hexdigest()

    def get_bytes(self, key: str) -> tuple[bytes, str]:
        with self._speaking(key), opened(self.root / checked(key)) as (fd, size):
            if size > MAX_DOCUMENT:
                raise StoreError(f"{self.url}/{key} is too big to be what its name says")
            data = read_exactly(fd, size, 0)
        return data, hashlib.sha256(data).hexdigest()

    def get_file(self, key: str, path: Path) -> None:
        with (
            written_aside(path) as fd,
            self._speaking(key),
            opened(self.root / checked(key)) as (source, size),
        ):
            for offset in range(0, size, CHUNK):
                write_all(fd, read_exactly(source, min(CHUNK, size - offset), offset))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with self._speaking():
            start = self.root / prefix.rpartition("/")[0]
            for folder, _, names in os.walk(start):
                for name in names:
                    path = Path(folder, name)
                    key = path.relative_to(self.root).as_posix()
                    hidden = name == LOCK or (name.startswith(".") and ".tmp-" in name)
                    if key.startswith(prefix) and not hidden and not path.is_symlink():
                        yield Entry(key, path.stat().st_size)

    def delete(self, key: str) -> None:
        path = self.root / checked(key)
        with self._speaking():
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self.root).parents[:-1]:
                try:  # a store has no empty folders
                    (self.root / folder).rmdir()
                except OSError:
                    break

    @contextmanager
    def _condition(self, target: Path, if_absent: bool, if_match: str | None) -> Iterator[None]:
        """Hold the store's lock over a conditional put, and see that the condition holds."""
        if not if_absent and if_match is None:
            yield
            return
        lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                found = hashlib.sha256(target.read_bytes()).hexdigest() if if_match else target.exists()
            except FileNotFoundError:
                found = None
            if found != (if_match or False):
                raise PreconditionFailed(f"{target} is there already or was changed by another writer")
            yield
        finally:
            os.close(lock)

    @contextmanager
    def _speaking(self, key: str = "") -> Iterator[None]:
        """OSErrors in the store's words. A folder that fails may be a server that comes back."""
        try:
            yield
        except FileNotFoundError as error:
            if key:
                raise NotFound(f"{self.url}/{key} does not exist") from error
            raise StoreAway(f"the store {self.url} cannot be used: {error.strerror}") from error
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise StoreError(f"the store {self.url} cannot be used: {error.strerror}") from error
        except OSError as error:
            raise StoreAway(f"the store {self.url} cannot be used: {error.strerror}") from error
