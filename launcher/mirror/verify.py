"""Every checkpoint of a run read again, here and in its store: what could be resumed from, what is broken."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from launcher import checkpoints as ckpt
from launcher.checkpoints import MANIFEST, Mark
from launcher.mirror.layout import marks_of
from launcher.mirror.restore import manifest_in
from launcher.rundir import RunDir
from launcher.storage import NotFound, Store
from launcher.storage.base import Damaged

WHOLE = "whole"
Advance = Callable[[str], object]


@dataclass
class Verdict:
    """One checkpoint in the folder and in the store: WHOLE, how it is broken, or None if it is not there."""

    mark: Mark
    size: int = 0
    here: str | None = None
    store: str | None = None

    @property
    def whole(self) -> bool:
        return WHOLE in (self.here, self.store)

    @property
    def broken(self) -> bool:
        return any(said not in (WHOLE, None) for said in (self.here, self.store))


def verify(run: RunDir | None, store: Store | None, advance: Advance = lambda name: None) -> list[Verdict]:
    """The checkpoints of the run folder and of the store, newest first, each read whole.

    The run may go on meanwhile: a checkpoint that is deleted while it is read counts for nothing. `advance`
    hears the name of each before it is read. Raises StoreAway, StoreError.
    """
    if store:
        store.check()
    here = ckpt.checkpoints(run) if run else []
    there = marks_of(entry.key for entry in store.list("checkpoints/")) if store else []
    found = []
    for mark in sorted({*here, *there}, reverse=True):
        advance(mark.name)
        verdict = Verdict(mark)
        if run and mark in here:
            _look_here(run, verdict)
        if store and mark in there:
            _look_there(store, verdict)
        if verdict.here or verdict.store:
            found.append(verdict)
    return found


def newest_whole(verdicts: Iterable[Verdict]) -> Mark | None:
    """What a resume goes on from."""
    return next((verdict.mark for verdict in verdicts if verdict.whole), None)


def _look_here(run: RunDir, verdict: Verdict) -> None:
    folder = run.checkpoints / verdict.mark.name
    said = ckpt.verify(folder) or WHOLE
    if said == WHOLE or (folder / MANIFEST).exists():
        verdict.here, verdict.size = said, _size(folder)


def _size(folder: os.PathLike[str]) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.name != MANIFEST)
    except OSError:
        return 0


def _look_there(store: Store, verdict: Verdict) -> None:
    mark, said = verdict.mark, WHOLE
    try:
        _, files = manifest_in(store, mark)
        verdict.size = sum(file.size for file in files.values())
        for name, file in files.items():
            key = f"checkpoints/{mark.name}/{name}"
            looks = (store.digest(key) for _ in range(2))  # what came may have been damaged on its way
            if (file.size, file.sha256) not in looks:
                said = f"{name} does not have the hash that its manifest says"
                break
    except (NotFound, Damaged) as error:
        said = error.message
    except ValueError as error:
        said = str(error)
    manifest = f"checkpoints/{mark.name}/{MANIFEST}"
    if said == WHOLE or any(entry.key == manifest for entry in store.list(manifest)):
        verdict.store = said
