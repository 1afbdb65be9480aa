"""How a run goes on after its job: in a fresh one, or in the same one again."""

import subprocess
import sys
import time

from launcher.recipe import Recipe
from launcher.rundir import RunDir, append_json, read_jsonl
from launcher.slurm import jobs
from launcher.slurm.commands import SlurmAway, SlurmError, call, environment

RETRY = 1.0  # seconds between two tries to reach a controller that is away


def requeues(recipe: Recipe) -> bool:
    """Whether the same job is to go on. One that had a deadline to start by would be ended by it."""
    return recipe.slurm.come_back == "requeue" and recipe.resources.max_wait is None


def come_back(run: RunDir, recipe: Recipe, job: str, why: str) -> None:
    """Submit the job in which the run goes on after `job`, unless one waits. Tries until Slurm answers.

    If Slurm refuses, jobs.jsonl says so: then `job` has to be requeued."""
    from launcher.supervisor.job.submission import submit

    while True:
        try:
            if not any(other.id != job and other.pending and not other.held for other in jobs.queue(run.id)):
                rows = [row for row in read_jsonl(run.jobs) if row.get("job") == job] or [{}]
                submit(run, recipe, why, rows[-1].get("gpus"), rows[-1].get("nodes"))
            return
        except SlurmAway:
            time.sleep(RETRY)
        except SlurmError as error:
            note_refusal(run, error.message)
            return


def note_refusal(run: RunDir, error: str) -> None:
    append_json(run.jobs, {"job": None, "error": error, "time": time.time()})


def refused(run: RunDir) -> str:
    """Why there is no job to go on in, if that was the last that was heard."""
    rows = read_jsonl(run.jobs)
    return str(rows[-1].get("error") or "") if rows else ""


def last_act(run: RunDir, recipe: Recipe, job: str, restarts: int) -> None:
    """Requeue the job that we are in, where that is wanted or all that is left; it ends the job.

    For the guard's process alone, when nothing else of the run is left in the job.
    """
    if not requeues(recipe) and not refused(run):
        return
    try:
        seen = jobs.show(job)
        if seen and seen.restarts > restarts:  # Slurm does it by itself
            return
        if seen and seen.state == "RUNNING":
            # Somebody has to take Slurm's hold from the job when it has ended, so nobody of the job can.
            argv = [sys.executable, "-P", "-m", "launcher.supervisor.job.hurry", job]
            subprocess.Popen(argv, env=environment(), stdin=subprocess.DEVNULL, start_new_session=True)
            call("scontrol", "requeue", job)
            return
    except SlurmError:
        pass
    if not refused(run):
        come_back(run, recipe, job, "could not be requeued")
