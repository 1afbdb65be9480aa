"""`python -m launcher.supervisor.job.hurry JOB`: takes the hold from a job that is being requeued.

Slurm sets the hold (120 s, slurm.conf(5) `requeue_delay`) when the job has ended, so nobody of the job can
take it away: this process is started by it and outlives it. A cluster that ends all a job leaves behind
(cgroups) ends it, too: there the hold stays, and `slurm.come_back: submit` is the better way.
"""

import signal
import sys
import time

from launcher.slurm import jobs
from launcher.slurm.commands import SlurmError, call

PATIENCE = 180.0  # seconds


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(0.2)
        try:
            job = jobs.show(sys.argv[1])
            if job is None:
                return
            if job.state == "PENDING":
                call("scontrol", "update", f"JobId={job.id}", "StartTime=now")
                return
        except SlurmError:
            continue


if __name__ == "__main__":
    main()
