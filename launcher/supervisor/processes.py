"""Who lives: processes told apart by pid and start time, found by the run that their environment names.

Never by name. Fields of /proc/PID/stat and /proc/PID/environ: proc(5).
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.environ import EXEC

POLL = 0.1  # seconds between looks at processes that are about to end
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
KILL_PATIENCE = 30.0  # seconds until SIGKILL must have worked; only a process stuck in the kernel outlives it


@dataclass(frozen=True)
class Process:
    """A process of this host. `start` (clock ticks since boot) keeps a reused pid from being taken for it."""

    pid: int
    start: int
    parent: int

    @property
    def alive(self) -> bool:
        now = inspect(self.pid)
        return now is not None and now.start == self.start

    def signal(self, number: int) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def inspect(pid: int) -> Process | None:
    """The process `pid`; None if there is none, or only a zombie that waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything, parentheses too
    return None if fields[0] in "ZX" else Process(pid, int(fields[19]), int(fields[1]))


def of_run(run_dir: Path) -> list[Process]:
    """Every living process of the run, its supervisor and guard included, the caller excluded."""
    return [process for process, _, _ in _carrying(run_dir)]


def keepers(run_dir: Path) -> list[Process]:
    """The run's supervisor and guard: what carries the run's name but belongs to no attempt."""
    return [process for process, attempt, _ in _carrying(run_dir) if attempt is None]


def of_attempts(run_dir: Path, attempt: int | None = None, node: int | None = None) -> list[Process]:
    """torchrun, its workers and whatever these started: of one attempt, or of all.

    Several nodes of a run may be this one machine; `node`: of that one only."""
    found = {
        process.pid: process
        for process, told, at in _carrying(run_dir)
        if told is not None and attempt in (None, told) and node in (None, at)
    }
    return _with_descendants(found)


def of_command(name: str) -> list[Process]:
    """What `launch exec` has started under this name, and whatever that started."""
    needle = f"{EXEC}={name}".encode()
    return _with_descendants({process.pid: process for process in _all() if needle in _environ(process.pid)})


def end(find: Callable[[], list[Process]], budget: float, tick: Callable[[], None] = lambda: None) -> bool:
    """End all that `find` finds: SIGTERM to the topmost, `budget` seconds to save, SIGKILL to the rest.

    `tick` is called while waiting. False if something survived even SIGKILL (it is stuck in the kernel).
    """
    found = find()
    pids = {process.pid for process in found}
    for process in found:
        if process.parent not in pids:  # torchrun passes the signal on to its workers, once
            process.signal(signal.SIGTERM)
    return gone(find, budget, tick) or kill(find, tick)


def kill(find: Callable[[], list[Process]], tick: Callable[[], None] = lambda: None) -> bool:
    """SIGKILL all that `find` finds, until it finds nothing; False if something outlives KILL_PATIENCE."""
    deadline = time.monotonic() + KILL_PATIENCE
    while found := find():
        if time.monotonic() > deadline:
            return False
        for process in found:
            process.signal(signal.SIGKILL)
        tick()
        time.sleep(POLL / 10)
    return True


def gone(find: Callable[[], list[Process]], budget: float, tick: Callable[[], None] = lambda: None) -> bool:
    """Wait until `find` finds nothing; False if `budget` seconds were not enough."""
    deadline = time.monotonic() + budget
    while find():
        if time.monotonic() > deadline:
            return False
        tick()
        time.sleep(POLL)
    return True


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Orphans of our descendants come to us, to be reaped."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _carrying(run_dir: Path) -> Iterator[tuple[Process, int | None, int | None]]:
    """The processes that were told this run folder, with the attempt and the node that each was told."""
    needle = f"LAUNCH_RUN_ID={run_dir.name}".encode()
    for pid in _pids():
        environ = _environ(pid)
        if needle not in environ or pid == os.getpid():
            continue
        told = dict(variable.split(b"=", 1) for variable in environ if variable.startswith(b"LAUNCH_"))
        folder = Path(os.fsdecode(told.get(b"LAUNCH_RUN_DIR", b"")))
        # A copy of the run may be at work in another folder: one brought back from the store.
        if folder.resolve() == run_dir.resolve() and (process := inspect(pid)):
            attempt, node = (told.get(name, b"") for name in (b"LAUNCH_ATTEMPT", b"LAUNCH_NODE"))
            yield process, int(attempt) if attempt.isdigit() else None, int(node) if node.isdigit() else None


def _with_descendants(found: dict[int, Process]) -> list[Process]:
    """A child may have changed its environment; its parent tells whose it is."""
    family = {process.pid: process for process in _all()}
    grown = True
    while found and grown:
        more = [process for pid, process in family.items() if pid not in found and process.parent in found]
        found |= {process.pid: process for process in more}
        grown = bool(more)
    return list(found.values())


def _environ(pid: int) -> list[bytes]:
    """The variables that a process was started with; none if it is gone, or another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _all() -> Iterator[Process]:
    for pid in _pids():
        if process := inspect(pid):
            yield process


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
