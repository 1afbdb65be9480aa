"""One's own entry in the machine's queue: of a run, or of a command that somebody waits for.

There is no daemon. Whoever waits looks at all entries under the queue's lock, decides by the same rules
(workstation/order.py), and takes what is its own; who has died is cleared away by the others.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.errors import LaunchError
from launcher.recipe.sections import hours
from launcher.supervisor import processes
from launcher.supervisor.place import Refused
from launcher.supervisor.processes import Process
from launcher.workstation import devices, order, queue
from launcher.workstation.order import GPUS, Claim
from launcher.workstation.queue import Born, Entry, Queue

POLL = 0.5  # seconds between two looks at the queue
LOCK = 1.0  # seconds to wait for its lock; who waits for longer comes again
SHARE = 0.1  # of the time that may go into asking nvidia-smi, which takes seconds on some machines


class Waited(Refused):
    """Longer than it wanted to."""


class Member:
    """`entry`: as it is now. Raises UserError if the queue's settings make no sense."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._totals = devices.totals()
        self._pause, self._next = POLL, 0.0
        self._ending: dict[str, float] = {}  # entries of the dead -> when their processes are killed

    def enter(self, max_wait: float | None, wait: Callable[[str], bool]) -> Mapping[str, str] | None:
        """Queue until all is granted; the variables that name the devices. None once `wait` is False, which
        is called ten times a second with the reason. Raises Refused, Waited after `max_wait` seconds."""
        began = time.monotonic_ns()
        self.entry = replace(self.entry, visible=())
        while True:
            why = self._ask()
            if self.entry.holding:
                return {"CUDA_VISIBLE_DEVICES": ",".join(self.entry.devices)} if self.wants_gpus else {}
            waited = (time.monotonic_ns() - (self.entry.ticket or began)) / 1e9
            if max_wait and waited > max_wait:
                self.withdraw()
                raise Waited(f"waited {hours(max_wait)} for {devices.words(self.entry.wants)}")
            until = time.monotonic() + self._pause
            while time.monotonic() < until:
                if not wait(why):
                    self.withdraw()
                    return None

    def successor(self) -> Claim | None:
        """For whom to give way; looks every POLL seconds, however often it is called."""
        if not self.entry.holding or time.monotonic() < self._next:
            return None
        after = None
        try:
            with queue.held(0) as files:
                if files.read(self.entry.key) is None:  # somebody cleans up /var/tmp
                    files.write(self.entry)
                entries = self._living(files)
            higher = any(entry.priority > self.entry.priority for entry in order.line(entries))
            if self.entry.preemptible and higher:
                after = order.decide(entries, self._totals, self._busy()).gives_way.get(self.entry.key)
        except (OSError, LaunchError):
            pass  # the next look may know more
        self._next = time.monotonic() + self._pause
        return after

    def release(self, again: bool) -> None:
        """Give back what it holds. `again`: it waits in its old place from now on."""
        self.entry = replace(self.entry, holding=False, devices=())
        if again:
            with contextlib.suppress(OSError), queue.opened() as files:
                files.write(self.entry)
                return
        self.withdraw()

    def withdraw(self) -> None:
        """Take our entry away, unless it has become that of another supervisor of the run."""
        if not self.entry.ticket:  # never queued
            return
        with contextlib.suppress(OSError), queue.opened() as files:
            found = files.read(self.entry.key)
            if found and found.supervisor == self.entry.supervisor:
                files.remove(self.entry.key)

    @property
    def wants_gpus(self) -> bool:
        return GPUS in self.entry.wants

    def _ask(self) -> str:
        """Queue, and take what is granted; else why we wait. Raises Refused."""
        what = devices.words(self.entry.wants)
        try:
            if self.wants_gpus and not self.entry.visible:
                self.entry = replace(self.entry, visible=devices.gpus())
            there = self._totals | ({GPUS: len(self.entry.visible)} if self.wants_gpus else {})
            if lacking := devices.lacking(self.entry.wants, there):
                raise Refused("; ".join(lacking.values()))
            busy = self._busy()  # not under the lock: nvidia-smi may take its time
            with queue.held(LOCK) as files:
                return self._take(files, busy)
        except (OSError, LaunchError) as error:
            return f"waiting for {what}: {error}"

    def _take(self, files: Queue, busy: frozenset[str]) -> str:
        before = files.read(self.entry.key)
        others = [entry for entry in self._living(files) if entry.key != self.entry.key]
        kept = before.ticket if before and alive(before, self.entry.boot) else 0
        ticket = self.entry.ticket or kept or time.monotonic_ns()
        mine = replace(self.entry, ticket=ticket)
        claims = [*others, mine]
        given = order.decide(claims, self._totals, busy).granted.get(mine.key)
        if given is not None:
            mine = replace(mine, holding=True, devices=given)
        if mine != before:
            files.write(mine)
        self.entry = mine
        return (
            "" if mine.holding else f"waiting for {devices.words(mine.wants)}: {_position(claims, mine.key)}"
        )

    def _busy(self) -> frozenset[str]:
        if not self.wants_gpus:
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
            if alive(entry, self.entry.boot) or entry.key == self.entry.key:
                living.append(entry)
            elif entry.uid == os.getuid():  # another user's files are not ours to take away, nor to count
                orphans = _orphans(entry)
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


def alive(entry: Entry, boot: str) -> bool:
    """Whether anybody stands behind an entry; `boot`: this one."""
    return entry.boot == boot and any(_lives(born) for born in (entry.supervisor, entry.guard) if born)


def _orphans(entry: Entry) -> list[Process]:
    """What is alive of a dead one's workers, or of its command."""
    return processes.of_attempts(Path(entry.folder)) if entry.folder else processes.of_command(entry.run)


def _lives(born: Born) -> bool:
    process = processes.inspect(born[0])
    return process is not None and process.start == born[1]


def _position(claims: Sequence[order.Claim], key: str) -> str:
    """place 2 of 3 in the queue, behind RUN"""
    line = order.line(claims)
    place = next(index for index, claim in enumerate(line) if claim.key == key)
    behind = f", behind {line[place - 1].run}" if place else ""
    return f"place {place + 1} of {len(line)} in the queue{behind}"
