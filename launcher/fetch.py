"""Data sets that a recipe fetches: once per machine, however many runs want them, before the program starts.

`python -m launcher.fetch RUN_DIR -- COMMAND...` brings what is missing here and becomes COMMAND (torchrun).
So a fetch is the beginning of an attempt: it is stopped, watched, logged and tried again as one.
"""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher import transfer
from launcher.errors import LaunchError, StoreAway, UserError
from launcher.recipe import Recipe, load_frozen
from launcher.recipe.sections import Fetch
from launcher.rundir import RunDir, read_json, write_json
from launcher.storage import StoreSettings, reach

MARKER = ".launch-fetched.json"  # in the folder: all of it is there
LOCK = ".launch-fetch.lock"
OURS = transfer.Filters([(False, MARKER), (False, LOCK)])  # a bucket may hold those of another machine
RETRY = 10.0  # seconds between two tries
FRUITLESS = 5  # tries in a row that bring nothing, although the store is there
BEAT = 1.0  # seconds between heartbeats


def missing(recipe: Recipe, workdir: Path) -> list[Fetch]:
    """What this machine does not have yet."""
    return [item for item in recipe.fetch if _held(workdir / item.to) != item.source]


def check(recipe: Recipe, workdir: Path) -> None:
    """Whether what is missing can be fetched. Raises UserError, StoreError."""
    for item in missing(recipe, workdir):
        _refuse_other(item, workdir / item.to)
        store = reach(item.source, recipe.storage.settings)
        if next(iter(store.list()), None) is None:
            raise UserError(f"there is nothing to fetch at {item.source}", "correct `fetch` in the recipe")


def first(run: RunDir, argv: Sequence[str]) -> list[str]:
    """The command that fetches what `run` needs, and then becomes `argv`."""
    # -I: neither the program's PYTHONPATH nor the working directory has a say in how the launcher runs
    return [sys.executable, "-I", "-m", "launcher.fetch", str(run.path), "--", *argv]


def bring(item: Fetch, folder: Path, settings: StoreSettings, told: "Beat") -> None:
    """Fill `folder`, unless another run on this machine has done so meanwhile.

    A store that is away is waited for: the heart stands still then, and `restart.hang` ends it. Raises
    LaunchError, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / LOCK, told):
        _refuse_other(item, folder)
        fruitless, begun = 0, time.monotonic()
        while _held(folder) != item.source:
            try:
                summary = transfer.sync(
                    item.source, str(folder), filters=OURS, settings=settings, report=told
                )
            except StoreAway as error:
                told.problem(f"waiting for the store: {error.message}")
                time.sleep(RETRY)
                continue
            if summary.complete:
                seconds = time.monotonic() - begun
                files = summary.done + summary.same
                print(f"launch: {item.source} is in {folder}: {files} files, {seconds:.0f} s", flush=True)
                os.sync()  # so that the marker does not outlive the data
                write_json(folder / MARKER, {"schema": 1, "from": item.source, "files": files})
                return
            fruitless = 0 if summary.done else fruitless + 1
            if fruitless == FRUITLESS:
                raise LaunchError(f"{item.source} cannot be fetched: {told.last}")
            time.sleep(RETRY)


class Beat(transfer.Report):
    """Moves the run's heartbeat with the bytes that come, on the node that keeps it."""

    def __init__(self, run: RunDir, fence: int, keeps: bool) -> None:
        self.last = ""
        self._run, self._fence, self._keeps = run, fence, keeps
        self._counter = self._done = self._size = 0
        self._due = 0.0

    def begin(self, files: int, size: int) -> None:
        print(f"launch: fetching {files} files, {size / 1e9:.2f} GB", flush=True)
        self._done, self._size = 0, size
        self.beat()

    def moved(self, size: int) -> None:
        self._done += size
        self._counter += 1

    def problem(self, text: str) -> None:
        if text != self.last:
            print(f"launch: {text}", flush=True)
        self.last = text

    def tick(self) -> None:
        if self._keeps and time.monotonic() >= self._due:
            self.beat()

    def beat(self) -> None:
        percent = f" {min(100, 100 * self._done // self._size)} %" if self._size else ""
        said = {"schema": 1, "fence": self._fence, "phase": f"fetching{percent}", "counter": self._counter}
        with contextlib.suppress(OSError):
            write_json(self._run.heartbeat, said | {"step": None, "of": None, "resumed": None})
        self._due = time.monotonic() + BEAT

    def waiting(self) -> None:
        """Another run fetches the same, and minds whether it goes on."""
        self._counter += 1
        self.tick()

    def end(self) -> None:
        """The program may have no heart: one that stands still would be taken for its own."""
        if self._keeps:
            self._run.heartbeat.unlink(missing_ok=True)


def _held(folder: Path) -> object:
    """From where all of it was fetched that is in `folder`."""
    return (read_json(folder / MARKER) or {}).get("from")


def _refuse_other(item: Fetch, folder: Path) -> None:
    held = _held(folder)
    if held not in (None, item.source):
        raise UserError(
            f"{folder} holds what was fetched from {held}, not {item.source}",
            "choose another folder in the recipe's `fetch`, or delete that one",
        )


@contextlib.contextmanager
def _locked(path: Path, told: Beat) -> Iterator[None]:
    """flock(2): it falls with its holder, however that dies."""
    with path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                told.problem(f"another run fetches into {path.parent}; waiting for it")
                told.waiting()
                time.sleep(BEAT)
        yield


def main() -> int:
    run, command = RunDir(Path(sys.argv[1])), sys.argv[3:]
    recipe, record = load_frozen(run.recipe), read_json(run.run) or {}
    fence, workdir = int(os.environ["LAUNCH_ATTEMPT"]), Path(record["workdir"])
    told = Beat(run, fence, keeps=os.environ.get("LAUNCH_NODE", "0") == "0")
    try:
        for item in missing(recipe, workdir):
            bring(item, workdir / item.to, recipe.storage.settings, told)
    except (LaunchError, OSError) as error:
        reason = error.message if isinstance(error, LaunchError) else f"the data set: {error}"
        print(f"launch: {reason}", file=sys.stderr, flush=True)
        outcome = {"schema": 1, "fence": fence, "state": "failed", "step": None, "reason": reason}
        write_json(run.outcome, outcome)
        return 1
    told.end()
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
