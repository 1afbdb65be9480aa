"""`launch stop` and `launch preempt`: ask the supervisor that holds the run, wait until nothing is left."""

import signal
import time

from launcher.errors import LaunchError, Taken, UserError
from launcher.recipe import load_frozen
from launcher.rundir import RunDir, ended
from launcher.supervisor import history, processes, station
from launcher.supervisor.durable import FLUSH
from launcher.supervisor.lease import Holder, holder
from launcher.supervisor.restart import TAKEN
from launcher.supervisor.supervise import Supervisor

MARGIN = 60.0  # seconds that a supervisor has beyond those which it takes by its own rules


def stop(run: RunDir) -> None:
    """End the run; no process of it is alive afterwards.

    Raises UserError if it has ended, is being stopped already, or is held on another host.
    """
    final = ended(run)
    held = _holder_here(run)
    if held is None and final is not None and not processes.keepers(run.path):  # nor is one coming up
        raise UserError(f"run {run.id} has ended already ({final.get('state')})")
    if held and run.stop_requested.exists() and final is None:
        raise UserError(f"run {run.id} is being stopped already", f"See `launch status {run.id}`.")
    run.stop_requested.touch()
    if not processes.gone(lambda: processes.keepers(run.path), patience(run)):
        processes.kill(lambda: processes.keepers(run.path))
    if ended(run) is None:  # nobody held it, or its supervisor died before it could say so
        conclude(run)
    processes.kill(lambda: processes.of_run(run.path))


def preempt(run: RunDir) -> None:
    """End the attempt that runs now, as a cluster would; its supervisor brings the run back.

    No process of that attempt is alive afterwards. Raises UserError if there is none here.
    """
    held = _holder_here(run)
    if held is None:
        raise UserError(f"run {run.id} is not running", f"`launch status {run.id}` says why.")
    attempt = history.unfinished(run)
    if attempt is None and (where := station.queued().get(str(run.path))):
        waits = f"run {run.id} waits in this machine's queue, so nothing of it can be preempted"
        raise UserError(waits, f"It is {where}.")
    if attempt is None:
        raise UserError(f"run {run.id} is between two attempts: there is nothing to preempt", "Try again.")
    supervisor = processes.inspect(held.pid)
    if supervisor is None:
        raise UserError(f"run {run.id} lost its supervisor just now, and is coming back", "Try again.")
    supervisor.signal(signal.SIGTERM)
    limit = load_frozen(run.recipe).restart.grace + processes.KILL_PATIENCE
    deadline = time.monotonic() + limit
    while history.unfinished(run) == attempt or processes.of_attempts(run.path, attempt):
        if time.monotonic() > deadline:
            raise LaunchError(f"attempt {attempt} of {run.id} did not end within {limit:g} s")
        time.sleep(processes.POLL)


def _holder_here(run: RunDir) -> Holder | None:
    """The living holder; None if there is none. UserError if only another host could tell, or act."""
    held = holder(run)
    if held and not held.here:
        raise UserError(f"run {run.id} is held by {held}", f"Say it there: ssh {held.host}")
    return held if held and held.alive else None


def patience(run: RunDir) -> float:
    """Seconds within which a supervisor that was told to stop has stopped, by its own rules."""
    return load_frozen(run.recipe).restart.grace + processes.KILL_PATIENCE + FLUSH + MARGIN


def conclude(run: RunDir) -> None:
    """Nobody holds the run: take it, to end its leftovers and to write that it was stopped."""
    if Supervisor(run).run() == TAKEN:
        raise Taken(f"run {run.id} was taken by a supervisor just now", "Try again.")
