"""The way back: from the store to a run folder that lacks something.

Keys are names from outside: each is checked before a path is made of it. Everything is written aside first.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher import checkpoints as ckpt
from launcher.checkpoints import MANIFEST, File, Mark
from launcher.errors import StoreError
from launcher.mirror import form
from launcher.mirror.layout import FORM, LAST, NOT_MIRRORED, STATES, marks_of, parents_of
from launcher.mirror.parallel import each
from launcher.rundir import RunDir, read_jsonl, sync_dir
from launcher.storage import Entry, NotFound, PreconditionFailed, Store, key_problem
from launcher.storage.base import MAX_DOCUMENT, Damaged
from launcher.storage.files import is_aside

log = logging.getLogger("launch.mirror")

HISTORY = ("metrics.jsonl", "timing.jsonl")  # cut to a checkpoint's step on resume, so they come with it
OF_THE_MOMENT = {*STATES, "heartbeat.json", "outcome.json", "attempts.jsonl", LAST, FORM}


def restore(run: RunDir, store: Store) -> None:
    """Bring the newest whole checkpoint if it is newer than what is here, and files that the folder lacks.

    Files that are here win, except for metrics and timing where a checkpoint is brought: they must reach its
    step. Raises StoreAway, StoreError (also if the folder cannot be written).
    """
    try:
        _restore(run, store)
    except OSError as error:
        raise StoreError(f"{error.filename or run.path} cannot be written: {error.strerror}") from error


def _restore(run: RunDir, store: Store) -> None:
    for folder in (run.path, run.checkpoints):  # left by one that was killed
        for left in folder.glob(".tmp-restore-*"):
            shutil.rmtree(left)
    keys = safe_keys(store.list())
    if run.run.name in keys:
        about(store, run.id)
    snapshot, lacking = form.read(store, keys), [key for key in keys if _is_lacking(run, key)]
    _bring_newest(run, store, keys)
    _merge_attempts(run, store, keys)
    bring(store, run.path, [keys[key] for key in lacking])
    snapshot.give(run.code, lacking)


def _bring_newest(run: RunDir, store: Store, keys: Mapping[str, Entry]) -> None:
    def say(mark: Mark, reason: str) -> None:
        log.warning("passed over checkpoint %s here: %s", mark.name, reason)

    marks = marks_of(keys)
    here = ckpt.newest(run, say) if marks else None
    for mark in marks:
        if here is not None and mark <= here:
            break
        with brought(store, mark, run.checkpoints) as (folder, reason):
            if reason is None:
                for name in HISTORY:
                    if name in keys:
                        store.get_file(name, run.path / name)
                put_in_place(folder, run.checkpoints / mark.name)
                log.info("brought checkpoint %s from %s", mark.name, store.url)
                break
        log.warning("passed over checkpoint %s in %s: %s", mark.name, store.url, reason)


def _is_lacking(run: RunDir, key: str) -> bool:
    """Whether a file is to be brought. StoreError if it would be written through a symbolic link."""
    if key in OF_THE_MOMENT or key.startswith("checkpoints/") or os.path.lexists(run.path / key):
        return False
    for parent in parents_of(key):
        if (run.path / parent).is_symlink():
            raise StoreError(
                f"{run.path / parent} is a symbolic link, and {key!r} would be written through it",
                "replace the link by a folder; nothing was brought",
            )
    return True


def _merge_attempts(run: RunDir, store: Store, keys: Mapping[str, Entry]) -> None:
    """Attempts made on another machine are part of the run's history; what is said here of one wins."""
    if run.attempts.name not in keys:
        return
    with tempfile.TemporaryDirectory(prefix=".tmp-restore-", dir=run.path) as aside:
        copy = Path(aside, run.attempts.name)
        store.get_file(run.attempts.name, copy)
        theirs, ours = read_jsonl(copy), read_jsonl(run.attempts)
        known = {(line.get("attempt"), line.get("event")) for line in ours}
        new = [line for line in theirs if (line.get("attempt"), line.get("event")) not in known]
        if new:
            lines = sorted(new + ours, key=_attempt_order)
            copy.write_text("".join(json.dumps(line) + "\n" for line in lines))
            with copy.open("rb") as written:
                os.fsync(written.fileno())
            copy.rename(run.attempts)
            sync_dir(run.path)


