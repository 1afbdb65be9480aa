"""The queue's folder, one per machine and for all its users: a file for each run that waits or holds.

Its files and rules: docs/contract.md. Whoever decides holds the folder's lock (flock(2)); giving back what
one has needs none. Nothing in the folder is trusted, for all users of the machine may write there.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.rundir import RunDir, write_json
from launcher.workstation.devices import KINDS
from launcher.workstation.order import Claim

DEFAULT = "/var/tmp/launch-queue"
LARGEST = 65536  # bytes of an entry; more is not ours
POLL = 0.05  # seconds between two tries to get the lock

Born = tuple[int, int]  # pid and start time


@dataclass(frozen=True, kw_only=True)
class Entry(Claim):
    """A run in the queue. It stands as long as its supervisor or its guard lives."""

    folder: str
    uid: int
    boot: str
    supervisor: Born
    guard: Born | None
    grace: float  # seconds that its workers have to save, should somebody else have to end them


class Busy(OSError):
    """Somebody else has the lock."""


def folder() -> Path:
    return Path(os.environ.get("LAUNCH_QUEUE") or DEFAULT)


def key(run: RunDir) -> str:
    """The name of a run's file: a copy of the run in another folder has one of its own."""
    return f"{run.id}-{hashlib.sha256(os.fsencode(run.path)).hexdigest()[:8]}.json"


def check() -> None:
    """Raises UserError if the queue cannot be used; makes nothing."""
    path = folder()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(
            f"the queue {path} is no folder", "Take it away, or set LAUNCH_QUEUE to another path."
        )
    there = next(above for above in (path, *path.absolute().parents) if above.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"the queue {path} cannot be written", "Set LAUNCH_QUEUE to a folder of this machine."
        )


class Queue:
    """The folder, opened: all is done in this one, whatever its path comes to mean."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._path = Path(f"/proc/self/fd/{fd}")

    def entries(self) -> list[Entry]:
        """All that can be read and is its owner's."""
        names = sorted(path.name for path in self._path.glob("*.json"))
        return [entry for name in names if (entry := self.read(name))]

    def read(self, name: str) -> Entry | None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._fd)
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
                return None
            entry = _parse(name, json.loads(os.read(fd, LARGEST)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            return None
        finally:
            os.close(fd)
        return entry if entry.uid == status.st_uid else None

    def write(self, entry: Entry) -> None:
        """Raises OSError."""
        said = asdict(entry)
        path = self._path / said.pop("key")
        write_json(path, {"schema": 1} | said)
        path.chmod(0o644)  # all users count it, whatever the umask of this one

    def remove(self, name: str) -> None:
        """And what a writer that was killed has left beside it. Raises OSError."""
        for path in (self._path / name, *self._path.glob(f".{name}.tmp-*")):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def opened() -> Iterator[Queue]:
    """The queue, made if it is not there. Raises OSError."""
    path = folder()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        before = os.umask(0)  # with its mode from the first moment on, or the next user is locked out
        try:
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o1777)
        finally:
            os.umask(before)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield Queue(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def held(patience: float) -> Iterator[Queue]:
    """The queue under its lock. Raises Busy after `patience` seconds, OSError."""
    with opened() as queue:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(queue._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise Busy(f"somebody else has the lock of {folder()}") from None
                time.sleep(POLL)
        yield queue  # closing it lets go of the lock


def _parse(name: str, said: Any) -> Entry:
    """Raises whatever it may if this is no entry: any user can have written it."""
    run, wanted = str(said["run"]), {str(kind): int(amount) for kind, amount in said["wants"].items()}
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", run):  # it is shown in terminals
        raise ValueError(run)
    if not set(wanted) <= set(KINDS) or min(wanted.values(), default=0) < 0:
        raise ValueError(wanted)
    return Entry(
        key=name,
        run=run,
        priority=int(said["priority"]),
        ticket=int(said["ticket"]),
        preemptible=said["preemptible"] is True,
        wants=wanted,
        visible=tuple(map(str, said["visible"])),
        holding=said["holding"] is True,
        devices=tuple(map(str, said["devices"])),
        folder=str(said["folder"]),
        uid=int(said["uid"]),
        boot=str(said["boot"]),
        supervisor=_born(said["supervisor"]),
        guard=_born(said["guard"]) if said["guard"] else None,
        grace=float(said["grace"]),
    )


def _born(said: Any) -> Born:
    pid, start = said
    return int(pid), int(start)
