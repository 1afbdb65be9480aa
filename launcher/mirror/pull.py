"""A whole run from the store to a disk that has nothing of it, so that it goes on there."""

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from launcher.errors import StoreError, UserError
from launcher.mirror import form
from launcher.mirror.layout import FORM, LAST, marks_of
from launcher.mirror.ownership import PATIENCE, read_owner, watch
from launcher.mirror.restore import about, bring, brought, put_in_place, safe_keys
from launcher.rundir import RUN_ID, RunDir, read_json, sync_dir, write_json
from launcher.storage import Entry, Store, StoreSettings, reach

log = logging.getLogger("launch.mirror")

ASIDE = ".tmp-pull-"


def pull_run(
    url: str, settings: StoreSettings, runs_root: Path, accept: Callable[[RunDir], object] = lambda run: None
) -> RunDir:
    """Bring the whole run at `url` to a machine that has nothing of it, to go on there; its new folder.

    Made aside and renamed in one go: what fails leaves nothing behind. `accept` sees the run before its
    checkpoints are fetched; it may refuse by raising. Raises UserError (no such store, no run there, or it
    is here already, or finished), Taken (its owner lives), StoreAway, StoreError.
    """
    store = reach(url, settings)
    name = store.url.rpartition("/")[2]
    if RUN_ID.fullmatch(name) and os.path.lexists(runs_root / name):
        raise UserError(f"the run {name} is here already", f"launch resume {name}")
    listing = list(store.list())
    if not RUN_ID.fullmatch(name) or not any(entry.key == "run.json" for entry in listing):
        raise UserError(f"there is no run at {url}", "give the URL that `launch status RUN` shows")
    keys = safe_keys(listing)
    about(store, name)
    if _state(store, keys) == "finished":
        raise UserError(f"the run {name} is finished; there is nothing to resume")
    owner = read_owner(store)
    if owner is not None:
        if not owner[0].get("ended"):
            print(
                f"watching for up to {PATIENCE:g} s whether the run's last owner still lives",
                file=sys.stderr,
                flush=True,
            )
        watch(store, owner[0])
    fresh = not runs_root.exists()
    try:
        runs_root.mkdir(parents=True, exist_ok=True)
        with _folder_aside(runs_root) as folder:
            aside = RunDir(folder / name)
            _pull(store, keys, aside, accept)
            aside.path.rename(runs_root / name)
            sync_dir(runs_root)
    except OSError as error:
        raise UserError(f"{error.filename or runs_root} cannot be written: {error.strerror}") from error
    finally:
        if fresh:
            with suppress(OSError):  # it holds the run, if all went well
                runs_root.rmdir()
    return RunDir(runs_root / name)


@contextmanager
def _folder_aside(runs_root: Path) -> Iterator[Path]:
    """A folder that vanishes in the end; those of processes that were killed, which nobody locks, do now."""
    for held in runs_root.glob(f"{ASIDE}*/lock"):
        with suppress(OSError), held.open("r+b") as lock:
            flock(lock, LOCK_EX | LOCK_NB)
            shutil.rmtree(held.parent)
    with tempfile.TemporaryDirectory(prefix=ASIDE, dir=runs_root, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (folder / "new").open("wb") as lock:
            with suppress(OSError):  # a file system without locks: then nobody gets it, and all stays
                flock(lock, LOCK_EX)
            (folder / "new").rename(folder / "lock")
            yield folder


def _state(store: Store, keys: dict[str, Entry]) -> object:
    """The state in the store's final.json; None while the run has not ended."""
    try:
        return json.loads(store.get_bytes("final.json")[0])["state"] if "final.json" in keys else None
    except (ValueError, TypeError, KeyError):
        return None


def _pull(store: Store, keys: dict[str, Entry], aside: RunDir, accept: Callable[[RunDir], object]) -> None:
    snapshot, marks = form.read(store, keys), marks_of(keys)
    files = [entry for key, entry in keys.items() if not key.startswith("checkpoints/") or key == LAST]
    with _progress(f"bringing {aside.id}", len(files) + len(marks)) as advance:
        bring(store, aside.path, [entry for entry in files if entry.key != FORM], advance)
        snapshot.give(aside.code, keys)
        _check_identity(aside, store.url)
        accept(aside)
        whole, reasons = [], []
        for mark in marks:
            with brought(store, mark, aside.checkpoints) as (folder, reason):
                if reason is None:
                    put_in_place(folder, aside.checkpoints / mark.name)
                    whole.append(mark)
                else:
                    reasons.append(reason)
                    log.warning("passed over checkpoint %s in %s: %s", mark.name, store.url, reason)
            advance()
    if marks and len(reasons) == len(marks):
        raise StoreError(f"none of the {len(marks)} checkpoints in {store.url} is whole: {reasons[0]}")
    if whole:  # what is known of the store, until the run is claimed there
        durable = {"step": max(whole).step, "fence": max(whole).fence, "since": time.time()}
        write_json(aside.synced, {"schema": 1, "url": store.url, **durable, "behind": 0, "missing": []})


def _check_identity(run: RunDir, url: str) -> None:
    """The run must have its recipe; the URL in run.json becomes the one it was brought from."""
    record = read_json(run.run)
    if record is None or not run.recipe.is_file():
        raise StoreError(f"{url} is no whole run: its recipe.yaml is missing")
    if record.get("url") != url:
        write_json(run.run, {**record, "url": url})


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar where a person watches, a plain line at the start and end elsewhere; both on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{title}: {total} files", highlight=False)
        yield lambda: None
        console.print(f"{title}: done", highlight=False)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
