"""`python -m launcher.supervisor.job.last_resort RUN_DIR STATUS`: the last words of a batch script.

The step is over, and STATUS is what srun ended with. Where it is not 0 though the run has not ended, and
nobody holds it, guard and supervisor died at once (out of memory, say): it is brought back from here.
"""

import contextlib
import os
import sys
from pathlib import Path

from launcher.recipe import load_frozen
from launcher.rundir import RunDir, read_json, read_jsonl
from launcher.slurm import jobs
from launcher.slurm.commands import SlurmError
from launcher.supervisor.job.allocation import come_back, verdict
from launcher.supervisor.lease import holder

DEATHS = 3  # jobs in a row that ended so and had no attempt of their own to show for it
WHY = "its job died"


def main() -> None:
    run, status, job = RunDir(Path(sys.argv[1])), sys.argv[2], os.environ["SLURM_JOB_ID"]
    if status == "0" or not run.run.exists() or read_json(run.final) or run.stop_requested.exists():
        return
    held = holder(run)
    if held is not None and held.alive is not False:  # srun was killed before its tasks: they see to the rest
        return
    with contextlib.suppress(SlurmError):
        if verdict(jobs.show(job), int(os.environ.get("SLURM_RESTART_COUNT", "0"))).wish == "stop":
            return
    submissions = read_jsonl(run.jobs)[-DEATHS:]
    if len(submissions) == DEATHS and all(row.get("why") == WHY for row in submissions):
        return
    come_back(run, load_frozen(run.recipe), job, WHY)


if __name__ == "__main__":
    main()
