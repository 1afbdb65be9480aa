"""A store in a plain folder, for a shared file system or a second disk."""

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launcher.errors import StoreAway, StoreError
from launcher.storage.base import (
    MAX_DOCUMENT,
    Entry,
    Info,
    Level,
    NotFound,
    PreconditionFailed,
    Store,
    Version,
    checked,
)
from launcher.storage.files import Changed, Source, is_aside, opened, write_all, written_aside

LOCK = ".lock"  # taken for conditional puts; never listed
OF_THE_DISK = {  # it is there, and will not come back by itself
    errno.ENOSPC: "is full",
    errno.EDQUOT: "is over its quota",
    errno.EROFS: "may only be read",
    errno.EIO: "fails",
}


class FolderStore(Store):
    """Keys are paths below `root`; an etag is the SHA-256 of the content."""

    conditional = True
    verifies = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = f"file://{root}"

    def path(self, key: str) -> Path:
        """The file of an object."""
        return self.root / checked(key)

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

    def put_file(self, key: str, path: Path, *, if_absent: bool = False, growing: bool = False) -> Version:
        target = self.path(key)
        with opened(path, still=not growing) as source, self._put(target, if_absent) as fd:
            seen = _copied(source.chunks(), fd)
            if not growing and source.changed():
                raise Changed("the file was written to while it was being sent")
        return Version(source.size, seen.hexdigest())

    def grow_file(self, key: str, path: Path, base: Version) -> Version:
        target = self.path(key)
        with opened(path) as source, self._put(target, if_match=base.etag) as fd:
            if source.size < base.size or source.sha256(base.size).hexdigest() != base.etag:
                raise Changed("what was stored of the file is no longer how it begins")
            with opened(target) as stored:
                here = 0
                while here < base.size:
                    copied = os.copy_file_range(stored.fd, fd, base.size - here)
                    if not copied:
                        raise Changed("what was stored of the file has become shorter")
                    here += copied
            for chunk in source.chunks(base.size):
                write_all(fd, chunk)
            seen = Source(fd, os.fstat(fd)).sha256()
        return Version(source.size, seen.hexdigest())

    def put_bytes(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        with self._put(self.path(key), if_absent, if_match) as fd:
            write_all(fd, data)
        return hashlib.sha256(data).hexdigest()

    def get_bytes(self, key: str) -> tuple[bytes, str]:
        with self._stored(key) as source:
            if source.size > MAX_DOCUMENT:
                raise StoreError(f"{self.url}/{key} is too big to be what its name says")
            data = source.read(source.size)
        return data, hashlib.sha256(data).hexdigest()

    def get_file(self, key: str, path: Path, *, durable: bool = True, expect: Entry | None = None) -> Info:
        with written_aside(path, durable) as fd:
            info = self.stat(key)
            if expect and expect.size != info.size:
                raise PreconditionFailed(f"{self.url}/{key} was changed by another writer")
            etag = _copied(self._chunks(key), fd).hexdigest()
        return replace(info, etag=etag)

    def digest(self, key: str) -> tuple[int, str]:
        with self._stored(key) as source:
            return source.size, source.sha256().hexdigest()

    def stat(self, key: str) -> Info:
        with self._stored(key) as source:
            return Info(source.size, source.mtime_ns / 1e9, "", None, None)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with self._speaking():
            for folder, _, names in os.walk(self.root / prefix.rpartition("/")[0]):
                yield from self._entries((Path(folder, name) for name in names), prefix)

    def level(self, prefix: str = "") -> Level:
        head, slash, start = prefix.rpartition("/")
        with self._speaking():
            try:
                found = [path for path in (self.root / head).iterdir() if path.name.startswith(start)]
            except (FileNotFoundError, NotADirectoryError):
                return [], []
            folders = [path for path in found if path.is_dir() and not path.is_symlink()]
            files = self._entries((path for path in found if path.is_file()), prefix)
            return sorted(f"{head}{slash}{path.name}/" for path in folders), list(files)

    @contextmanager
    def as_file(self, key: str, expect: Entry | None = None) -> Iterator[Path]:
        with self._stored(key):
            yield self.path(key)

    def delete(self, key: str) -> None:
        path = self.path(key)
        with self._speaking():
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self.root).parents[:-1]:
                try:  # a store has no empty folders
                    (self.root / folder).rmdir()
                except OSError:
                    break

    def sweep(self, prefix: str = "") -> int:
        swept = 0
        with self._speaking():
            for folder, _, names in os.walk(self.root / prefix.rpartition("/")[0]):
                for path in (Path(folder, name) for name in names if is_aside(name)):
                    if path.relative_to(self.root).as_posix().startswith(prefix):
                        path.unlink(missing_ok=True)
                        swept += 1
        return swept

    def _entries(self, paths: Iterable[Path], prefix: str) -> Iterator[Entry]:
        for path in paths:
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix) and path.name != LOCK and not is_aside(path.name):
                try:
                    info = path.lstat()
                except FileNotFoundError:
                    continue  # deleted meanwhile
                if not path.is_symlink():
                    yield Entry(key, info.st_size, info.st_mtime_ns / 1e9)

    def _chunks(self, key: str) -> Iterator[bytes]:
        with self._stored(key) as source:
            yield from source.chunks()
            if source.changed():
                raise Changed("the file was written to while it was being copied")

    @contextmanager
    def _stored(self, key: str) -> Iterator[Source]:
        with self._speaking(key), opened(self.path(key)) as source:
            yield source

    @contextmanager
    def _put(self, target: Path, if_absent: bool = False, if_match: str | None = None) -> Iterator[int]:
        """A new file that becomes `target`. The condition is looked at, and kept, under the store's lock."""
        with self._speaking():
            target.parent.mkdir(parents=True, exist_ok=True)
            if not if_absent and if_match is None:
                with written_aside(target) as fd:
                    yield fd
                return
            lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if _found(target) != if_match if if_match else os.path.lexists(target):
                    raise PreconditionFailed(f"{target} is there already or was changed by another writer")
                with written_aside(target) as fd:
                    yield fd
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
            if error.errno in OF_THE_DISK:
                said = f"the disk of the store {self.url} {OF_THE_DISK[error.errno]}: {error.strerror}"
                raise StoreError(said) from error
            raise StoreAway(f"the store {self.url} cannot be used: {error.strerror}") from error


def _found(target: Path) -> str | None:
    try:
        with opened(target) as source:
            return source.sha256().hexdigest()
    except FileNotFoundError:
        return None


def _copied(chunks: Iterable[bytes], fd: int) -> "hashlib._Hash":
    """Write `chunks`; their hash."""
    seen = hashlib.sha256()
    for chunk in chunks:
        seen.update(chunk)
        write_all(fd, chunk)
    return seen
