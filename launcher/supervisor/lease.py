"""Who holds a run: lease.json, a counter that its holder moves (docs/contract.md).

On the holder's own host the kernel says whether it lives. Elsewhere only the counter tells, watched on the
observer's own monotonic clock. The few instructions in which a lease changes hands or its counter moves are
guarded by a lock (flock(2)) on run.json, which always exists and is never replaced.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoints import fence_of
from launcher.errors import Taken
from launcher.rundir import RunDir, read_json, read_jsonl, write_json
from launcher.supervisor import processes

BEAT = 2.0  # seconds between two moves of the counter
POLL = 0.1  # seconds between looks at a holder elsewhere
SILENCE = 20.0  # seconds without a move after which a holder on another host counts as dead


@dataclass(frozen=True)
class Holder:
    """What lease.json says. `alive` is None where only watching the counter could tell: on another host."""

    host: str
    pid: int
    fence: int
    counter: int
    token: str
    here: bool
    alive: bool | None
    leaving: bool = False  # it saves, and lets go in a moment
    rebooted: bool = False  # since then a machine of this name was started anew; it may be another

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def holder(run: RunDir) -> Holder | None:
    """Who holds the run, dead or alive; None if nobody does, or the last one let go of it. Never waits."""
    said = read_json(run.lease)
    if said is None or said.get("ended"):
        return None
    named, now = said.get("host") == socket.gethostname(), boot()
    here = named and said.get("boot") == now
    process = processes.inspect(said.get("pid", 0)) if here else None
    alive = (process is not None and process.start == said.get("start")) if here else None
    return Holder(
        said.get("host", "?"),
        said.get("pid", 0),
        said.get("fence", 0),
        said.get("counter", 0),
        said.get("token", ""),
        here,
        alive,
        bool(said.get("leaving")),
        named and str(said.get("boot")).partition("/")[0] != now.partition("/")[0],
    )


def boot() -> str:
    """What makes a pid mean something: this boot of the kernel, and this namespace of pids in it."""
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{kernel}/{Path('/proc/self/ns/pid').readlink()}"


def highest_fence(run: RunDir) -> int:
    """The highest attempt number that ever was in this folder, whichever of its traces is left."""
    told = [
        (read_json(run.lease) or {}).get("fence"),
        *(row.get("attempt") for row in read_jsonl(run.attempts)),
    ]
    for pattern, folder in (("attempt-*", run.logs), ("step-*-fence-*", run.checkpoints)):
        told += [path.name.rpartition("-")[2] for path in folder.glob(pattern)]
    return max(map(fence_of, told), default=0)


class Lease:
    """The run is ours from `take` to `release`, as long as `beat` says so."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.token = secrets.token_hex(16)
        self.fence = 0
        self.counter = 0
        self.leaving = False  # whether this place is lost: who comes next may wait for us
        self._moved = 0.0

    def take(self, watching: Callable[[Holder], None] = lambda holder: None) -> None:
        """Take the run. Raises Taken if its holder lives, OSError if the folder cannot be written.

        `watching` is told when this needs up to SILENCE seconds of watching a holder elsewhere, or waits for
        one that is leaving.
        """
        seen = holder(self.run)
        if seen and seen.leaving:
            watching(seen)
            while (
                (now := holder(self.run)) and now.leaving and now.alive is not False and _moves(self.run, now)
            ):
                pass
            seen = holder(self.run)
        if seen and seen.alive is None:
            watching(seen)
            _watch(self.run, seen)
        with _locked(self.run):
            now = holder(self.run)
            silent = now and seen and (now.token, now.counter) == (seen.token, seen.counter) and not now.alive
            if now and now.alive is not False and not silent:
                raise _taken(self.run, now)
            self.fence = highest_fence(self.run)
            self._write()

    def beat(self, now: bool = False) -> bool:
        """Move the counter if it is time to (or `now`). False if the run has been taken from us.

        Raises OSError where the disk is full; the lease stays ours, its counter stands still.
        """
        if not now and time.monotonic() - self._moved < BEAT:
            return True
        self._moved = time.monotonic()
        with _locked(self.run):
            said = read_json(self.run.lease)
            if said is not None and said.get("token") != self.token:
                return False
            self.counter += 1
            self._write()
        return True

    def raise_fence(self, fence: int) -> bool:
        """Set the attempt's number. False if the run has been taken from us."""
        assert fence > self.fence, (fence, self.fence)
        self.fence = fence
        return self.beat(now=True)

    def leave(self) -> None:
        """Say that we are about to let go: who comes for the run now waits, instead of leaving it to us."""
        self.leaving = True
        with contextlib.suppress(OSError):
            self.beat(now=True)

    def release(self) -> None:
        """Let go of the run, if it is still ours."""
        with contextlib.suppress(OSError), _locked(self.run):
            if (read_json(self.run.lease) or {}).get("token") == self.token:
                self._write(ended=True)

    def _write(self, ended: bool = False) -> None:
        me = processes.inspect(os.getpid())
        assert me is not None
        said: dict[str, Any] = {
            "schema": 1,
            "host": socket.gethostname(),
            "boot": boot(),
            "pid": me.pid,
            "start": me.start,
            "token": self.token,
            "fence": self.fence,
            "counter": self.counter,
            "leaving": self.leaving,
            "ended": ended,
        }
        write_json(self.run.lease, said)


def _watch(run: RunDir, seen: Holder) -> None:
    now = _moves(run, seen)
    if now is not None:
        raise _taken(run, now)


def _moves(run: RunDir, seen: Holder) -> Holder | None:
    """The holder, as soon as it has moved on from `seen`; None if nobody holds it, or nothing moves."""
    deadline = time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        now = holder(run)
        if now is None or now.alive is False:
            return None
        if (now.token, now.counter) != (seen.token, seen.counter):
            return now
        time.sleep(POLL)
    return None


def _taken(run: RunDir, by: Holder) -> Taken:
    return Taken(f"run {run.id} is already held by {by}", "It goes on there; nothing was started here.")


@contextlib.contextmanager
def _locked(run: RunDir) -> Iterator[None]:
    with run.run.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except (
            OSError
        ) as error:  # a file system without locks; what is left is that `beat` looks at the token
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        yield
