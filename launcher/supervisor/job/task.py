"""What the tasks of a run's job do: node 0's is the run's guard, the others' follow it.

submitit calls `task` in the step, one task a node: without a step Slurm's grace period is lost.
"""

import os
import signal
import sys
from pathlib import Path

from launcher.recipe import load_frozen
from launcher.rundir import RunDir, read_json
from launcher.slurm import jobs
from launcher.supervisor import restart
from launcher.supervisor.guard import Guard
from launcher.supervisor.job.allocation import arguments, requeue, requeues
from launcher.supervisor.meeting import dismiss, job_name
from launcher.supervisor.node import serve

DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def task(run_dir: str, gpus: int | None) -> None:
    """The job's exit status is the run's: 0 also where it goes on in another job, or is somebody else's."""
    run, node = RunDir(Path(run_dir)), int(os.environ["SLURM_NODEID"])
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before SIGTERM; submitit would log each
    job = job_name(os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0"))
    if node:
        status = serve(run, node, job)
    else:
        frozen = (read_json(run.run) or {}).get("env", {})
        devices = {name: os.environ[name] for name in DEVICES if name in os.environ}
        try:
            status = Guard(run, gpus, os.environ | frozen | devices, arguments(os.environ)).run()
        finally:
            if os.environ.get("SLURM_NNODES", "1") != "1":
                dismiss(run, job)
    if status == restart.LEFT:
        _requeue(run, os.environ["SLURM_JOB_ID"])
    if status not in (restart.FINISHED, restart.STOPPED, restart.TAKEN, restart.LEFT):
        sys.exit(status)


def _requeue(run: RunDir, job: str) -> None:
    """Where the recipe wants the same job again, and Slurm has not requeued it by itself."""
    recipe = load_frozen(run.recipe)
    mine = [queued for queued in jobs.queue(run.id) if queued.id == job and queued.state == "RUNNING"]
    if requeues(recipe) and mine:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue sends it
        requeue(run, recipe, job)
