"""What the tasks of a run's job do: node 0's is the run's guard, the others' follow it.

submitit calls `task` in the step, one task a node: without a step Slurm's grace period is lost.
"""

import os
import signal
import sys
from pathlib import Path

from launcher.rundir import RunDir, read_json
from launcher.supervisor import restart
from launcher.supervisor.guard import Guard
from launcher.supervisor.job.allocation import arguments


def task(run_dir: str, gpus: int | None) -> None:
    """The job's exit status is the run's: 0 also where it goes on in another job, or is somebody else's."""
    run, node = RunDir(Path(run_dir)), int(os.environ["SLURM_NODEID"])
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before SIGTERM; submitit would log each
    if node:
        from launcher.supervisor import node as follower

        status = follower.serve(run, node, os.environ["SLURM_JOB_ID"], gpus)
    else:
        frozen = (read_json(run.run) or {}).get("env", {})
        devices = {name: os.environ[name] for name in DEVICES if name in os.environ}
        status = Guard(run, gpus, os.environ | frozen | devices, arguments(os.environ)).run()
    if status not in (restart.FINISHED, restart.STOPPED, restart.TAKEN, restart.LEFT):
        sys.exit(status)


DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
