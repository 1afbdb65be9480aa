"""Local files as a store sends and brings them: read exactly as long as they were, written aside."""

import hashlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, flock
from pathlib import Path

from launcher.errors import StoreError

CHUNK = 1 << 20
MOMENT = 0.05  # seconds
MOMENTS = 20


class Changed(StoreError):
    """The local file is not what it was when its sending began; nothing was stored."""


class Source:
    """An open regular file that is being sent, as long as it was when it was opened."""

    def __init__(self, fd: int, info: os.stat_result) -> None:
        self.fd, self.size, self.mtime_ns = fd, info.st_size, info.st_mtime_ns
        self._was = _print(info)

    def changed(self) -> bool:
        return _print(os.fstat(self.fd)) != self._was

    def read(self, size: int, offset: int = 0) -> bytes:
        """`size` bytes at `offset`. A short read ends the transfer: waiting for more would hang it."""
        chunks = []
        while size:
            chunk = os.pread(self.fd, size, offset)
            if not chunk:
                raise Changed("the file got shorter while it was being sent")
            chunks.append(chunk)
            size -= len(chunk)
            offset += len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        end = self.size if end is None else end
        for offset in range(start, end, CHUNK):
            yield self.read(min(CHUNK, end - offset), offset)

    def sha256(self, end: int | None = None) -> "hashlib._Hash":
        """The hash of the first `end` bytes, to be gone on with."""
        return self.hashed("sha256", end)

    def hashed(self, kind: str, end: int | None = None, start: int = 0) -> "hashlib._Hash":
        seen = hashlib.new(kind, usedforsecurity=False)
        for chunk in self.chunks(start, end):
            seen.update(chunk)
        return seen

    def hashes(self, pieces: Sequence[tuple[int, int]]) -> tuple[str, list[str]]:
        """SHA-256 of the whole and of each piece (start and size), both at once: where all of it is hashed
        before the first byte is sent, another core has nothing else to do."""

        def each() -> list[str]:
            return [self.hashed("sha256", start + size, start).hexdigest() for start, size in pieces]

        with ThreadPoolExecutor(1) as beside:
            parts = beside.submit(each)
            return self.sha256().hexdigest(), parts.result()


def _print(info: os.stat_result) -> tuple[int, ...]:
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


@contextmanager
def opened(path: Path, still: bool = False) -> Iterator[Source]:
    """A regular file to send; a symbolic link is refused, not followed. `still`: not while it is written."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise StoreError(f"{path} is not a regular file")
        yield Source(fd, _still(fd) if still else info)
    finally:
        os.close(fd)


def _still(fd: int) -> os.stat_result:
    """The state of a file once it has not been written to for a moment.

    A write moves a file's times when it begins, in steps of some ms, and not again while it goes on: of a
    file that is younger, equal times before and after do not tell that what was read is one content.
    """
    for _ in range(MOMENTS):
        info = os.fstat(fd)
        age = time.time() - info.st_ctime
        if not 0 <= age < MOMENT:
            return info
        time.sleep(MOMENT - age)
    raise Changed("the file is being written to all the time")


@contextmanager
def written_aside(path: Path, durable: bool = True) -> Iterator[int]:
    """A file descriptor for a new file that becomes `path` when the block ends well, and else vanishes."""
    aside, fd = _aside(path)
    try:
        try:
            yield fd
            if durable:
                os.fsync(fd)
            aside.rename(path)
        finally:
            os.close(fd)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _aside(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, locked: who gets the lock after us knows that we are dead, and may remove
    the file."""
    start = path.name.encode(errors="replace")[:100].decode(errors="ignore")
    while True:
        aside = path.parent / f".{start}.tmp-{os.urandom(6).hex()}"
        fd = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks: then nobody gets it, and nothing is removed
            flock(fd, LOCK_EX)
        if os.fstat(fd).st_nlink:
            return aside, fd
        os.close(fd)


def is_aside(name: str) -> bool:
    """Whether a file of this name is being written, or was left by a process that died."""
    return name.startswith(".") and ".tmp-" in name


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
