"""One pass of the mirror: what of a run folder goes to the store, and in which order.

First everything that is no checkpoint, then checkpoints: data, then manifest. So a manifest in the store
means that the run can go on from there with nothing else (docs/contract.md, "In the store").
"""

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from launcher.checkpoints import MANIFEST, Mark, checkpoints, mark_of, read_manifest, verify_files
from launcher.errors import StoreError
from launcher.rundir import RunDir
from launcher.storage import Changed, PreconditionFailed, Store, key_problem

log = logging.getLogger("launch.mirror")

NOT_MIRRORED = {
    *("lease.json", "synced.json", "owner.json", "resume_requested", "code/.git", "checkpoints"),
    *("rendezvous.json", "nodes"),  # of this moment, and of these machines
    "submitit",  # pickles: whoever could write them into a bucket would run code where they are loaded
}
LAST = "checkpoints/latest.json"  # names a checkpoint, so it follows them
STATES = ("stop_requested", "final.json")  # their absence says something: what is gone here goes there


class Print(NamedTuple):
    """What tells one content of a file from the next."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, info: os.stat_result) -> "Print":
        return cls(info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


class Push:
    """Sends one run folder to `store`, and remembers what is there.

    `confirm` is called before what must not be published by somebody who has lost the run; it raises then.
    """

    def __init__(self, run: RunDir, store: Store, keep: int, confirm: Callable[[], None]) -> None:
        self._run, self._store, self._keep, self._confirm = run, store, max(1, keep), confirm
        self._sent: dict[str, Print] = {}
        self._there: dict[str, int] | None = None  # keys and sizes in the store; None: not listed yet
        self._broken: set[Mark] = set()
        self._told: set[str] = set()
        self._problems: dict[str, str] = {}  # of this pass: what could not be read, and why

    @property
    def durable(self) -> Mark | None:
        """The newest checkpoint in the store."""
        return max(self._durable(), default=None)

    def send(self) -> None:
        """One pass. Raises StoreAway, StoreError; what was sent until then stays sent."""
        there = self._list()
        wanted = self._wanted()  # before the rest is looked at: metrics that are sent then reach its step
        self._problems = {}
        for key, path, print_ in self._changed():
            self._confirm()
            try:
                self._store.put_file(key, path)
            except FileNotFoundError:
                continue
            except (Changed, OSError) as error:
                self._unreadable(key, error)
                continue
            self._sent[key], there[key] = print_, print_.size
        for key in STATES:
            if key in there and not os.path.lexists(self._run.path / key):
                self._confirm()
                self._store.delete(key)
                del there[key]
                self._sent.pop(key, None)
        # One bad file must not keep all checkpoints here; but none goes before metrics that reach its step.
        if self._run.metrics.name not in self._problems:
            for mark in wanted:
                try:
                    self._send_checkpoint(mark)
                except (Changed, OSError) as error:
                    self._unreadable(f"checkpoints/{mark.name}", error)
            self._send_hint()
            self._retain()
        if self._problems:
            raise StoreError("; ".join(self._problems.values()))

    def behind(self) -> int:
        """How many files are here and not yet in the store as they are here."""
        waiting = 0
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile: the next pass counts again
            for _ in self._changed():
                waiting += 1
            for mark in self._wanted():
                waiting += len(list((self._run.checkpoints / mark.name).iterdir()))
        return waiting

    def _list(self) -> dict[str, int]:
        if self._there is None:
            self._there = {entry.key: entry.size for entry in self._store.list()}
        return self._there

    def _durable(self) -> set[Mark]:
        folders = (key.split("/") for key in self._there or () if key.startswith("checkpoints/"))
        marks = (mark_of(parts[1]) for parts in folders if len(parts) == 3 and parts[2] == MANIFEST)
        return {mark for mark in marks if mark}

    def _wanted(self) -> list[Mark]:
        """Checkpoints to send, newest first; none that the store would not keep."""
        here, durable = set(checkpoints(self._run)) - self._broken, self._durable()
        kept = sorted(here | durable, reverse=True)[: self._keep]
        return [mark for mark in kept if mark not in durable]

    def _changed(self) -> Iterator[tuple[str, Path, Print]]:
        for key, path, print_ in self._files(self._run.path, ""):
            if self._sent.get(key) == print_:
                continue
            # The snapshot of the code never changes: after a restart it need not be sent again.
            if key.startswith("code/") and (self._there or {}).get(key) == print_.size:
                self._sent[key] = print_
                continue
            yield key, path, print_

    def _files(self, folder: Path, prefix: str) -> Iterator[tuple[str, Path, Print]]:
        """Regular files below `folder` that are mirrored; symbolic links are not followed."""
        try:
            paths = sorted(folder.iterdir())
        except FileNotFoundError:
            raise
        except OSError as error:
            return self._unreadable(prefix.rstrip("/"), error)
        for path in paths:
            key = prefix + path.name
            if key in NOT_MIRRORED or is_temporary(path.name):
                continue
            try:
                info = path.lstat()
                if stat.S_ISDIR(info.st_mode):
                    yield from self._files(path, key + "/")
                    continue
            except FileNotFoundError:
                continue  # gone since the folder was listed
            except OSError as error:
                self._unreadable(key, error)
                continue
            problem = key_problem(key) or (None if stat.S_ISREG(info.st_mode) else "it is no regular file")
            if problem:
                self._tell(f"{key!r} is not mirrored: {problem}")
            else:
                yield key, path, Print.of(info)

    def _send_checkpoint(self, mark: Mark) -> None:
        """Data, then manifest; nothing if the checkpoint is broken, or is deleted here meanwhile."""
        folder, prefix, there = self._run.checkpoints / mark.name, f"checkpoints/{mark.name}/", self._list()
        try:
            manifest = (folder / MANIFEST).read_bytes()
            files = read_manifest(manifest, mark)
            reason = verify_files(folder, files)
        except FileNotFoundError:
            return
        except ValueError as error:
            reason = str(error)
        if reason:
            if (folder / MANIFEST).exists():
                self._broken.add(mark)
                log.warning("checkpoint %s is not mirrored: %s", mark.name, reason)
            return
        for name, file in files.items():
            key = prefix + name
            if there.get(key) != file.size:
                self._confirm()
                try:
                    self._put_once(key, folder / name, file.size)
                except FileNotFoundError:
                    return
                there[key] = file.size
        self._confirm()
        try:
            self._store.put_bytes(prefix + MANIFEST, manifest, if_absent=True)
        except PreconditionFailed as error:
            raise StoreError(f"{prefix}{MANIFEST} is in the store already, and is another one") from error
        there[prefix + MANIFEST] = len(manifest)

    def _put_once(self, key: str, path: Path, size: int) -> None:
        """A file that never changes. One that is there already was sent by us: its key has our fence."""
        try:
            self._store.put_file(key, path, if_absent=True)
        except PreconditionFailed as error:
            if size not in [entry.size for entry in self._store.list(key) if entry.key == key]:
                raise StoreError(f"{key} is in the store already, with another size") from error

    def _send_hint(self) -> None:
        path = self._run.path / LAST
        with contextlib.suppress(OSError):
            print_ = Print.of(path.lstat())
            if self._sent.get(LAST) != print_:
                self._confirm()
                self._store.put_file(LAST, path)
                self._sent[LAST] = print_

    def _retain(self) -> None:
        """Delete checkpoints beyond `keep`, manifest first, and halves that no manifest will follow."""
        durable = sorted(self._durable(), reverse=True)
        if not durable:
            return
        kept, here = set(durable[: self._keep]), set(checkpoints(self._run))
        keys: dict[Mark, list[str]] = {}
        for key in self._list():
            mark = mark_of(key.split("/")[1]) if key.startswith("checkpoints/step-") else None
            if mark and mark not in kept and mark < durable[0] and (mark in durable or mark not in here):
                keys.setdefault(mark, []).append(key)
        for mark, doomed in keys.items():
            for key in sorted(doomed, key=lambda key: not key.endswith(f"{mark.name}/{MANIFEST}")):
                self._confirm()
                self._store.delete(key)
                del self._list()[key]

    def _unreadable(self, key: str, error: Exception) -> None:
        self._problems[key] = f"{key} could not be read: {error}"

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning(message)


def is_temporary(name: str) -> bool:
    """Names of files that are being written, or were left by a process that died."""
    return name.startswith(".") and ".tmp-" in name
