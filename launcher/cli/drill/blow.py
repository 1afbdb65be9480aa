"""How `launch drill` preempts a run: as its backend would, as far as a user may; measured from outside."""

import contextlib
import socket
import time
from dataclasses import dataclass
from typing import Any

from launcher.backends import BACKENDS
from launcher.errors import LaunchError, UserError
from launcher.recipe import load_frozen
from launcher.rundir import RunDir, read_jsonl
from launcher.slurm import cluster, jobs
from launcher.slurm.commands import SlurmAway, SlurmError, call
from launcher.supervisor import history, processes

POLL = 0.1  # seconds
PATIENCE = 60.0  # seconds beyond the budget in which a node must be free
HOLDING = ("RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT")  # states in which a job has its node


@dataclass(frozen=True)
class Blow:
    """`budget`: seconds from its first signal to SIGKILL. `free`: until the node was; None: it was not.

    `orphans`: processes of the attempt that were alive then; None: they would be on `host`, another machine.
    """

    kind: str
    attempt: int
    budget: float
    free: float | None
    host: str
    orphans: list[int] | None


def strike(run: RunDir, backend: str) -> Blow:
    """Preempt the attempt that runs now, and wait until it has left. Raises UserError, LaunchError."""
    attempt = history.unfinished(run)
    if attempt is None:
        raise LaunchError(f"{run.id} was between two attempts just when the drill was to preempt it")
    begun = next(row for row in read_jsonl(run.attempts) if row.get("attempt") == attempt)
    kind, budget, free = _requeue(run) if backend == "slurm" else _signal(run, backend, begun, "")
    host = str(begun.get("host"))
    looked = [process.pid for process in processes.of_attempts(run.path, attempt)]
    return Blow(kind, attempt, budget, free, host, looked if host == socket.gethostname() else None)


def _signal(run: RunDir, backend: str, begun: dict[str, Any], why: str) -> tuple[str, float, float | None]:
    """SIGTERM to whoever holds the run, which is what `launch preempt` does."""
    began, free = time.monotonic(), None
    try:
        BACKENDS[backend].preempt(run)
        free = time.monotonic() - began
    except UserError:
        raise
    except LaunchError:  # something of it is alive still: the table says so
        pass
    budget = begun.get("save_budget") or load_frozen(run.recipe).restart.grace
    return f"SIGTERM to its supervisor, as by `launch preempt`{why}", budget, free


def _requeue(run: RunDir) -> tuple[str, float, float | None]:
    """`scontrol requeue`, the harshest kind: KillWait is all there is, and Slurm requeues the job besides."""
    found = cluster.read()
    job = next((jobs.show(queued.id) for queued in jobs.queue(run.id) if queued.state == "RUNNING"), None)
    if job is None:
        raise LaunchError(f"{run.id} lost its job just when the drill was to preempt it")
    began = time.monotonic()
    try:
        call("scontrol", "requeue", job.id)
    except SlurmAway:
        raise
    except SlurmError as error:  # JobRequeue=0, say
        begun = read_jsonl(run.attempts)[-1]
        return _signal(run, "slurm", begun, f"; it keeps its job, for {error.message}")
    budget = min(found.kill_after, load_frozen(run.recipe).restart.grace)
    place = found.partition(job.partition)
    grace = found.grace(place) if place else 0
    harsher = f"; harsher than a preemption here, which gives {grace} s more" if grace else ""
    kind = f"`scontrol requeue`: SIGTERM, {found.kill_after:g} s later SIGKILL{harsher}"
    while not _freed(job):
        if time.monotonic() - began > budget + PATIENCE:
            return kind, budget, None
        time.sleep(POLL)
    return kind, budget, time.monotonic() - began


def _freed(before: jobs.Job) -> bool:
    """Whether the job has left the node that it had."""
    with contextlib.suppress(SlurmError):
        now = jobs.show(before.id)
        again = now is not None and now.state == "RUNNING" and now.restarts > before.restarts
        return now is None or now.state not in HOLDING or again
    return False
