"""One pass of the mirror, in the order of what a run needs to go on elsewhere.

First all without which it cannot: recipe, code, attempts, metrics. Then checkpoints (publish.py). Logs and
boards come last: when the time to save in is short, it is they that stay behind.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from launcher.checkpoints import Mark
from launcher.errors import StoreError
from launcher.mirror.form import Form
from launcher.mirror.layout import CODE, FORM, LAST, STATES, grows
from launcher.mirror.parallel import each
from launcher.mirror.publish import Publisher
from launcher.mirror.record import Known, Record
from launcher.mirror.scan import Print, Scan, scan
from launcher.rundir import RunDir
from launcher.storage import Changed, PreconditionFailed, Store
from launcher.storage.base import Version

log = logging.getLogger("launch.mirror")

LARGE = 8 << 20  # bytes from which on only the tail of a file that grows is sent
READS = 3  # of a file that changes while it is read


class Push:
    """Sends one run folder to `store`.

    `confirm` is called before what must not be published by somebody who has lost the run; it raises then.
    `published` is called when another checkpoint is in the store: the rest of the pass may be long.
    """

    def __init__(
        self,
        run: RunDir,
        store: Store,
        record: Record,
        kept: Callable[[Iterable[Mark]], set[Mark]],
        confirm: Callable[[], None],
        published: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._store, self._record, self._confirm = run, store, record, confirm
        self._published = published
        self._publisher = Publisher(run, store, record, kept, confirm)
        self._told: set[str] = set()
        self._problems: dict[str, str] = {}  # of this pass: what could not be read, and why

    @property
    def durable(self) -> Mark | None:
        """The newest checkpoint in the store."""
        return max(self._record.durable(), default=None)

    def send(self) -> None:
        """One pass. Raises StoreAway, StoreError; what was sent until then stays sent."""
        self._problems = {}
        self._record.known()
        try:
            wanted = self._publisher.wanted()  # before the rest is looked at: metrics then reach its step
            seen = self._send_needed()
            # One bad file must not keep all checkpoints here; but none goes before metrics that reach it.
            if self._run.metrics.name not in self._problems:
                self._send_checkpoints(set(wanted))
            self._send_files(seen.later)
        finally:
            self._record.save()
        if self._problems:
            raise StoreError("; ".join(self._problems.values()))

    def behind(self) -> list[str]:
        """Files that are here and not yet in the store as they are here, the weightiest first."""
        waiting: list[str] = []
        with contextlib.suppress(OSError):  # deleted meanwhile: the next pass counts again
            for mark in self._publisher.wanted():
                folder = self._run.checkpoints / mark.name
                waiting += [f"checkpoints/{mark.name}/{name}" for name in sorted(os.listdir(folder))]  # noqa: PTH208
            found = scan(self._run.path)
            waiting += [key for files in (found.needed, found.later) for key, _ in self._changed(files)]
            waiting += list(found.unreadable)
        return waiting

    def _send_needed(self) -> Scan:
        objects = self._record.known()
        found = scan(self._run.path, objects)
        for key, error in found.unreadable.items():
            self._unreadable(key, error)
        for key, problem in found.unfit.items():
            self._tell(f"{key!r} is not mirrored: {problem}")
        self._send_files(found.needed)
        self._send_form(found)
        for key in STATES:
            if key in objects and not os.path.lexists(self._run.path / key):
                self._confirm()
                self._store.delete(key)
                del objects[key]
        self._record.save()
        return found

    def _send_checkpoints(self, todo: set[Mark]) -> None:
        """Those in `todo`, newest first; where one is deleted here meanwhile, the newest there is then."""
        while mark := max(todo & set(self._publisher.wanted()), default=None):
            todo.discard(mark)
            try:
                if self._publisher.send(mark):
                    self._published()
                else:
                    newest = self._publisher.wanted()[:1]
                    self._send_needed()
                    todo.update(newest)
            except (Changed, OSError) as error:
                self._unreadable(f"checkpoints/{mark.name}", error)
            self._record.save()
        with contextlib.suppress(OSError):
            info = (self._run.path / LAST).lstat()
            print_ = Print(info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            self._send_files({LAST: print_})
        self._publisher.retain()

    def _send_files(self, files: Mapping[str, Print]) -> None:
        each(self._send_file, self._changed(files))

    def _changed(self, files: Mapping[str, Print]) -> list[tuple[str, Print]]:
        objects, changed = self._record.objects or {}, []
        for key, print_ in files.items():
            known = objects.get(key)
            # The snapshot of the code never changes: where only a listing tells of it, its size is enough.
            if known and known.print is None and key.startswith(CODE) and known.size == print_.size:
                objects[key] = known._replace(print=print_)
            elif known is None or known.print != print_:
                changed.append((key, print_))
        return changed

    def _send_file(self, wanted: tuple[str, Print]) -> None:
        key, print_ = wanted
        objects = self._record.known()
        self._confirm()
        try:
            put = self._put_growing if grows(key) else self._put_whole
            objects[key] = put(key, self._run.path / key, print_)
        except FileNotFoundError:
            pass  # gone since it was seen
        except (Changed, OSError) as error:
            self._unreadable(key, error)

    def _put_whole(self, key: str, path: Path, print_: Print) -> Known:
        for last in range(READS):
            try:
                version = self._store.put_file(key, path)
                break
            except Changed:
                if last == READS - 1:
                    raise
        return Known(version.size, version.etag, print_)

    def _put_growing(self, key: str, path: Path, print_: Print) -> Known:
        """As long as the file is now. Of a large one only the rest, if what was sent is how it begins."""
        known, version = self._record.known().get(key), None
        if known and LARGE <= known.size <= print_.size:
            with contextlib.suppress(PreconditionFailed, Changed):
                version = self._store.grow_file(key, path, Version(known.size, known.etag))
        version = version or self._store.put_file(key, path, growing=True)
        return Known(version.size, version.etag, print_)

    def _send_form(self, found: Scan) -> None:
        """What of the snapshot an object cannot be: links and executables, in a document of their own."""
        if not any(key.startswith(CODE) for key in found.needed):
            return
        data = Form(found.links, found.executable).data()
        digest, objects = hashlib.sha256(data).hexdigest(), self._record.known()
        if FORM not in objects or objects[FORM].sha256 != digest:
            self._confirm()
            objects[FORM] = Known(len(data), self._store.put_bytes(FORM, data), None, digest)

    def _unreadable(self, key: str, error: Exception) -> None:
        self._problems[key] = f"{key} could not be read: {error}"

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning(message)