def _attempt_order(line: dict[str, Any]) -> tuple[int, bool]:
    attempt = line.get("attempt")
    return attempt if isinstance(attempt, int) else 0, line.get("event") != "start"


def about(store: Store, name: str) -> dict[str, Any]:
    """run.json in the store. StoreError if it is not that of the run `name`."""
    try:
        record = json.loads(store.get_bytes("run.json")[0])
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or record.get("id") != name:
        raise StoreError(f"{store.url} is no whole run: its run.json is torn, or another run's")
    return record


def bring(
    store: Store, folder: Path, entries: Collection[Entry], advance: Callable[[], None] = lambda: None
) -> None:
    """Bring objects to their places below `folder`, many at once."""
    for parent in {(folder / entry.key).parent for entry in entries}:
        parent.mkdir(parents=True, exist_ok=True)

    def fetch(entry: Entry) -> None:
        try:
            store.get_file(entry.key, folder / entry.key, expect=entry)
        except PreconditionFailed:  # sent anew since it was listed
            store.get_file(entry.key, folder / entry.key)
        advance()

    each(fetch, entries)


@contextmanager
def brought(store: Store, mark: Mark, parent: Path) -> Iterator[tuple[Path, str | None]]:
    """(folder, None) with the verified checkpoint in a folder aside, or (folder, why it is not whole)."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-restore-", dir=parent, ignore_cleanup_errors=True) as aside:
        folder = Path(aside, mark.name)
        folder.mkdir()
        yield folder, _fetch(store, mark, folder)


def _fetch(store: Store, mark: Mark, folder: Path) -> str | None:
    """Data, hashes, then the manifest. Returns why the checkpoint in the store is not whole, or None."""
    prefix = f"checkpoints/{mark.name}/"
    try:
        data, files = manifest_in(store, mark)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            store.get_file(prefix + name, folder / name)
    except ValueError as error:
        return str(error)
    except (NotFound, Damaged) as error:
        return error.message
    reason = ckpt.verify_files(folder, files)
    if reason is None:
        with (folder / MANIFEST).open("wb") as manifest:
            manifest.write(data)
            manifest.flush()
            os.fsync(manifest.fileno())
        sync_dir(folder)
    return reason


def manifest_in(store: Store, mark: Mark) -> tuple[bytes, dict[str, File]]:
    """The manifest of a checkpoint in the store and the files it lists, all of which are there, as long as
    it says. ValueError says why not, before anything big is read. Raises NotFound, StoreAway, StoreError."""
    prefix = f"checkpoints/{mark.name}/"
    sizes = {entry.key: entry.size for entry in store.list(prefix)}
    if sizes.get(prefix + MANIFEST, 0) > MAX_DOCUMENT:
        raise ValueError("its manifest is too big to be one")
    data, _ = store.get_bytes(prefix + MANIFEST)
    files = ckpt.read_manifest(data, mark)
    for name, file in files.items():
        if sizes.get(prefix + name) != file.size:
            raise ValueError(f"{name} has {sizes.get(prefix + name, 'no')} bytes instead of {file.size}")
    return data, files


def put_in_place(folder: Path, target: Path) -> None:
    if target.exists():  # the same checkpoint, broken here
        target.rename(folder.with_name("broken"))
    folder.rename(target)
    sync_dir(target.parent)


def safe_keys(entries: Iterable[Entry]) -> dict[str, Entry]:
    """What belongs to a run folder, by key. StoreError if one of the keys would leave it."""
    keys = {entry.key: entry for entry in entries}
    folders = {parent for key in keys for parent in parents_of(key)}
    for key in keys:
        problem = key_problem(key) or ("it is a file and a folder at once" if key in folders else None)
        if problem:
            raise StoreError(
                f"the store holds the key {key!r}, which is not safe to write: {problem}",
                "somebody else has written there; nothing was brought",
            )
    return {key: entry for key, entry in keys.items() if _is_ours(key)}


def _is_ours(key: str) -> bool:
    parts = key.split("/")
    if any(is_aside(part) for part in parts) or (NOT_MIRRORED - {"checkpoints"}) & {key, *parents_of(key)}:
        return False
    return parts[0] != "checkpoints" or key == LAST or (len(parts) > 2 and ckpt.mark_of(parts[1]) is not None)
