"""`python -m launcher.supervisor.job.last_resort RUN_DIR STATUS`: the last words of a batch script.

The step is over, and STATUS is what srun ended with. Where it is not 0 though the run has not ended, and
nobody holds it, guard and supervisor died at once (out of memory, say): it is brought back from here.
"""

import contextlib
import os
import sys
from pathlib import Path

from launcher.recipe import load_frozen
from launcher.rundir import RunDir, ended, read_jsonl
from launcher.slurm import jobs
from launcher.slurm.commands import SlurmError
from launcher.supervisor.job.allocation import verdict
from launcher.supervisor.job.way_back import come_back, note_refusal
from launcher.supervisor.lease import holder

DEATHS = 3  # jobs in a row that ended so without a new checkpoint
WHY = "its job died"


def main() -> None:
    run, status, job = RunDir(Path(sys.argv[1])), sys.argv[2], os.environ["SLURM_JOB_ID"]
    if status == "0" or not run.run.exists() or ended(run) or run.stop_requested.exists():
        return
    held = holder(run)
    if held is not None and held.alive is not False:  # srun was killed before its tasks: they see to the rest
        return
    with contextlib.suppress(SlurmError):
        if verdict(jobs.show(job), int(os.environ.get("SLURM_RESTART_COUNT", "0"))).wish == "stop":
            return
    if _fruitless(run):
        note_refusal(run, f"{DEATHS} jobs in a row died without a new checkpoint")
    else:
        come_back(run, load_frozen(run.recipe), job, WHY)


def _fruitless(run: RunDir) -> bool:
    """Whether the last jobs all came from here, and none got the run any further."""
    last = read_jsonl(run.jobs)[-DEATHS:]
    if len(last) < DEATHS or any(row.get("why") != WHY for row in last):
        return False
    lines = read_jsonl(run.attempts)
    theirs = {line["attempt"] for line in lines if line.get("job") in {row["job"] for row in last}}
    return not any(line.get("progress") for line in lines if line.get("attempt") in theirs)


if __name__ == "__main__":
    main()
