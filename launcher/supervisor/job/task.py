"""What the tasks of a run's job do: node 0's is the run's guard, the others' follow it.

submitit calls `task` in the step, one task a node: without a step Slurm's grace period is lost.
"""

import os
import signal
import sys
from pathlib import Path

from launcher.rundir import RunDir, read_json, read_jsonl
from launcher.supervisor import restart
from launcher.supervisor.guard import Guard
from launcher.supervisor.meeting import dismiss, job_name

# What needs a recipe, and with it pydantic, is imported where it is needed: it is not on the way to a step.
LAUNCHED = "launched"  # by `launch` or `launch resume`, as jobs.jsonl says
DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def task(run_dir: str, gpus: int | None) -> None:
    """The job's exit status is the run's: 0 also where it goes on in another job, or is somebody else's."""
    run, node = RunDir(Path(run_dir)), int(os.environ["SLURM_NODEID"])
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before SIGTERM; submitit would log each
    number, restarts = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    nodes, job = os.environ.get("SLURM_NNODES", "1"), job_name(number, restarts)
    if node:
        from launcher.supervisor.node import serve

        status = serve(run, node, job)
    else:
        frozen = (read_json(run.run) or {}).get("env", {})
        devices = {name: os.environ[name] for name in DEVICES if name in os.environ}
        about = ["--job", number, "--restarts", restarts, "--nodes", nodes]  # its environment has none of it
        try:
            if _over(run, number, restarts):
                return
            status = Guard(run, gpus, os.environ | frozen | devices, about).run()
        finally:
            if nodes != "1":
                dismiss(run, job)
        if status == restart.LEFT:
            _requeue(run, number)
    if status not in (restart.FINISHED, restart.STOPPED, restart.TAKEN, restart.LEFT):
        sys.exit(status)


def _over(run: RunDir, job: str, restarts: str) -> bool:
    """Whether this job comes after the end: only one that the user asked for starts a run anew."""
    asked = {row.get("job") for row in read_jsonl(run.jobs) if row.get("why") == LAUNCHED}
    return run.final.exists() and (restarts != "0" or job not in asked)


def _requeue(run: RunDir, job: str) -> None:
    """Where the recipe wants the same job again, and Slurm has not requeued it by itself."""
    from launcher.recipe import load_frozen
    from launcher.slurm import jobs
    from launcher.supervisor.job.allocation import requeue, requeues

    recipe = load_frozen(run.recipe)
    if requeues(recipe) and any(mine.id == job and mine.state == "RUNNING" for mine in jobs.queue(run.id)):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue sends it
        requeue(run, recipe, job)
