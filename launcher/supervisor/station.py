"""A machine that several runs share: an attempt starts when the queue grants what it needs (member.py), and
may have to give way to a run of higher priority.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from launcher.rundir import RunDir, read_jsonl
from launcher.supervisor import lease, processes
from launcher.supervisor.member import Member, Waited, alive
from launcher.supervisor.place import Here, Refused, Verdict
from launcher.workstation import devices, order, queue
from launcher.workstation.queue import Entry

if TYPE_CHECKING:
    from launcher.recipe import Recipe


class Station(Here):
    """A place of the queue's (place.py). Raises UserError if the queue's settings make no sense."""

    def __init__(self, run: RunDir, recipe: "Recipe", workers: int) -> None:
        resources = recipe.resources
        me, guard = processes.inspect(os.getpid()), processes.inspect(os.getppid())
        assert me is not None
        self._run, self._max_wait = run, resources.max_wait
        entry = Entry(
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
        self._member = Member(entry)

    def enter(self, wait: Callable[[str], bool]) -> Mapping[str, str] | None:
        first = not read_jsonl(self._run.attempts)
        try:
            return self._member.enter(self._max_wait if first else None, wait)
        except Waited as waited:
            raise Refused(
                f"{waited}, longer than resources.max_wait; `launch resume {self._run.id}` queues it again"
            ) from None

    def parting(self) -> Verdict | None:
        after = self._member.successor()
        return (
            Verdict("preempt", f"gives way to {after.run}, of priority {after.priority}") if after else None
        )

    def leave(self, again: bool) -> None:
        """A run that was preempted waits in its old place from now on."""
        self._member.release(again)

    def last_act(self, ended: bool) -> None:
        self._member.withdraw()

    def about(self) -> dict[str, Any]:
        return {"devices": list(self._member.entry.devices)} if self._member.wants_gpus else {}


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
