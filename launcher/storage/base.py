"""What a store can do. It knows keys and bytes, nothing of runs.

Every method raises StoreAway when the store cannot be reached (the same call may work later) and StoreError
when the answer is final. Calls try again by themselves for a few seconds only: the callers' loops are the
real retry.
"""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import StoreError

MAX_DOCUMENT = 16 << 20  # bytes that get_bytes accepts: what is in a bucket is not ours to trust


class NotFound(StoreError):
    """No object has this key."""


class PreconditionFailed(StoreError):
    """A conditional put lost: the object is there already, or is not the one that was expected."""


class Changed(StoreError):
    """The local file got shorter while it was being sent; nothing was stored."""


@dataclass(frozen=True)
class StoreSettings:
    """How to reach an S3 store; what is None is left to boto3's own chain (environment, ~/.aws)."""

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None


@dataclass(frozen=True)
class Entry:
    """One object in a listing; `key` is relative to the store."""

    key: str
    size: int


class Store(ABC):
    """Objects by key. A put is atomic: readers see the old object or the whole new one."""

    url: str

    @abstractmethod
    def check(self) -> None:
        """Raises a StoreError with one clear sentence unless the store is there and lets us in."""

    @abstractmethod
    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        """Store the file as long as it is now: what is appended meanwhile is left out.

        Raises Changed if it gets shorter, PreconditionFailed if `if_absent` and the key is taken.
        """

    @abstractmethod
    def put_bytes(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        """Store `data`, return its etag. With a condition, PreconditionFailed says that it does not hold.

        Data put under a condition should name its writer: a put whose first answer was lost finds its own
        object there, and knows it by its bytes.
        """

    @abstractmethod
    def get_bytes(self, key: str) -> tuple[bytes, str]:
        """A small object and its etag. Raises NotFound."""

    @abstractmethod
    def get_file(self, key: str, path: Path) -> None:
        """Bring an object to `path`: written aside, fsynced, renamed. Raises NotFound."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object whose key starts with `prefix`, in no particular order.

        The keys come from outside: check them with `key_problem` before a path is made of one.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""


def key_problem(key: str) -> str | None:
    """Why `key` must not be used, or None. A good key is a relative path that stays below its folder."""
    if not key or key.startswith("/"):
        return "it is not a relative path"
    if "\\" in key or any(ord(c) < 32 or ord(c) == 127 for c in key):
        return "it has a backslash or a control character"
    if any(part in ("", ".", "..") for part in key.split("/")):
        return "it has an empty part, '.' or '..'"
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        return "it is not valid UTF-8"
    if len(encoded) > 900 or any(len(part.encode()) > 255 for part in key.split("/")):
        return "it is too long"
    return None


def checked(key: str) -> str:
    if problem := key_problem(key):
        raise StoreError(f"the key {key!r} cannot be stored: {problem}")
    return key


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """(file descriptor, size now) of a regular file; a symbolic link is refused, not followed."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise StoreError(f"{path} is not a regular file")
        yield fd, info.st_size
    finally:
        os.close(fd)


def read_exactly(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`. A short read ends the transfer at once: waiting for more would hang it."""
    chunks = []
    while size:
        chunk = os.pread(fd, size, offset)
        if not chunk:
            raise Changed("the file got shorter while it was being sent")
        chunks.append(chunk)
        size -= len(chunk)
        offset += len(chunk)
    return b"".join(chunks)


@contextmanager
def written_aside(path: Path) -> Iterator[int]:
    """A file descriptor for a new file that becomes `path` when the block ends well, and else vanishes."""
    aside = path.parent / f".{path.name[:100]}.tmp-{os.urandom(6).hex()}"
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        aside.rename(path)
        sync_folder(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
