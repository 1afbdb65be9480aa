"""A machine that several runs share: an attempt starts when the queue grants what it needs, and may have to
give way to a run of higher priority.

There is no daemon. Every supervisor that waits looks at all entries under the queue's lock, decides by the
same rules (workstation/order.py), and takes what is its own; who has died is cleared away by the others.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import LaunchError
from launcher.rundir import RunDir, read_jsonl
from launcher.supervisor import lease, processes
from launcher.supervisor.place import Refused, Verdict
from launcher.supervisor.processes import Process
from launcher.supervisor.signals import PREEMPTED
from launcher.workstation import devices, order, queue
from launcher.workstation.order import GPUS
from launcher.workstation.queue import Born, Entry, Queue

if TYPE_CHECKING:
    from launcher.recipe import Recipe

POLL = 0.5  # seconds between two looks at the queue
LOCK = 1.0  # seconds to wait for its lock; who waits for longer comes again
SHARE = 0.1  # of the time that may go into asking nvidia-smi, which takes seconds on some machines


class Station:
    """A place of the queue's (place.py). Raises UserError if the queue's settings make no sense."""

    def __init__(self, run: RunDir, recipe: "Recipe", workers: int) -> None:
        resources = recipe.resources
        me, guard = processes.inspect(os.getpid()), processes.inspect(os.getppid())
        assert me is not None
        self._run, self._max_wait = run, resources.max_wait
        self._totals = devices.totals()
        self._mine = Entry(
            key=queue.key(run),
            run=run.id,
            priority=resources.priority,
            ticket=0,  # none yet
            preemptible=resources.preemptible,
            wants=devices.wants(resources, workers),
            folder=str(run.path),
            uid=os.getuid(),
            boot=lease.boot(),
            supervisor=(me.pid, me.start),
            guard=(guard.pid, guard.start) if guard else None,
            grace=recipe.restart.grace,
        )
        self._pause, self._next = POLL, 0.0
        self._ending: dict[str, float] = {}  # entries of the dead -> when their processes are killed

    def enter(self, wait: Callable[[str], bool]) -> Mapping[str, str] | None:
        began, first = time.monotonic_ns(), not read_jsonl(self._run.attempts)
        self._mine = replace(self._mine, visible=())
        while True:
            why = self._ask()
            if self._mine.holding:
                return {"CUDA_VISIBLE_DEVICES": ",".join(self._mine.devices)} if self._wants_gpus else {}
            waited = (time.monotonic_ns() - (self._mine.ticket or began)) / 1e9
            if first and self._max_wait and waited > self._max_wait:
                self._withdraw()
                what = devices.words(self._mine.wants)
                raise Refused(
                    f"waited {_words(self._max_wait)} for {what}, longer than resources.max_wait; "
                    f"`launch resume {self._run.id}` queues it again"
                )
            until = time.monotonic() + self._pause
            while time.monotonic() < until:
                if not wait(why):
                    self._withdraw()
                    return None

    def parting(self) -> Verdict | None:
        if not self._mine.holding or time.monotonic() < self._next:
            return None
        verdict = None
        try:
            with queue.held(0) as files:
                if files.read(self._mine.key) is None:  # somebody cleans up /var/tmp
                    files.write(self._mine)
                entries = self._living(files)
            higher = any(entry.priority > self._mine.priority for entry in order.line(entries))
            if self._mine.preemptible and higher:
                after = order.decide(entries, self._totals, self._busy()).gives_way.get(self._mine.key)
                if after:
                    verdict = Verdict("preempt", f"gives way to {after.run}, of priority {after.priority}")
        except (OSError, LaunchError):
            pass  # the next look may know more
        self._next = time.monotonic() + self._pause
        return verdict

    def explain(self) -> Verdict:
        return Verdict("preempt", PREEMPTED)

    def grace(self, wanted: float) -> float:
        return wanted

    def come_back(self, verdict: Verdict) -> None:
        """It never left the machine."""

    def leave(self, again: bool) -> None:
        """A run that was preempted waits in its old place from now on."""
        self._mine = replace(self._mine, holding=False, devices=())
        if again:
            with contextlib.suppress(OSError), queue.opened() as files:
                files.write(self._mine)
                return
        self._withdraw()

    def last_act(self, left: bool) -> None:
        self._withdraw()

    def about(self) -> dict[str, Any]:
        return {"pid": os.getpid()} | ({"devices": list(self._mine.devices)} if self._wants_gpus else {})

    @property
    def _wants_gpus(self) -> bool:
        return GPUS in self._mine.wants

    def _ask(self) -> str:
        """Queue, and take what is granted; else why we wait. Raises Refused."""
        what = devices.words(self._mine.wants)
        try:
            if self._wants_gpus and not self._mine.visible:
                self._mine = replace(self._mine, visible=devices.gpus())
            there = self._totals | ({GPUS: len(self._mine.visible)} if self._wants_gpus else {})
            if lacking := devices.lacking(self._mine.wants, there):
                raise Refused("; ".join(lacking.values()))
            busy = self._busy()  # not under the lock: nvidia-smi may take its time
            with queue.held(LOCK) as files:
                return self._take(files, busy)
        except (OSError, LaunchError) as error:
            return f"waiting for {what}: {error}"

    def _take(self, files: Queue, busy: frozenset[str]) -> str:
        before = files.read(self._mine.key)
        others = [entry for entry in self._living(files) if entry.key != self._mine.key]
        kept = before.ticket if before and self._alive(before) else 0
        ticket = self._mine.ticket or kept or time.monotonic_ns()
        mine = replace(self._mine, ticket=ticket)
        claims = [*others, mine]
        given = order.decide(claims, self._totals, busy).granted.get(mine.key)
        if given is not None:
            mine = replace(mine, holding=True, devices=given)
        if mine != before:
            files.write(mine)
        self._mine = mine
        return (
            "" if mine.holding else f"waiting for {devices.words(mine.wants)}: {_position(claims, mine.key)}"
        )

    def _busy(self) -> frozenset[str]:
        if not self._wants_gpus:
            return frozenset()
        began = time.monotonic()
        try:
            return devices.busy()
        finally:
            self._pause = max(POLL, (time.monotonic() - began) / SHARE)

    def _living(self, files: Queue) -> list[Entry]:
        """All entries that count. Those of our own dead are cleared away, once nothing of them is alive."""
        living = []
        for entry in files.entries():
            if self._alive(entry) or entry.key == self._mine.key:
                living.append(entry)
            elif entry.uid == os.getuid():  # another user's files are not ours to take away, nor to count
                orphans = processes.of_attempts(Path(entry.folder))
                if orphans:
                    self._end(entry, orphans)
                    living.append(entry)
                else:
                    files.remove(entry.key)
        return living

    def _end(self, entry: Entry, orphans: Sequence[Process]) -> None:
        """As their supervisor would have: SIGTERM to the topmost, and when their grace is over, SIGKILL."""
        if entry.key not in self._ending:
            self._ending[entry.key] = time.monotonic() + entry.grace
            pids = {process.pid for process in orphans}
            orphans = [process for process in orphans if process.parent not in pids]
            number = signal.SIGTERM
        elif time.monotonic() < self._ending[entry.key]:
            return
        else:
            number = signal.SIGKILL
        for process in orphans:
            process.signal(number)

    def _alive(self, entry: Entry) -> bool:
        return alive(entry, self._mine.boot)

    def _withdraw(self) -> None:
        """Take our entry away, unless it has become that of another supervisor of the run."""
        if not self._mine.ticket:  # never queued
            return
        with contextlib.suppress(OSError), queue.opened() as files:
            found = files.read(self._mine.key)
            if found and found.supervisor == self._mine.supervisor:
                files.remove(self._mine.key)


def alive(entry: Entry, boot: str) -> bool:
    """Whether anybody stands behind an entry; `boot`: this one."""
    return entry.boot == boot and any(_lives(born) for born in (entry.supervisor, entry.guard) if born)


def queued() -> dict[str, str]:
    """The folders of the runs that wait in this machine's queue, and where in it: for people to look at."""
    if not queue.folder().is_dir():
        return {}
    boot = lease.boot()
    with contextlib.suppress(OSError), queue.opened() as files:
        entries = [entry for entry in files.entries() if alive(entry, boot)]
        line = order.line(entries)
        return {
            entry.folder: f"place {place} of {len(line)}: waiting for {devices.words(entry.wants)}"
            for place, entry in enumerate(line, 1)
        }
    return {}


def _lives(born: Born) -> bool:
    process = processes.inspect(born[0])
    return process is not None and process.start == born[1]


def _position(claims: Sequence[order.Claim], key: str) -> str:
    """place 2 of 3 in the queue, behind RUN"""
    line = order.line(claims)
    place = next(index for index, claim in enumerate(line) if claim.key == key)
    behind = f", behind {line[place - 1].run}" if place else ""
    return f"place {place + 1} of {len(line)} in the queue{behind}"


def _words(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:g} {name}"
    return f"{seconds:g} s"
