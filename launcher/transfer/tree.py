"""A folder that is written to by keys from outside, and never left.

Each folder on the way to a file is opened from the one above it, and none through a symbolic link, so what
somebody puts in the way meanwhile makes an error and not a file elsewhere (openat(2), O_NOFOLLOW).
"""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from launcher.transfer.scan import TEMPORARY

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def set_time(path: Path, mtime: float) -> None:
    when = round(mtime * 1e9)
    os.utime(path, ns=(when, when), follow_symlinks=False)


class Tree:
    """The folder `root`, which is made when it is needed first."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def obstacles(self, keys: Iterable[str]) -> list[str]:
        """Sentences about what lies where a folder or file has to be. Changes nothing."""
        said, folders = [], {}
        for key in keys:
            head = key.rpartition("/")[0]
            if head and head not in folders:
                folders[head] = self._blocked(head)
                said += [folders[head]] if folders[head] else []
            if not (head and folders[head]) and (kind := self._kind(key)) not in (None, "file"):
                said.append(f"{self.root}/{key}: there is a {kind} of this name")
        return list(dict.fromkeys(said))

    @contextmanager
    def parent(self, key: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """The open folder that `key` lies in, and its name there."""
        *folders, name = key.split("/")
        try:
            fd = os.open(self.root, FOLDER)
        except FileNotFoundError:
            if not make:
                raise
            self.root.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.root, FOLDER)
        try:
            for folder in folders:
                below = _step(fd, folder, make)
                os.close(fd)
                fd = below
            yield fd, name
        finally:
            os.close(fd)

    @contextmanager
    def place(self, key: str) -> Iterator[Path]:
        """A path for `key` that leads through the open folder, so it stays there whatever is renamed."""
        with self.parent(key, make=True) as (fd, name):
            yield Path(f"/proc/self/fd/{fd}/{name}")

    def remove(self, key: str) -> None:
        """Delete a file, and the folders that it leaves empty."""
        with self.parent(key) as (fd, name):
            os.unlink(name, dir_fd=fd)
        while folder := key.rpartition("/")[0]:
            key = folder
            try:
                with self.parent(folder) as (fd, name):
                    os.rmdir(name, dir_fd=fd)
            except OSError:
                return

    def clean(self, temporary: Iterable[str]) -> None:
        """Remove the temporary files that no living process holds (see `written_aside`)."""
        for key in temporary:
            with suppress(OSError), self.parent(key) as (fd, name):
                file = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
                try:
                    flock(file, LOCK_EX | LOCK_NB)
                    os.unlink(name, dir_fd=fd)
                finally:
                    os.close(file)

    def _blocked(self, folder: str) -> str:
        parts = folder.split("/")
        for end in range(1, len(parts) + 1):
            path = "/".join(parts[:end])
            if (kind := self._kind(path)) not in (None, "folder"):
                return f"{self.root}/{path}: a {kind} is where a folder has to be"
        return ""

    def _kind(self, key: str) -> str | None:
        try:
            mode = os.lstat(f"{self.root}/{key}").st_mode >> 12
        except (FileNotFoundError, NotADirectoryError):
            return None
        return {0o04: "folder", 0o10: "file", 0o12: "symbolic link"}.get(mode, "device, pipe or socket")


def _step(fd: int, folder: str, make: bool) -> int:
    flags = FOLDER | os.O_NOFOLLOW
    try:
        return os.open(folder, flags, dir_fd=fd)
    except FileNotFoundError:
        if not make:
            raise
        with suppress(FileExistsError):  # another thread was faster
            os.mkdir(folder, dir_fd=fd)
        return os.open(folder, flags, dir_fd=fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise OSError(error.errno, f"{folder!r} on the way is not a folder any more") from None
        raise


def drop_temporary() -> None:
    """Remove the temporary files that this process is writing just now: it is about to end."""
    for open_file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            path = Path(os.readlink(open_file))  # noqa: PTH115 - and nothing normalised
            if TEMPORARY.fullmatch(path.name):
                path.unlink()
