"""`launch logs`: a run's log, or one worker's, as it stands or as it grows."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from launcher.cli.status import row
from launcher.errors import UserError
from launcher.rundir import RunDir, read_json, read_jsonl
from launcher.supervisor import processes

POLL = 0.3  # seconds between looks at a growing file
TAIL = 4096  # bytes of what was said before that a follower begins with
CHUNK = 1 << 16
COMING_UP = 10.0  # seconds in which the processes of a window are there


def show(run: RunDir, out: BinaryIO, rank: int | None = None) -> None:
    """Copy the log to `out`. UserError if there is none yet."""
    path = _log(run, rank)
    try:
        with path.open("rb") as file:
            _copy(file, out)
    except OSError as error:
        raise UserError(f"run {run.id} has no log {path.relative_to(run.path)}: {error.strerror}") from None


def follow(run: RunDir, out: BinaryIO, ended: Callable[[], bool], rank: int | None = None) -> None:
    """Copy what is added, until `ended()` and nothing more comes. Goes on to the log of the next attempt.

    UserError if the run is over and there is no such log."""
    path = _log(run, rank)
    offset = _tail(path)
    while True:
        last_round = ended()  # asked first: what was written before it was true is still copied
        copied = _copy_from(path, offset, out)
        offset += copied
        newer = path if copied else _log(run, rank)
        if newer != path:
            path, offset = newer, 0
        elif not copied:
            if last_round:
                if not path.exists():
                    raise UserError(f"run {run.id} has no log {path.relative_to(run.path)}")
                return
            time.sleep(POLL)


def over(run: RunDir) -> bool:
    """Whether nothing more will be said."""
    return row(run)["state"] in ("finished", "stopped", "failed", "lost")


class Over:
    """`over` of a run that is about to be started: how its last life ended is not the end of this one."""

    def __init__(self, run: RunDir) -> None:
        self._run, self._old, self._alive = run, read_json(run.final), time.monotonic()

    def __call__(self) -> bool:
        if not over(self._run):
            return False
        final = read_json(self._run.final)
        if final is not None and final != self._old:
            return True
        if processes.keepers(self._run.path):
            self._alive = time.monotonic()
        return time.monotonic() - self._alive > COMING_UP


def _log(run: RunDir, rank: int | None) -> Path:
    if rank is None:
        return run.run_log
    attempts = [row["attempt"] for row in read_jsonl(run.attempts) if isinstance(row.get("attempt"), int)]
    return run.rank_log(max(attempts, default=1), rank)


def _copy(file: BinaryIO, out: BinaryIO) -> int:
    copied = 0
    while chunk := file.read(CHUNK):
        out.write(chunk)
        copied += len(chunk)
    out.flush()
    return copied


def _copy_from(path: Path, offset: int, out: BinaryIO) -> int:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return _copy(file, out)
    except FileNotFoundError:  # not yet there
        return 0


def _tail(path: Path) -> int:
    """Where the last lines of what is there now begin."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size <= TAIL:
                return 0
            file.seek(size - TAIL)
            file.readline()  # the rest of a line whose beginning is left out
            return file.tell()
    except FileNotFoundError:
        return 0
