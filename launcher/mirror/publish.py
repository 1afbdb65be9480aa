"""Checkpoints on their way to the store: data, then manifest; and those that need not stay there.

A manifest in the store means that the run can go on from there with nothing else (docs/contract.md).
"""

import contextlib
import logging
from collections.abc import Callable, Iterable

from launcher.checkpoints import MANIFEST, File, Mark, checkpoints, mark_of, read_manifest, verify_files
from launcher.mirror.layout import LAST
from launcher.mirror.record import Known, Record
from launcher.rundir import RunDir, read_json
from launcher.storage import Changed, PreconditionFailed, Store

log = logging.getLogger("launch.mirror")


class Another(Exception):
    """Something else is in the store under a checkpoint's name: it stays as it is."""


class Publisher:
    """The checkpoints of one run in `store`, of which those that `kept` picks stay."""

    def __init__(
        self,
        run: RunDir,
        store: Store,
        record: Record,
        kept: Callable[[Iterable[Mark]], set[Mark]],
        confirm: Callable[[], None],
    ) -> None:
        self._run, self._store, self._record, self._kept, self._confirm = run, store, record, kept, confirm
        self._broken: set[Mark] = set()

    def wanted(self) -> list[Mark]:
        """Checkpoints to send, newest first; none that the store would not keep. One that has lost a file
        there, and is here, is sent again."""
        here, durable = set(checkpoints(self._run)) - self._broken, self._record.durable()
        whole = {mark for mark in durable if mark not in here or self._is_whole(mark)}
        return sorted(self._kept(here | durable) - whole, reverse=True)

    def _is_whole(self, mark: Mark) -> bool:
        """Whether the store holds all files of a checkpoint that is here."""
        try:
            manifest = (self._run.checkpoints / mark.name / MANIFEST).read_bytes()
            files, objects = read_manifest(manifest, mark), self._record.known()
        except (OSError, ValueError):
            return True  # it cannot be sent from here
        there = {name: objects.get(f"checkpoints/{mark.name}/{name}") for name in files}
        return all(known and known.size == files[name].size for name, known in there.items())

    def send(self, mark: Mark) -> bool:
        """False if the program deleted the checkpoint meanwhile: then nothing of it stays in the store.

        Raises OSError or Changed (it cannot be read), StoreAway, StoreError.
        """
        try:
            return self._send(mark)
        except Another as error:
            self._broken.add(mark)
            log.warning("checkpoint %s is not mirrored: %s is in the store, and is another", mark.name, error)
            return True

    def _send(self, mark: Mark) -> bool:
        folder, objects = self._run.checkpoints / mark.name, self._record.known()
        try:
            manifest = (folder / MANIFEST).read_bytes()
            files = read_manifest(manifest, mark)
            reason = verify_files(folder, files)
            if reason is None:
                for name, file in files.items():
                    self._put_once(mark, name, file)
        except (FileNotFoundError, Changed):
            if (folder / MANIFEST).exists():
                raise
            reason = "it is gone"
        except ValueError as error:
            reason = str(error)
        if reason:
            return self._given_up(mark, reason)
        self._confirm()
        key = f"checkpoints/{mark.name}/{MANIFEST}"
        try:
            etag = self._store.put_bytes(key, manifest, if_absent=True)
        except PreconditionFailed as error:
            if self._store.get_bytes(key)[0] != manifest:
                raise Another(key) from error
            etag = ""  # sent by one of us who died before it was noted
        objects[key] = Known(len(manifest), etag)
        return True

    def _given_up(self, mark: Mark, reason: str) -> bool:
        """Gone here, or broken. Without a manifest, what there is of it in the store is nothing."""
        gone = not (self._run.checkpoints / mark.name / MANIFEST).exists()
        if not gone:
            self._broken.add(mark)
            log.warning("checkpoint %s is not mirrored: %s", mark.name, reason)
        if mark not in self._record.durable():
            self._delete(key for key in self._record.known() if _mark(key) == mark)
        return not gone

    def _put_once(self, mark: Mark, name: str, file: File) -> None:
        """A file that never changes. One that is there already was sent by us: its key has our fence."""
        key, objects = f"checkpoints/{mark.name}/{name}", self._record.known()
        if key in objects and objects[key].size == file.size:
            return
        self._confirm()
        path = self._run.checkpoints / mark.name / name
        try:
            version = self._store.put_file(key, path, if_absent=True)
            objects[key] = Known(version.size, version.etag)
        except PreconditionFailed:
            there = self._store.stat(key)
            if there.size != file.size or there.sha256 not in (None, file.sha256):
                raise Another(key) from None
            objects[key] = Known(there.size, there.etag)

    def retain(self) -> None:
        """Delete checkpoints that need not stay, manifest first, and halves that no manifest will follow."""
        durable = self._record.durable()
        if not durable:
            return
        latest = (read_json(self._run.path / LAST) or {}).get("name")
        kept, here = self._kept(durable), set(checkpoints(self._run))
        doomed = []
        for key in self._record.known():
            mark = _mark(key)
            if mark and mark not in kept and mark < max(durable) and mark.name != latest:
                doomed += [key] if mark in durable or mark not in here else []
        self._delete(doomed)

    def _delete(self, keys: Iterable[str]) -> None:
        for key in sorted(keys, key=lambda key: not key.endswith(f"/{MANIFEST}")):
            self._confirm()
            self._store.delete(key)
            with contextlib.suppress(KeyError):
                del self._record.known()[key]


def _mark(key: str) -> Mark | None:
    """The checkpoint that a key belongs to."""
    parts = key.split("/")
    return mark_of(parts[1]) if len(parts) > 2 and parts[0] == "checkpoints" else None
