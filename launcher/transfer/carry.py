"""Carries a plan out: many objects at once, each failure told and the rest still tried."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

from launcher.errors import LaunchError, StoreAway
from launcher.storage import Entry, key_problem
from launcher.transfer.places import Place
from launcher.transfer.plan import Plan, same_time
from launcher.transfer.report import Report, Summary
from launcher.transfer.tree import Tree, drop_temporary, set_time
from launcher.transfer.uploads import bucket_of, of_store

THREADS = 16
STOP_WITHIN = 1.5  # seconds for what is in flight to end in order; then it is left behind
BATCH = 1000  # objects in one request to delete
HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # for one file, and for all after it


class Stopped(LaunchError):
    """Raised inside a transfer that has to end."""


class Carrier:
    """Between two places; `move` deletes each object of the source once it has arrived."""

    def __init__(
        self, source: Place, target: Place, report: Report, stop: Callable[[], bool], *,
        move: bool = False, checksum: bool = False, dry_run: bool = False,
    ) -> None:  # fmt: skip
        self.source, self.target, self.report = source, target, report
        self.summary = Summary()
        self._stop, self._move, self._checksum, self._dry = stop, move, checksum, dry_run
        self._tree = Tree(target.root) if target.root is not None else None
        self._uploads = of_store(target.store)
        if move:
            self._verb = "move"
        elif (source.root is None) == (target.root is None):
            self._verb = "copy"
        else:
            self._verb = "upload" if target.root is None else "download"
        self._lock = threading.Lock()
        self._halted = False
        self._reached = 0.0  # when an object last got through
        self._error: BaseException | None = None

    def run(self, plan: Plan) -> None:
        self.summary.same += plan.same
        jobs = [(entry, key, False) for entry, key in plan.copy]
        jobs += [(entry, key, True) for entry, key in plan.look]
        self.report.begin(len(jobs), sum(entry.size for entry, _, _ in jobs))
        for place in (self.source, self.target):
            if bucket := bucket_of(place.store):
                bucket.watch = self._watch
        before = self._ended()
        if self._uploads and jobs and not self._dry:
            self._side_by_side([self._prepare])
        todo = iter(jobs)  # the next of a list is one instruction: threads may share it
        self._side_by_side([partial(self._work, todo)] * min(THREADS, len(jobs)))
        self.summary.left += len(jobs) - (self._ended() - before)

    def _prepare(self) -> None:
        """Once, and not by every thread in turn: a store that is away, or refuses us, is told in one line."""
        if self._uploads:
            self._uploads.clean()
        if self._verb == "upload" and (bucket := bucket_of(self.target.store)):
            _ = bucket.guard

    def _side_by_side(self, calls: Sequence[Callable[[], None]]) -> None:
        """In threads that can be left behind, so that a stop is heard. Raises what one of them raised."""

        def run(call: Callable[[], None]) -> None:
            try:
                call()
            except BaseException as error:
                self._error, self._halted = error, True

        threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        self._wait(threads)
        if self._error is not None:
            raise self._error

    def delete(self, keys: Sequence[str]) -> None:
        """Delete in the target."""
        todo = iter(keys)
        while not self._stopping() and (batch := list(islice(todo, BATCH))):
            for key in self._deleted(batch):
                self.summary.deleted += 1
                self._say("delete", self.target.show(key))
            self.report.tick()
        self.summary.left += len(list(todo))

    def _deleted(self, keys: list[str]) -> Iterator[str]:
        """Those that are gone now."""
        if self._dry:
            yield from keys
        elif self._tree is None:
            try:
                self._delete_objects(keys)
            except LaunchError as error:
                self._failed("delete", f"{self.target.show(keys[0])} and {len(keys) - 1} more", error.message)
            else:
                yield from keys
        else:
            for key in keys:
                try:
                    self._tree.remove(key)
                    yield key
                except OSError as error:
                    self._failed("delete", self.target.show(key), words(error))

    def _delete_objects(self, keys: list[str]) -> None:
        """Also those of names that we would never write: a bucket of them can be emptied."""
        store, good = self.target.store, [key for key in keys if not key_problem(key)]
        store.delete_many(good)
        if bucket := bucket_of(store):
            for key in set(keys).difference(good):
                bucket.ask("delete_object", getattr(store, "prefix", "") + key)

    def _work(self, todo: Iterator[tuple[Entry, str, bool]]) -> None:
        while not self._halted and (job := next(todo, None)) is not None:
            began = time.monotonic()
            if not self._one(*job) and self._reached < began:
                return  # nobody has got through since: there is no use in trying the next

    def _one(self, entry: Entry, key: str, look: bool) -> bool:
        """False if the store was away."""
        what = f"{self.source.show(entry.key)} to {self.target.show(key)}"
        try:
            if look and self._same(entry, key):
                with self._lock:
                    self.summary.same += 1
                self.report.moved(entry.size)
                return True
            if not self._dry:
                self._transfer(entry, key)
        except Stopped:
            return True
        except (LaunchError, OSError) as error:
            if isinstance(error, OSError) and error.errno in HOPELESS:
                self._halted = True
            self._failed(self._verb, what, words(error))
            return not isinstance(error, StoreAway)
        self._reached = time.monotonic()
        with self._lock:
            self.summary.done += 1
            self.summary.size += entry.size
        if (self.source.root is None) == (self.target.root is None):  # no piece passes by _watch
            self.report.moved(entry.size)
        self._say(self._verb, what)
        return True

    def _same(self, entry: Entry, key: str) -> bool:
        """Whether two objects of one size have one content. The times of a folder are set right, if so."""
        source, target = self.source.store, self.target.store
        known = None if self.source.root is not None else source.stat(entry.key)
        if self._tree is not None and known is not None and not self._checksum:
            if known.file_mtime_ns == os.lstat(f"{self._tree.root}/{key}").st_mtime_ns:
                return True  # it was uploaded from here
            if known.sha256 is None:
                return False
        elif not self._checksum:
            return False
        theirs = (known and known.sha256) or source.digest(entry.key)[1]
        there = None if self._tree is not None else target.stat(key).sha256
        if theirs != (there or target.digest(key)[1]):
            return False
        if self._tree is not None and not self._dry:
            with self._tree.place(key) as path:
                if not same_time(path.lstat().st_mtime, entry.mtime):
                    set_time(path, entry.mtime)
        return True

    def _transfer(self, entry: Entry, key: str) -> None:
        source, target = self.source, self.target
        file = None if source.root is None else source.root / entry.key
        before = file.lstat() if file and self._move else None
        etag = entry.etag
        if self._tree is not None:
            with self._tree.place(key) as path:
                etag = source.store.get_file(entry.key, path, durable=self._move, expect=entry).etag
                set_time(path, entry.mtime)
        elif file is not None:
            target.store.put_file(key, file)
        else:
            target.store.copy(key, source.store, entry.key, expect=entry)
        if not self._move:
            return
        if source.root is None:
            if source.store.stat(entry.key).etag != etag:
                raise LaunchError("it has arrived, but the source was changed meanwhile, and is left")
            source.store.delete(entry.key)
        elif file and before and unchanged(before, file.lstat()):
            Tree(source.root).remove(entry.key)
        else:
            raise LaunchError("it has arrived, but the source was changed meanwhile, and is left")

    def _watch(self, size: int) -> None:
        """Called by a store for every piece that it has sent or received."""
        if self._halted:
            raise Stopped("stopped")
        self.report.moved(size)

    def _wait(self, threads: Iterable[threading.Thread]) -> None:
        patience = STOP_WITHIN
        for thread in threads:
            while thread.is_alive() and patience > 0:
                thread.join(0.1)
                self.report.tick()
                if self._stopping() and thread.is_alive():
                    patience -= 0.1
        if patience <= 0:
            self._abandon()

    def _abandon(self) -> None:
        """What is in flight does not end: it goes on in threads that nobody waits for, and leaves nothing."""
        cleaning = threading.Thread(target=self._uploads.abandon, daemon=True) if self._uploads else None
        if cleaning:
            cleaning.start()
        drop_temporary()
        if cleaning:
            cleaning.join(STOP_WITHIN)

    def _stopping(self) -> bool:
        if self._stop():
            self._halted = self.summary.stopped = True
        return self.summary.stopped

    def _ended(self) -> int:
        return self.summary.done + self.summary.same + self.summary.failed

    def _say(self, verb: str, what: str) -> None:
        self.report.line(f"{'(dry run) ' if self._dry else ''}{verb}: {what}")

    def _failed(self, verb: str, what: str, why: str) -> None:
        with self._lock:
            self.summary.failed += 1
        self.report.problem(f"{verb} failed: {what}: {why}")


def words(error: LaunchError | OSError) -> str:
    if isinstance(error, LaunchError):
        return error.message
    return "it vanished meanwhile" if isinstance(error, FileNotFoundError) else str(error.strerror)


def unchanged(before: os.stat_result, after: os.stat_result) -> bool:
    def identity(info: os.stat_result) -> tuple[int, ...]:
        return (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)

    return identity(before) == identity(after)
