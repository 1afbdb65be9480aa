"""The way back: from the store to a run folder that lacks something.

Keys are names from outside: each is checked before a path is made of it. Everything is written aside first.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher import checkpoints as ckpt
from launcher.checkpoints import MANIFEST, Mark
from launcher.errors import StoreError
from launcher.mirror.push import LAST, NOT_MIRRORED, STATES, is_temporary
from launcher.rundir import RunDir, read_jsonl, sync_dir
from launcher.storage import Entry, NotFound, Store, key_problem

log = logging.getLogger("launch.mirror")

HISTORY = ("metrics.jsonl", "timing.jsonl")  # cut to a checkpoint's step on resume, so they come with it
OF_THE_MOMENT = {*STATES, "heartbeat.json", "outcome.json", "attempts.jsonl", LAST}


def checkpoints_in(store: Store) -> list[Mark]:
    """Checkpoints that have a manifest in the store, newest first."""
    return marks_of(entry.key for entry in store.list("checkpoints/"))


def marks_of(keys: Iterable[str]) -> list[Mark]:
    folders = (key.split("/") for key in keys)
    names = (p[1] for p in folders if len(p) == 3 and p[0] == "checkpoints" and p[2] == MANIFEST)
    return sorted((mark for mark in map(ckpt.mark_of, names) if mark), reverse=True)


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
    marks = marks_of(keys)
    here = ckpt.newest(run) if marks else None
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
    _merge_attempts(run, store, keys)
    for key in keys:
        path = run.path / key
        if key not in OF_THE_MOMENT and not key.startswith("checkpoints/") and not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(key, path)


def _merge_attempts(run: RunDir, store: Store, keys: dict[str, int]) -> None:
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
    sizes = {entry.key: entry.size for entry in store.list(prefix)}
    try:
        data, _ = store.get_bytes(prefix + MANIFEST)
        files = ckpt.read_manifest(data, mark)
        for name, file in files.items():  # before anything big is brought
            if sizes.get(prefix + name) != file.size:
                return f"{name} has {sizes.get(prefix + name, 'no')} bytes instead of {file.size}"
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            store.get_file(prefix + name, folder / name)
    except ValueError as error:
        return str(error)
    except NotFound as error:
        return error.message
    reason = ckpt.verify_files(folder, files)
    if reason is None:
        with (folder / MANIFEST).open("wb") as manifest:
            manifest.write(data)
            manifest.flush()
            os.fsync(manifest.fileno())
        sync_dir(folder)
    return reason


def put_in_place(folder: Path, target: Path) -> None:
    if target.exists():  # the same checkpoint, broken here
        target.rename(folder.with_name("broken"))
    folder.rename(target)
    sync_dir(target.parent)


def safe_keys(entries: Iterable[Entry]) -> dict[str, int]:
    """Keys and sizes that belong to a run folder. StoreError if one of them would leave it."""
    keys = {entry.key: entry.size for entry in entries}
    folders = {parent for key in keys for parent in _parents(key)}
    for key in keys:
        problem = key_problem(key) or ("it is a file and a folder at once" if key in folders else None)
        if problem:
            raise StoreError(
                f"the store holds the key {key!r}, which is not safe to write: {problem}",
                "somebody else has written there; nothing was brought",
            )
    return {key: size for key, size in keys.items() if _is_ours(key)}


def _parents(key: str) -> Iterator[str]:
    while "/" in key:
        key = key.rpartition("/")[0]
        yield key


def _is_ours(key: str) -> bool:
    parts = key.split("/")
    if any(is_temporary(part) for part in parts) or (NOT_MIRRORED - {"checkpoints"}) & {key, *_parents(key)}:
        return False
    return parts[0] != "checkpoints" or key == LAST or (len(parts) > 2 and ckpt.mark_of(parts[1]) is not None)
