"""What the tasks of a run's job do: node 0's is the run's guard, the others' follow it.

submitit calls `task` in the step, one task a node: without a step Slurm's grace period is lost.
"""

import os
import signal
import sys
from pathlib import Path

from launcher.rundir import RunDir, ended
from launcher.supervisor import restart
from launcher.supervisor.guard import Guard
from launcher.supervisor.meeting import dismiss, job_name

# What needs a recipe, and with it pydantic, is imported where it is needed: it is not on the way to a step.


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
        about = ["--job", number, "--restarts", restarts, "--nodes", nodes]
        about += ["--guard", str(os.getpid())]  # its environment has none of it
        try:
            if ended(run) is not None:  # only `launch resume` starts it anew
                return
            status = Guard(run, gpus, os.environ, about).run()
        finally:
            if nodes != "1":
                dismiss(run, job)
        if status == restart.LEFT:
            _requeue(run, number, int(restarts))
    if status not in (restart.FINISHED, restart.STOPPED, restart.TAKEN, restart.LEFT):
        sys.exit(status)


def _requeue(run: RunDir, job: str, restarts: int) -> None:
    from launcher.recipe import load_frozen
    from launcher.supervisor.job.way_back import last_act

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends it
    last_act(run, load_frozen(run.recipe), job, restarts)
